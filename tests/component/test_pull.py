"""Models on their way from the object store: broken off and resumed, shared by pulls of one host, bounded in rate, loaded meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import os
import resource
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from clusters import cluster, leader_of
from running import Run
from serving import CONTEXT, connect, until_ready
from waiting import until

from mesh.bus import Bus, BusOptions, ModelStore, Pull, files_of, pulling
from mesh.bus.chunks import StoredObject
from mesh.errors import ConfigError, CorruptModel, MeshError, Unavailable
from mesh.host.known_files import KnownFiles
from mesh.local.nats_server import NatsServer
from mesh.model.manifest import FileInfo, Manifest
from mesh.protocol import subjects
from mesh.shard.service import Shard, ShardOptions
from mesh.types import LayerRange, Progress, no_progress

pytestmark = pytest.mark.usefixtures("elsewhere")

MB = 1_000_000
STREAM = f"OBJ_{subjects.OBJECTS_MODELS}"


@pytest.fixture(scope="module")
def large(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with 12 MB of noise in the place of one layer's weights: 23 chunks, and no shard could run it."""
    folder = tmp_path_factory.mktemp("large") / "large"
    shutil.copytree(model, folder)
    manifest = Manifest.load(folder)
    name = "layer_001.onnx.data"
    noise = os.urandom(12 * MB)
    (folder / name).write_bytes(noise)
    info = FileInfo(name=name, bytes=len(noise), sha256=hashlib.sha256(noise).hexdigest())

    def with_noise(files: tuple[FileInfo, ...]) -> tuple[FileInfo, ...]:
        return tuple(info if file.name == name else file for file in files)

    blocks = tuple(block.model_copy(update={"files": with_noise(block.files)}) for block in manifest.blocks)
    manifest.model_copy(update={"name": "large", "blocks": blocks}).save(folder)
    return folder


@pytest.fixture
def own() -> Iterator[NatsServer]:
    """A server that this test may kill."""
    with NatsServer.start() as server:
        yield server


@dataclass(frozen=True)
class Pushed:
    """A connection, and a model that is in the object store there."""

    bus: Bus
    store: ModelStore
    manifest: Manifest

    @property
    def files(self) -> list[FileInfo]:
        return files_of(self.manifest)

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def largest(self) -> FileInfo:
        return max(self.files, key=lambda file: file.bytes)

    def pulling(self, directory: Path, **options: Any) -> Pull:
        """A pull of all files."""
        return self.store.pulling(self.manifest, self.files, directory, **options)


@asynccontextmanager
async def pushed(server: NatsServer, model: Path) -> AsyncIterator[Pushed]:
    async with await connect(server) as bus:
        store = ModelStore(bus)
        yield Pushed(bus, store, await store.push(model))


def part_of(directory: Path, file: FileInfo) -> Path:
    (part,) = directory.glob(f".{file.name}.*.part")
    return part


def check_whole(manifest: Manifest, directory: Path) -> None:
    manifest.verify_all(directory)
    assert Manifest.load(directory) == manifest
    assert not list(directory.glob(".*"))


def watched(at_bytes: int) -> tuple[asyncio.Event, Progress]:
    """An event, and the `progress` of a pull that sets it once `at_bytes` are there."""
    reached = asyncio.Event()

    def note(name: str, done: int, total: int) -> None:
        if done >= at_bytes:
            reached.set()

    return reached, note


async def break_off(model: Pushed, directory: Path, at_bytes: int) -> Path:
    """Begin to pull the largest file, and end that once `at_bytes` are there. Returns the part that is left."""
    reached, note = watched(at_bytes)
    pull = model.store.pulling(model.manifest, [model.largest], directory, progress=note, bytes_per_s=20 * MB)
    pull.start()
    await asyncio.wait_for(reached.wait(), 60)
    await pull.stop()
    assert not (directory / model.largest.name).exists()
    return part_of(directory, model.largest)


def test_a_pull_that_was_broken_off_goes_on_where_it_ended(run: Run, server: NatsServer, large: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with pushed(server, large) as there:
            kept = (await break_off(there, tmp_path, 4 * MB)).stat().st_size
            assert 4 * MB <= kept < 12 * MB
            pull = there.pulling(tmp_path)
            await pull.run()
            check_whole(there.manifest, tmp_path)
            assert there.bytes - kept <= pull.fetched_bytes < there.bytes - kept + 512 * 1024  # a chunk that was there in part came again

    run(work())


def test_a_part_that_was_damaged_meanwhile_is_fetched_again(run: Run, server: NatsServer, large: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with pushed(server, large) as there:
            part = await break_off(there, tmp_path, 4 * MB)
            part.write_bytes(b"\0" * part.stat().st_size)
            await there.store.pull("large", tmp_path)
            check_whole(there.manifest, tmp_path)

    run(work())


def test_a_part_is_continued_where_chunks_of_two_files_alternate_in_the_stream(
    run: Run, own: NatsServer, large: Path, tmp_path: Path
) -> None:
    """Two objects that were pushed at once: the place of a chunk in the stream says nothing about its number."""

    async def work() -> None:
        async with await connect(own) as bus, await connect(own) as other:
            store = ModelStore(bus)
            noise = tmp_path / "noise"
            noise.write_bytes(os.urandom(12 * MB))
            objects = await bus.client.jetstream().create_object_store(subjects.OBJECTS_MODELS)
            again = await other.client.jetstream().object_store(subjects.OBJECTS_MODELS)

            async def beside() -> None:
                with noise.open("rb") as file:
                    await again.put("noise", file)

            manifest, _ = await asyncio.gather(store.push(large), beside())
            assert await objects.get_info("noise")
            into = tmp_path / "into"
            await break_off(Pushed(bus, store, manifest), into, 6 * MB)
            await store.pull("large", into)
            check_whole(manifest, into)

    run(work())


@pytest.mark.parametrize("killed", ["server", "connection"])
def test_a_pull_survives_the_loss_of_its(run: Run, own: NatsServer, large: Path, tmp_path: Path, killed: str) -> None:
    async def work() -> None:
        async with pushed(own, large) as there:
            reached, note = watched(4 * MB)
            running = asyncio.create_task(there.pulling(tmp_path, progress=note, bytes_per_s=8 * MB).run())
            await asyncio.wait_for(reached.wait(), 60)
            assert not running.done()
            if killed == "server":
                own.kill()
                own.revive()
            else:
                assert there.bus.client._transport is not None
                there.bus.client._transport.close()
            await running
            check_whole(there.manifest, tmp_path)

    run(work())


def test_chunks_that_the_store_has_lost_are_named_and_pushed_again(run: Run, own: NatsServer, large: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with pushed(own, large) as there:
            js = there.bus.client.jetstream()
            info = await (await js.object_store(subjects.OBJECTS_MODELS)).get_info(f"sha256.{there.largest.sha256}")
            await js.purge_stream(STREAM, subject=f"$O.{subjects.OBJECTS_MODELS}.C.{info.nuid}", keep=20)
            with pytest.raises(CorruptModel, match=r"3 of its 23 chunks are not in the object store: push the model again"):
                await there.store.pull("large", tmp_path)
            await there.store.push(large)
            await there.store.pull("large", tmp_path)
            check_whole(there.manifest, tmp_path)

    run(work())


def test_pulls_of_one_host_fetch_each_file_once(run: Run, server: NatsServer, large: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with pushed(server, large) as there:
            pulls = [there.pulling(tmp_path / str(number % 3)) for number in range(5)]
            await asyncio.gather(*(pull.run() for pull in pulls))
            assert sum(pull.fetched_bytes for pull in pulls) == there.bytes
            for number in range(3):
                check_whole(there.manifest, tmp_path / str(number))
            later = there.pulling(tmp_path / "later")
            await later.run()
            assert later.fetched_bytes == 0
            check_whole(there.manifest, tmp_path / "later")

    run(work())


def test_pulls_into_one_directory_agree_without_a_cache_folder(run: Run, server: NatsServer, large: Path, tmp_path: Path) -> None:
    """As two users of one machine, who know nothing of each other's files."""

    async def work() -> None:
        async with pushed(server, large) as there:
            (tmp_path / "file").write_bytes(b"")
            known = KnownFiles(tmp_path / "file" / "no folder")
            pulls = [Pull(there.bus, there.store._find, there.manifest, there.files, tmp_path / "in", known) for _ in range(3)]
            await asyncio.gather(*(pull.run() for pull in pulls))
            assert sum(pull.fetched_bytes for pull in pulls) == there.bytes
            check_whole(there.manifest, tmp_path / "in")

    run(work())


def test_a_file_of_a_neighbour_that_has_changed_is_fetched(run: Run, server: NatsServer, large: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with pushed(server, large) as there:
            await there.store.pull("large", tmp_path / "first")
            file = there.largest
            (tmp_path / "first" / file.name).write_bytes(b"\0" * file.bytes)
            (tmp_path / "first" / "head.onnx").unlink()
            pull = there.pulling(tmp_path / "second")
            await pull.run()
            assert pull.fetched_bytes == file.bytes + next(each.bytes for each in there.files if each.name == "head.onnx")
            check_whole(there.manifest, tmp_path / "second")

    run(work())


def test_a_neighbour_that_stands_still_is_not_waited_for(
    run: Run, server: NatsServer, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "_STALLED_S", 0.2)

    async def work() -> None:
        async with pushed(server, large) as there:
            known = KnownFiles(Path(os.environ["MESH_CACHE_DIR"]) / "files")
            claim = known.claim(there.largest.sha256, tmp_path / "never")
            assert claim is not None
            await there.store.pull("large", tmp_path / "in")
            claim.release()
            check_whole(there.manifest, tmp_path / "in")

    run(work())


def test_a_rate_is_kept(run: Run, server: NatsServer, large: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with pushed(server, large) as there:
            began = time.perf_counter()
            await there.store.pull("large", tmp_path, bytes_per_s=10 * MB)
            assert time.perf_counter() - began > 1.0  # 12 MB, the first of which come at once
            check_whole(there.manifest, tmp_path)

    run(work())


@pytest.mark.parametrize("choose", [min, max], ids=["small", "large"])
def test_a_directory_without_room_is_named(
    run: Run, server: NatsServer, large: Path, tmp_path: Path, elsewhere: None, choose: Callable[..., FileInfo]
) -> None:
    """Files of this process may have no more than 100 bytes meanwhile, which the system says as it says that a disk is full."""

    async def work() -> None:
        async with await connect(server) as bus:
            store = ModelStore(bus)
            manifest = await store.push(large)
            file = choose((file for file in files_of(manifest) if file.bytes > 100), key=lambda file: file.bytes)
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
            try:
                with pytest.raises(ConfigError, match=r"\.part cannot be written \(File too large\): make room, or give another directory"):
                    await store.pulling(manifest, [file], tmp_path).run()
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            await store.pull("large", tmp_path)
            check_whole(manifest, tmp_path)

    run(work())


def test_a_pull_ends_where_nothing_comes(
    run: Run, server: NatsServer, large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "PATIENCE_S", 0.5)

    async def work() -> None:
        async with pushed(server, large) as there:

            async def find(file: FileInfo) -> StoredObject:
                raise Unavailable("no server")

            pull = Pull(there.bus, find, there.manifest, there.files, tmp_path, KnownFiles(tmp_path / "known"))
            with pytest.raises(Unavailable, match="pull again, it goes on where this ended"):
                await pull.run()
            with pytest.raises(Unavailable):
                await asyncio.to_thread(pull.arrivals.wait, ["embed.onnx"])

    run(work())


async def has_jetstream(bus: Bus) -> bool:
    try:
        await bus.ask("$JS.API.INFO", b"", timeout_s=1.0)
    except MeshError:
        return False
    return True


@pytest.mark.slow
def test_a_pull_goes_on_when_the_server_of_a_cluster_that_leads_is_killed(run: Run, large: Path, tmp_path: Path) -> None:
    async def work(servers: list[NatsServer]) -> None:
        options = BusOptions(tuple(server.url for server in servers))
        async with await Bus.connect(options, name="pull", timeout_s=60) as bus:
            store = ModelStore(bus)
            await until(lambda: has_jetstream(bus), because="the servers elect a leader first, and say so only to those who ask")
            manifest = await store.push(large)
            reached, note = watched(4 * MB)
            running = asyncio.create_task(store.pull("large", tmp_path / "in", progress=note, bytes_per_s=8 * MB))
            await asyncio.wait_for(reached.wait(), 60)
            (await leader_of(bus, STREAM, servers)).kill()
            await running
            check_whole(manifest, tmp_path / "in")

    with cluster(tmp_path / "servers") as servers:
        run(work(servers))


def gated(model: Pushed, directory: Path, gate: asyncio.Event) -> tuple[Pull, str]:
    """A pull whose last file is found only once the gate is open, and the name of that file."""
    last = model.manifest.block("head").files[-1].name

    async def find(file: FileInfo) -> StoredObject:
        if file.name == last:
            await gate.wait()
        return await model.store._find(file)

    return Pull(model.bus, find, model.manifest, model.files, directory, KnownFiles(directory.with_name("known"))), last


def shard(model: Pushed, name: str, pull: Pull, progress: Progress = no_progress) -> Shard:
    """A shard of all layers, which come meanwhile."""
    layers = LayerRange(0, model.manifest.layers)
    options = ShardOptions(name, pull.directory, layers, rows=2, context=CONTEXT, chunk=16, warm_up=False, incoming=pull)
    return Shard(model.bus, options, progress=progress)


def test_a_shard_loads_the_first_layers_while_the_last_ones_come(run: Run, server: NatsServer, model: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with pushed(server, model) as there:
            gate, loop = asyncio.Event(), asyncio.get_running_loop()
            pull, last = gated(there, tmp_path / "in", gate)

            def loading(what: str, done: int, total: int) -> None:
                if what == "load layer_002":  # so the blocks before it are loaded, and the last file has not come
                    assert not (tmp_path / "in" / last).exists()
                    loop.call_soon_threadsafe(gate.set)

            early = shard(there, "early", pull, loading)
            task = asyncio.create_task(early.run())
            try:
                await until_ready(early.ready, task)
                assert gate.is_set()
            finally:
                early.stop()
                await task
            check_whole(there.manifest, tmp_path / "in")

    run(work())


def test_a_shard_that_is_stopped_while_it_waits_for_blocks_ends_at_once(run: Run, server: NatsServer, model: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with pushed(server, model) as there:
            waits, loop = asyncio.Event(), asyncio.get_running_loop()
            pull, _ = gated(there, tmp_path / "in", asyncio.Event())

            def loading(what: str, done: int, total: int) -> None:
                if what == "load head":
                    loop.call_soon_threadsafe(waits.set)

            stopped = shard(there, "stopped", pull, loading)
            task = asyncio.create_task(stopped.run())
            await asyncio.wait_for(waits.wait(), 60)
            stopped.stop()
            await asyncio.wait_for(task, 4)
            assert not stopped.computing

    run(work())


def test_a_shard_reports_why_its_blocks_do_not_come(run: Run, own: NatsServer, large: Path, tmp_path: Path) -> None:
    async def work() -> None:
        async with pushed(own, large) as there:
            objects = await there.bus.client.jetstream().object_store(subjects.OBJECTS_MODELS)
            await objects.delete(f"sha256.{there.largest.sha256}")
            lacking = shard(there, "lacking", there.pulling(tmp_path / "in"))
            with pytest.raises(CorruptModel, match=r"layer_001\.onnx\.data is not in the object store: push the model again"):
                await lacking.run()

    run(work())
