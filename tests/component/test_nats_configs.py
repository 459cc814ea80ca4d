"""The server configurations in nats/, started unchanged but for their ports, offer what a mesh needs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from clusters import free_ports
from places import NATS
from running import Run
from waiting import until

from mesh.bus import Bucket, Bus, BusOptions, EventLog, Received
from mesh.bus.replicas import spread
from mesh.errors import ServiceError, Unavailable
from mesh.local.nats_server import NatsServer
from mesh.protocol import subjects
from mesh.protocol.topics import TOPICS, table


def start(name: str, tmp_path: Path, *arguments: str, port: int | None = None, **environment: str) -> NatsServer:
    folder = tmp_path / name.removesuffix(".conf")
    return NatsServer.start(config=NATS / name, directory=folder, port=port, arguments=arguments, environment=environment)


async def eventually(attempt: Callable[[], Any], *, within_s: float = 30.0) -> Any:
    """The first success; a cluster chooses a leader before it takes a write."""
    deadline = asyncio.get_running_loop().time() + within_s
    while True:
        try:
            return await attempt()
        except ServiceError:
            if asyncio.get_running_loop().time() > deadline:
                raise


def test_single(run: Run, tmp_path: Path) -> None:
    async def work(url: str) -> None:
        async with await Bus.connect(BusOptions((url,)), name="t") as bus:
            assert bus.max_payload == 8_000_000 or bus.max_payload == 8 * 1024 * 1024
            bucket = Bucket(bus, subjects.KV_SHARDS, ttl_s=5.0)
            await bucket.put("a", b"1")
            assert [entry.key for entry in await bucket.entries()] == ["a"]

    with start("single.conf", tmp_path) as server:
        run(work(server.url))
        assert (tmp_path / "single" / "jetstream").is_dir()


def test_cluster_of_three_survives_the_loss_of_one(run: Run, tmp_path: Path) -> None:
    async def work(servers: list[NatsServer]) -> None:
        urls = tuple(server.url for server in servers)
        async with await Bus.connect(BusOptions(urls), name="t") as bus:
            bucket = Bucket(bus, subjects.KV_PLACEMENT, durable=True)
            await eventually(lambda: bucket.put("a", b"1"))

            async def on_three() -> None:
                """However many servers ran when the streams were made."""
                await Bucket(bus, subjects.KV_PLACEMENT, durable=True).get("a")
                await EventLog(bus).open()
                for stream in (f"KV_{subjects.KV_PLACEMENT}", subjects.STREAM_EVENTS):
                    found = await bus.client.jetstream().stream_info(stream)
                    if found.config.num_replicas != 3:
                        raise ServiceError(f"{stream} is on {found.config.num_replicas}")

            await eventually(on_three)
            made = await bus.client.jetstream().create_key_value(bucket="narrow", replicas=1)
            await spread(bus, "KV_narrow")
            assert (await made.status()).stream_info.config.num_replicas == 3
            connected = bus.client.connected_url
            assert connected is not None
            lost = next(server for server in servers if server.port == connected.port)
            lost.kill()
            await eventually(lambda: bucket.put("a", b"2"))
            entry = await eventually(lambda: bucket.get("a"))
            assert entry.value == b"2"

    ports = free_ports(6)
    routes = ",".join(f"nats://127.0.0.1:{port}" for port in ports[3:])
    with ExitStack() as stack:
        servers = []
        for index in range(3):
            listen = f"nats://127.0.0.1:{ports[3 + index]}"
            name = f"cluster-{index + 1}.conf"
            servers.append(stack.enter_context(start(name, tmp_path, "--cluster_listen", listen, "--routes", routes, port=ports[index])))
        run(work(servers))


@pytest.mark.parametrize("scheme", ["nats", "ws"])
def test_leaf_node_shares_subjects_and_leases_with_its_hub(run: Run, tmp_path: Path, scheme: str) -> None:
    async def work(hub_url: str, leaf_url: str) -> None:
        async with (
            await Bus.connect(BusOptions((hub_url,)), name="hub") as hub,
            await Bus.connect(BusOptions((leaf_url,)), name="leaf") as leaf,
        ):

            async def answer(received: Received) -> None:
                await hub.publish(received.reply, received.data + b"!")

            await hub.subscribe("mesh.v1.m.layers.0-1", answer, queue=subjects.REPLICAS_QUEUE)
            await hub.flush()
            reply = await eventually(lambda: leaf.ask("mesh.v1.m.layers.0-1", b"hello", timeout_s=1))
            assert reply.data == b"hello!"
            await Bucket(leaf, subjects.KV_SHARDS, ttl_s=5.0).put("a", b"from the leaf")
            entry = await Bucket(hub, subjects.KV_SHARDS, ttl_s=5.0).get("a")
            assert entry is not None and entry.value == b"from the leaf"

    hub_config, ports = hub_files(tmp_path)
    with (
        NatsServer.start(config=hub_config, directory=tmp_path / "hub", environment={"MESH_LEAF_PASSWORD": "secret-of-leaves"}) as hub,
        start("leaf.conf", tmp_path, MESH_HUB=f"{scheme}://leaf:secret-of-leaves@127.0.0.1:{ports[scheme]}") as leaf,
    ):
        run(work(hub.url, leaf.url))


def hub_files(folder: Path) -> tuple[Path, dict[str, int]]:
    """hub.conf and what it includes, with free ports: nats-server takes those of leaf nodes and WebSockets from nowhere but its file."""
    leaf, web = free_ports(2)
    for name in ("hub.conf", "single.conf", "common.conf"):
        text = (NATS / name).read_text().replace("listen: 127.0.0.1:7422", f"listen: 127.0.0.1:{leaf}")
        (folder / name).write_text(text.replace("listen: 127.0.0.1:7480", f"listen: 127.0.0.1:{web}"))
    return folder / "hub.conf", {"nats": leaf, "ws": web}


@pytest.mark.parametrize("who", ["", "leaf:wrong@"])
def test_a_leaf_node_without_the_password_is_refused(run: Run, tmp_path: Path, who: str) -> None:
    async def work(url: str) -> None:
        async with await Bus.connect(BusOptions((url,)), name="t") as bus:
            await until(lambda: any("uthorization" in line for line in leaf.log), because="nats-server says it in its log alone")
            with pytest.raises(Unavailable):
                await bus.ask("$JS.API.INFO", b"", timeout_s=2)

    hub_config, ports = hub_files(tmp_path)
    with (
        NatsServer.start(config=hub_config, directory=tmp_path / "hub", environment={"MESH_LEAF_PASSWORD": "secret-of-leaves"}),
        start("leaf.conf", tmp_path, MESH_HUB=f"nats://{who}127.0.0.1:{ports['nats']}") as leaf,
    ):
        run(work(leaf.url))


def test_a_configuration_that_is_wrong_is_an_error_that_says_so(tmp_path: Path) -> None:
    from mesh.errors import ConfigError

    (tmp_path / "wrong.conf").write_text("max_paylode: 8MB\n")
    with pytest.raises(ConfigError, match="max_paylode"):
        NatsServer.start(config=tmp_path / "wrong.conf", directory=tmp_path)


def test_no_server_is_unavailable_and_names_the_address(run: Run) -> None:
    (port,) = free_ports(1)
    url = f"nats://user:secret@127.0.0.1:{port}"
    with pytest.raises(Unavailable, match=str(port)) as caught:
        run(Bus.connect(BusOptions((url,)), name="t", timeout_s=0.5))
    assert "secret" not in str(caught.value)


def test_every_subject_is_documented() -> None:
    text = (NATS / "README.md").read_text()
    assert table() in text, "write the table of `python -m mesh.protocol.topics` into nats/README.md"
    for topic in TOPICS:
        assert f"`{topic.template}`" in text, topic.template
    for bucket in (subjects.KV_SHARDS, subjects.KV_PLACEMENT, subjects.KV_SESSIONS, subjects.OBJECTS_MODELS):
        assert f"`{bucket}`" in text


def test_with_advisories_the_end_of_a_connection_is_announced(run: Run, tmp_path: Path) -> None:
    async def work(url: str) -> None:
        async with await Bus.connect(BusOptions((url,)), name="t") as bus:
            heard: asyncio.Queue[Received] = asyncio.Queue()
            await bus.subscribe(subjects.DISCONNECTS, heard.put)
            await bus.flush()
            other = await Bus.connect(BusOptions((url,)), name="mesh-shard")
            await other.close()
            received = await asyncio.wait_for(heard.get(), 60)
            assert b'"mesh-shard"' in received.data
            await Bucket(bus, subjects.KV_SHARDS, ttl_s=5.0).put("a", b"1")

    for name in ("single.conf", "common.conf", "advisories.conf"):
        text = (NATS / name).read_text()
        (tmp_path / name).write_text(text.replace('include "common.conf"', 'include "common.conf"\ninclude "advisories.conf"'))
    with NatsServer.start(config=tmp_path / "single.conf", directory=tmp_path) as server:
        run(work(server.url))
    with NatsServer.start() as embedded:
        run(work(embedded.url))
