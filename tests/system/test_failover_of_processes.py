"""Shards that are suspended, drained, replaced one after the other or missing; servers that are restarted or lost. The client sees a
pause, and each token once."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from system_tools import all_rows_free, until_leases
from waiting import until

from mesh.bus import Bucket, Bus, BusOptions, Received
from mesh.client import AsyncMeshClient
from mesh.client.results import MeshStatus
from mesh.errors import ServiceError, Unavailable
from mesh.importer.importing import import_model
from mesh.importer.sources.source import ImportOptions
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.local.nats_server import NatsServer
from mesh.model.manifest import Manifest
from mesh.protocol import subjects, topics
from mesh.protocol.control import Drain
from mesh.protocol.events import Event
from mesh.protocol.status import ShardLease

CONTEXT, TOKENS = 256, 160
PROMPTS = [[5, 17, 33], [90], [7, 7, 7, 60, 3], list(range(1, 30))]
NATS = Path(__file__).parents[2] / "nats"
FIXTURES = Path(__file__).parents[1] / "fixtures" / "onnx"


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> list[list[int]]:
    from mesh.runtime.generate import Pipeline
    from mesh.runtime.sampling import SamplingParams

    pipeline = Pipeline.load(model, context=CONTEXT)
    return [pipeline.complete(prompt, SamplingParams(temperature=0.0), max_tokens=TOKENS).ids for prompt in PROMPTS]


def options(model: Path, **values: Any) -> LocalOptions:
    return LocalOptions(model=model, **{"shards": 2, "replicas": 2, "rows": 8, "context": CONTEXT, "http": False, **values})


@pytest.fixture
def pairs(model: Path) -> Iterator[LocalMesh]:
    with LocalMesh(options(model)) as running:
        yield running


class Load:
    """The prompts, generated again and again until `stop`; every answer is compared."""

    def __init__(self, client: AsyncMeshClient, undisturbed: list[list[int]]) -> None:
        self._client = client
        self._undisturbed = undisturbed
        self._over = False
        self._news = asyncio.Event()
        self.tokens = self.finished = 0
        self.tasks = [asyncio.create_task(self._go_on(index)) for index in range(len(PROMPTS))]

    async def _go_on(self, index: int) -> None:
        while not self._over:
            seen: list[int] = []
            async with self._client.stream(tokens=PROMPTS[index], max_tokens=TOKENS, temperature=0.0, ignore_eos=True) as stream:
                async for chunk in stream:
                    if chunk.token is not None:
                        assert chunk.index == len(seen)
                        seen.append(chunk.token.id)
                        self.tokens += 1
                        self._news.set()
            assert seen == self._undisturbed[index]
            self.finished += 1

    async def more(self, tokens: int = 40) -> None:
        """Until so many more tokens have come. What went wrong with a session is raised."""
        wanted = self.tokens + tokens
        while self.tokens < wanted:
            self._news.clear()
            waiting = asyncio.create_task(self._news.wait())
            done, _ = await asyncio.wait([waiting, *self.tasks], return_when=asyncio.FIRST_COMPLETED, timeout=120)
            waiting.cancel()
            assert done, "no token for 120 s"
            for task in self.tasks:
                if task.done():
                    task.result()

    async def stop(self) -> None:
        self._over = True
        await asyncio.gather(*self.tasks)


@asynccontextmanager
async def load(mesh: LocalMesh, undisturbed: list[list[int]]) -> AsyncIterator[tuple[Load, AsyncMeshClient]]:
    async with AsyncMeshClient(options=mesh.bus, model="tiny") as client:
        running = Load(client, undisturbed)
        try:
            await running.more()
            yield running, client
            await running.stop()
        finally:
            for task in running.tasks:
                task.cancel()
            await asyncio.gather(*running.tasks, return_exceptions=True)


async def counted(client: AsyncMeshClient, name: str) -> int:
    async def asked() -> MeshStatus | None:
        try:
            return await client.status()
        except ServiceError:  # a cluster that has lost a server chooses another leader first
            return None

    status = await until(asked)
    assert status is not None
    return sum(int(getattr(coordinator.stats, name)) for coordinator in status.coordinators)


async def until_ready(mesh: LocalMesh, name: str) -> None:
    pid = mesh.processes[name].pid
    await until_leases(mesh, lambda found: pid in {lease.pid for lease in found.values() if lease.state == "ready"})


def test_a_suspended_shard_is_left_and_comes_back(pairs, undisturbed, run):
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


def test_a_restarted_server_costs_a_pause(pairs, undisturbed, run):
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


def test_shards_and_coordinators_are_replaced_one_after_the_other(model, undisturbed, run):
    """As a rolling upgrade does: SIGTERM, and a new process, under load."""

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


def test_a_drained_shard_moves_its_sessions_and_ends(pairs, undisturbed, run):
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


def test_with_no_replica_left_generations_wait_for_one_to_join(model, undisturbed, run, tmp_path):
    async def disturb(mesh: LocalMesh, folder: Path) -> None:
        command = [sys.executable, "-m", "mesh.cli"]
        pushed = await asyncio.to_thread(
            subprocess.run, [*command, "push", str(model), "--nats", mesh.url], capture_output=True, timeout=120
        )
        assert pushed.returncode == 0, pushed.stderr
        async with load(mesh, undisturbed) as (running, _):
            mesh.processes["shard-2"].kill()
            mesh.processes["shard-2"].wait()
            seen = running.tokens
            join = [*command, "join", "--nats", mesh.url, "--dir", str(folder), "--memory", "4GB", "--quiet"]
            joined = subprocess.Popen(join, stderr=subprocess.PIPE)
            try:
                await running.more(200)
                assert running.tokens > seen
                await running.stop()
            finally:
                joined.kill()
                joined.communicate()

    with LocalMesh(options(model, replicas=1, failover_timeout_s=120.0)) as mesh:
        run(disturb(mesh, tmp_path / "blocks"))


def test_with_no_replica_for_failover_timeout_the_error_says_so(model, run):
    async def disturb(mesh: LocalMesh) -> None:
        async with AsyncMeshClient(mesh.url, model="tiny") as client:
            with pytest.raises(Unavailable, match="some layer range has no shard that is ready, for 2 s"):
                async with client.stream(tokens=[5], max_tokens=200, ignore_eos=True, timeout_s=60) as stream:
                    async for chunk in stream:
                        if chunk.index == 5:
                            mesh.processes["shard-2"].kill()

    with LocalMesh(options(model, replicas=1, failover_timeout_s=2.0)) as mesh:
        run(disturb(mesh))


def test_one_server_of_three_is_killed(model, undisturbed, run, tmp_path):
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


def test_a_shard_of_another_model_of_that_name_is_refused_and_it_is_said(pairs, run, tmp_path):
    """As when a model was imported anew on some machines alone."""
    other = tmp_path / "tiny"
    import_model(FIXTURES / "qwen2-dynamo.onnx", other, ImportOptions(), name="tiny")

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


def test_a_shard_that_speaks_another_frame_version_is_refused_and_it_is_said(pairs, run):
    """As in the middle of an upgrade: its lease is what a later version would write."""

    async def disturb() -> None:
        async with await Bus.connect(BusOptions(urls=(pairs.url,)), name="operator") as bus:
            told: asyncio.Queue[Received] = asyncio.Queue()
            await bus.subscribe(topics.EVENTS.at("rejected"), told.put)
            await bus.flush()
            leases = Bucket(bus, subjects.KV_SHARDS, ttl_s=subjects.LEASE_TTL_S)
            lease = ShardLease.parse((await leases.entries())[0].value or b"")
            later = lease.model_copy(update={"shard": "later", "instance": "later", "frame_version": lease.frame_version + 1})
            await leases.put("later", later.to_bytes())
            event = Event.parse((await asyncio.wait_for(told.get(), 60)).data)
            assert event.who == "later" and f"frame version {lease.frame_version + 1}" in event.detail
            async with AsyncMeshClient(pairs.url, model="tiny") as client:
                assert len((await client.generate(tokens=[5], max_tokens=5, ignore_eos=True)).tokens) == 5

    run(disturb())
