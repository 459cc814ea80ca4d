"""Shards that are suspended, drained, replaced one after the other or missing; servers that are restarted or lost. The client sees a
pause, and each token once."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from checked_load import counted, load, options
from places import EXPORTS, NATS
from running import Run
from system_tools import all_rows_free, until_leases

from mesh.bus import Bucket, Bus, BusOptions, Received
from mesh.client import AsyncMeshClient
from mesh.errors import Unavailable
from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model
from mesh.local.mesh import LocalMesh
from mesh.local.nats_server import NatsServer
from mesh.model.manifest import Manifest
from mesh.protocol import subjects, topics
from mesh.protocol.control import Drain
from mesh.protocol.events import Event
from mesh.protocol.status import ShardLease


@pytest.fixture
def pairs(model: Path) -> Iterator[LocalMesh]:
    with LocalMesh(options(model)) as running:
        yield running


async def until_ready(mesh: LocalMesh, name: str) -> None:
    pid = mesh.processes[name].pid
    await until_leases(mesh, lambda found: pid in {lease.pid for lease in found.values() if lease.state == "ready"})


@pytest.mark.slow
def test_a_suspended_shard_is_left_and_comes_back(pairs: LocalMesh, undisturbed: list[list[int]], run: Run) -> None:
    async def disturb() -> None:
        async with load(pairs, undisturbed) as (running, client):
            pids = [pairs.processes[name].pid for name in ("shard-1", "shard-3")]
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
            try:
                async with asyncio.timeout(60):
                    while not await counted(client, "suspected"):
                        await running.more(20)
                await running.more(100)  # the others carry on
            finally:
                for pid in pids:
                    os.kill(pid, signal.SIGCONT)
            await running.more(100)
            for name in ("shard-1", "shard-3"):
                await until_ready(pairs, name)
        await all_rows_free(pairs)

    run(disturb())


def test_a_restarted_server_costs_a_pause(pairs: LocalMesh, undisturbed: list[list[int]], run: Run) -> None:
    async def disturb() -> None:
        async with load(pairs, undisturbed) as (running, client):
            for _ in range(2):
                server = pairs.server
                assert server is not None
                server.kill()
                server.revive()
                await running.more(200)
            assert await counted(client, "failed") == 0
        await all_rows_free(pairs)

    run(disturb())


@pytest.mark.slow
def test_shards_and_coordinators_are_replaced_one_after_the_other(model: Path, undisturbed: list[list[int]], run: Run) -> None:
    """A rolling upgrade under load: each process gets SIGTERM and is replaced."""

    async def disturb(mesh: LocalMesh) -> None:
        async with load(mesh, undisturbed) as (running, client):
            for name in sorted(mesh.processes):
                process = mesh.processes[name]
                process.terminate()
                await asyncio.to_thread(process.wait, 120)
                mesh.restart(name)
                if name.startswith("shard"):
                    await until_ready(mesh, name)
                await running.more(60)
            assert await counted(client, "failed") == 0
        await all_rows_free(mesh)

    with LocalMesh(options(model, coordinators=2)) as mesh:
        run(disturb(mesh))


def test_a_drained_shard_moves_its_sessions_and_ends(pairs: LocalMesh, undisturbed: list[list[int]], run: Run) -> None:
    async def disturb() -> None:
        async with load(pairs, undisturbed) as (running, client), await Bus.connect(pairs.bus, name="operator") as bus:
            before = await counted(client, "failovers")
            told: asyncio.Queue[Received] = asyncio.Queue()
            await bus.subscribe(topics.EVENTS.any(), told.put)
            await bus.flush()
            drained = await bus.request(topics.DRAIN.at("shard-1"), Drain(timeout_s=60), timeout_s=10)
            code = await asyncio.to_thread(pairs.processes["shard-1"].wait, 60)
            assert code == 0
            await running.more(100)
            if drained.sessions:
                assert await counted(client, "failovers") > before
            kinds = set()
            while not told.empty():
                kinds.add(Event.parse(told.get_nowait().data).kind)
            assert {"drained", "left"} <= kinds

    run(disturb())


def test_with_no_replica_left_generations_wait_for_one_to_join(model: Path, undisturbed: list[list[int]], run: Run, tmp_path: Path) -> None:
    async def disturb(mesh: LocalMesh, folder: Path) -> None:
        command = [sys.executable, "-m", "mesh.cli"]
        pushed = await asyncio.to_thread(
            subprocess.run, [*command, "push", str(model), "--nats", mesh.url], capture_output=True, timeout=120
        )
        assert pushed.returncode == 0, pushed.stderr
        async with load(mesh, undisturbed) as (running, _):
            killed = mesh.processes["shard-2"]
            killed.kill()
            killed.wait()
            seen = running.tokens
            join = [*command, "join", "--nats", mesh.url, "--dir", str(folder), "--memory", "4GB", "--quiet"]
            joined = subprocess.Popen(join, stderr=subprocess.PIPE, text=True)
            try:
                await running.more(200)
                assert running.tokens > seen
                await running.stop()
            finally:
                joined.kill()
                print("the shard that joined:", joined.communicate()[1])

    with LocalMesh(options(model, replicas=1, failover_timeout_s=120.0)) as mesh:
        run(disturb(mesh, tmp_path / "blocks"))


def test_with_no_replica_for_failover_timeout_the_error_says_so(model: Path, run: Run) -> None:
    async def disturb(mesh: LocalMesh) -> None:
        async with AsyncMeshClient(mesh.url, model="tiny") as client:
            with pytest.raises(Unavailable, match=r"layers .* have no shard that is ready, for 2 s"):
                async with client.stream(tokens=[5], max_tokens=200, ignore_eos=True, timeout_s=60) as stream:
                    async for chunk in stream:
                        if chunk.index == 5:
                            mesh.processes["shard-2"].kill()

    with LocalMesh(options(model, replicas=1, failover_timeout_s=2.0)) as mesh:
        run(disturb(mesh))


@pytest.mark.slow
def test_one_server_of_three_is_killed(model: Path, undisturbed: list[list[int]], run: Run, tmp_path: Path) -> None:
    import socket

    with ExitStack() as stack:
        ports = []
        for _ in range(6):
            held = stack.enter_context(socket.socket())
            held.bind(("127.0.0.1", 0))
            ports.append(held.getsockname()[1])
    routes = ",".join(f"nats://127.0.0.1:{port}" for port in ports[3:])

    async def disturb(mesh: LocalMesh, servers: list[NatsServer]) -> None:
        async with load(mesh, undisturbed) as (running, client):
            servers[0].kill()
            loop = asyncio.get_running_loop()
            enough = loop.time() + 3 * subjects.LEASE_TTL_S  # leases that are not renewed meanwhile would have ended
            while loop.time() < enough:
                await running.more(100)
            assert await counted(client, "failed") == 0

    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                NatsServer.start(
                    config=NATS / f"cluster-{index + 1}.conf",
                    directory=tmp_path / str(index),
                    port=ports[index],
                    arguments=["--cluster_listen", f"nats://127.0.0.1:{ports[3 + index]}", "--routes", routes],
                )
            )
            for index in range(3)
        ]
        mesh = stack.enter_context(LocalMesh(options(model, nats=",".join(server.url for server in servers))))
        run(disturb(mesh, servers))


@pytest.mark.slow
def test_a_shard_of_another_model_of_the_same_name_is_refused_and_reported(pairs: LocalMesh, run: Run, tmp_path: Path) -> None:
    """This happens when a model was imported again on some machines only."""
    other = tmp_path / "tiny"
    import_model(EXPORTS / "qwen2-dynamo.onnx", other, ImportOptions(), name="tiny")

    async def disturb() -> None:
        async with await Bus.connect(BusOptions(urls=(pairs.url,)), name="operator") as bus:
            told: asyncio.Queue[Received] = asyncio.Queue()
            await bus.subscribe(topics.EVENTS.at("rejected"), told.put)
            await bus.flush()
            config = tmp_path / "shard.yaml"
            config.write_text(
                f"shard: {{shard_id: 9}}\nnats: {{urls: [{pairs.url}]}}\n"
                f"model: {{shard_path: {other}, layers_start: 0, layers_end: 1}}\n"
                "resources: {max_memory_gb: 4}\nperformance: {batch_size: 2, max_sequence_length: 64}\n"
            )
            process = subprocess.Popen([sys.executable, "-m", "mesh.cli", "shard", "--config", str(config), "--quiet"])
            try:
                event = Event.parse((await asyncio.wait_for(told.get(), 120)).data)
                assert event.who == "shard-9" and Manifest.load(other).model_hash in event.detail
                async with AsyncMeshClient(pairs.url, model="tiny") as client:
                    assert len((await client.generate(tokens=[5], max_tokens=5, ignore_eos=True)).tokens) == 5
            finally:
                process.kill()
                process.wait()

    run(disturb())


def test_a_shard_of_another_frame_version_is_refused_and_reported(pairs: LocalMesh, run: Run) -> None:
    """This happens during an upgrade: the lease is one that a later version would write."""

    async def disturb() -> None:
        async with await Bus.connect(BusOptions(urls=(pairs.url,)), name="operator") as bus:
            told: asyncio.Queue[Received] = asyncio.Queue()
            await bus.subscribe(topics.EVENTS.at("rejected"), told.put)
            await bus.flush()
            leases = Bucket(bus, subjects.KV_SHARDS, ttl_s=subjects.LEASE_TTL_S)
            lease = ShardLease.parse((await leases.entries())[0].value or b"")
            later = lease.model_copy(update={"shard": "later", "instance": "later", "frame_version": lease.frame_version + 1})
            await bus.send(topics.LEASE.at(later.model, later.shard), later)
            event = Event.parse((await asyncio.wait_for(told.get(), 60)).data)
            assert event.who == "later" and f"frame version {lease.frame_version + 1}" in event.detail
            async with AsyncMeshClient(pairs.url, model="tiny") as client:
                assert len((await client.generate(tokens=[5], max_tokens=5, ignore_eos=True)).tokens) == 5

    run(disturb())
