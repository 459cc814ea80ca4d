"""NATS over a WebSocket: everything that the bus does works, and what is no WebSocket is an error that says so."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from authority import Authority
from clusters import free_ports
from running import Run
from serving import LONG, coordinator, shards

from mesh.bus import Bus, BusOptions, Received
from mesh.client import AsyncMeshClient
from mesh.errors import ConfigError, MeshError, Unavailable
from mesh.local.nats_server import NatsServer
from mesh.protocol import topics
from mesh.types import even_ranges


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[NatsServer, str]]:
    """A server, and where it takes WebSockets."""
    folder = tmp_path_factory.mktemp("web")
    (port,) = free_ports(1)
    (folder / "web.conf").write_text(
        f'max_payload: 8MB\njetstream {{ store_dir: "./jetstream" }}\nwebsocket {{ listen: "127.0.0.1:{port}", no_tls: true }}\n'
    )
    with NatsServer.start(config=folder / "web.conf", directory=folder) as server:
        yield server, f"ws://127.0.0.1:{port}"


@pytest.mark.parametrize("size", [0, 1, 100, 125, 126, 200, 65_535, 65_536, 1_000_000, 7_000_000])
def test_messages_of_any_size_arrive_whole_on_both_paths(run: Run, web: tuple[NatsServer, str], size: int) -> None:
    async def work() -> None:
        async with await Bus.connect(BusOptions((web[1],)), name="t") as bus:
            heard: asyncio.Queue[bytes] = asyncio.Queue()
            frames = topics.FRAMES.at("m", "0-1", "s")
            await bus.subscribe_direct(frames, heard.put_nowait)
            data = bytes(index % 251 for index in range(min(size, 1000))) * (size // 1000 + 1)

            async def answer(received: Received) -> None:
                await bus.publish(received.reply, received.data)

            await bus.subscribe(topics.LEASES.at(), answer)
            await bus.flush()
            assert bus.post(frames.subject, data[:size])
            async with asyncio.timeout(30):
                assert await heard.get() == data[:size]
            assert (await bus.ask("mesh.v1.shards", data[:size], timeout_s=30)).data == data[:size]

    run(work())


def test_a_generation_goes_through_shards_and_coordinator_on_websockets(
    run: Run, web: tuple[NatsServer, str], model: Path, expected: list[int]
) -> None:
    async def work() -> None:
        async with (
            shards(web[1], model, even_ranges(3, 2)),
            coordinator(web[1], model),
            AsyncMeshClient(web[1], model="tiny") as client,
        ):
            assert list((await client.generate(**LONG)).tokens) == expected

    run(work())


def test_a_connection_comes_back_after_its_server(run: Run, tmp_path: Path) -> None:
    (port,) = free_ports(1)
    (tmp_path / "web.conf").write_text(f'websocket {{ listen: "127.0.0.1:{port}", no_tls: true }}\n')

    async def work(server: NatsServer) -> None:
        async with await Bus.connect(BusOptions((f"ws://127.0.0.1:{port}",)), name="t") as bus:
            back, lost = asyncio.Event(), asyncio.Event()
            bus.on_change(lambda connected: (back if connected else lost).set())
            heard: asyncio.Queue[bytes] = asyncio.Queue()
            await bus.subscribe_direct("_INBOX.x", heard.put_nowait)
            server.kill()
            async with asyncio.timeout(30):
                await lost.wait()
                server.revive()
                await back.wait()
                await bus.flush()
                await bus.publish("_INBOX.x", b"hello")
                assert await heard.get() == b"hello"

    with NatsServer.start(config=tmp_path / "web.conf", directory=tmp_path) as server:
        run(work(server))


def test_with_tls(run: Run, tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    pair = authority.issue("server")
    (port,) = free_ports(1)
    (tmp_path / "web.conf").write_text(
        f'websocket {{ listen: "127.0.0.1:{port}", tls {{ cert_file: "{pair.cert}", key_file: "{pair.key}" }} }}\n'
    )

    async def work() -> None:
        url = f"wss://127.0.0.1:{port}"
        async with await Bus.connect(BusOptions((url,), tls_ca=str(authority.ca)), name="t") as bus:
            await bus.flush()
        with pytest.raises(MeshError):
            await Bus.connect(BusOptions((url,)), name="t", timeout_s=2)

    with NatsServer.start(config=tmp_path / "web.conf", directory=tmp_path):
        run(work())


def test_what_is_no_websocket_is_an_error(run: Run, web: tuple[NatsServer, str]) -> None:
    async def work() -> None:
        plain = web[0].url
        with pytest.raises(Unavailable):
            await Bus.connect(BusOptions((re.sub("nats", "ws", plain, count=1),)), name="t", timeout_s=2)
        with pytest.raises(ConfigError, match="one kind"):
            await Bus.connect(BusOptions((plain, web[1])), name="t")

    run(work())
