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
from pathlib import Path

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
from mesh.types import LayerRange

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


def large_file(manifest: Manifest) -> FileInfo:
    return max(files_of(manifest), key=lambda file: file.bytes)


def part_of(directory: Path, file: FileInfo) -> Path:
    (part,) = directory.glob(f".{file.name}.*.part")
    return part


def check_whole(manifest: Manifest, directory: Path) -> None:
    manifest.verify_all(directory)
    assert Manifest.load(directory) == manifest
    assert not list(directory.glob(".*"))


@asynccontextmanager
async def broken_off(bus: Bus, manifest: Manifest, directory: Path, at_bytes: int) -> AsyncIterator[None]:
    """A pull of `manifest` has been ended once the large file had `at_bytes`."""
    reached = asyncio.Event()
    file = large_file(manifest)

    def note(name: str, done: int, total: int) -> None:
        if name == file.name and done >= at_bytes:
            reached.set()

    pull = ModelStore(bus).pulling(manifest, [file], directory, progress=note, bytes_per_s=20 * MB)
    pull.start()
    await asyncio.wait_for(reached.wait(), 60)
    await pull.stop()
    assert not (directory / file.name).exists()
    yield


def test_a_pull_that_was_broken_off_goes_on_where_it_ended(
    run: Run, server: NatsServer, large: Path, tmp_path: Path, elsewhere: None
) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            store = ModelStore(bus)
            manifest = await store.push(large)
            async with broken_off(bus, manifest, tmp_path, 4 * MB):
                kept = part_of(tmp_path, large_file(manifest)).stat().st_size
            assert 4 * MB <= kept < 12 * MB
            pull = store.pulling(manifest, files_of(manifest), tmp_path)
            await pull.run()
            check_whole(manifest, tmp_path)
            whole = sum(file.bytes for file in files_of(manifest))
            assert whole - kept <= pull.fetched_bytes < whole - kept + 512 * 1024  # a chunk that was there in part came again

    run(work())


def test_a_part_that_was_damaged_meanwhile_is_fetched_again(
    run: Run, server: NatsServer, large: Path, tmp_path: Path, elsewhere: None
) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            store = ModelStore(bus)
            manifest = await store.push(large)
            async with broken_off(bus, manifest, tmp_path, 4 * MB):
                part = part_of(tmp_path, large_file(manifest))
            part.write_bytes(b"\0" * part.stat().st_size)
            await store.pull("large", tmp_path)
            check_whole(manifest, tmp_path)

    run(work())


def test_a_part_is_continued_where_chunks_of_two_files_alternate_in_the_stream(
    run: Run, own: NatsServer, large: Path, tmp_path: Path, elsewhere: None
) -> None:
    """Two objects that were pushed at once: the place of a chunk in the stream says nothing about its number."""

    async def work() -> None:
        async with await connect(own) as bus, await connect(own) as other:
            manifest = Manifest.load(large)
            noise = tmp_path / "noise"
            noise.write_bytes(os.urandom(12 * MB))
            await ModelStore(bus).names()
            objects = await bus.client.jetstream().create_object_store(subjects.OBJECTS_MODELS)
            again = await other.client.jetstream().object_store(subjects.OBJECTS_MODELS)

            async def beside() -> None:
                with noise.open("rb") as file:
                    await again.put("noise", file)

            await asyncio.gather(ModelStore(bus).push(large), beside())
            assert await objects.get_info("noise")
            into = tmp_path / "into"
            async with broken_off(bus, manifest, into, 6 * MB):
                pass
            await ModelStore(bus).pull("large", into)
            check_whole(manifest, into)

    run(work())


@pytest.mark.parametrize("killed", ["server", "connection"])
def test_a_pull_survives_the_loss_of_its(run: Run, own: NatsServer, large: Path, tmp_path: Path, elsewhere: None, killed: str) -> None:
    async def work() -> None:
        async with await connect(own) as bus:
            store = ModelStore(bus)
            manifest = await store.push(large)
            reached = asyncio.Event()

            def note(name: str, done: int, total: int) -> None:
                if done > 4 * MB:
                    reached.set()

            pull = store.pulling(manifest, files_of(manifest), tmp_path, progress=note, bytes_per_s=8 * MB)
            running = asyncio.create_task(pull.run())
            await asyncio.wait_for(reached.wait(), 60)
            assert not running.done()
            if killed == "server":
                own.kill()
                own.revive()
            else:
                assert bus.client._transport is not None
                bus.client._transport.close()
            await running
            check_whole(manifest, tmp_path)

    run(work())


def test_chunks_that_the_store_has_lost_are_named_and_pushed_again(
    run: Run, own: NatsServer, large: Path, tmp_path: Path, elsewhere: None
) -> None:
    async def work() -> None:
        async with await connect(own) as bus:
            store = ModelStore(bus)
            manifest = await store.push(large)
            file = large_file(manifest)
            js = bus.client.jetstream()
            info = await (await js.object_store(subjects.OBJECTS_MODELS)).get_info(f"sha256.{file.sha256}")
            await js.purge_stream(STREAM, subject=f"$O.{subjects.OBJECTS_MODELS}.C.{info.nuid}", keep=20)
            with pytest.raises(CorruptModel, match=r"3 of its 23 chunks are not in the object store: push the model again"):
                await store.pull("large", tmp_path)
            await store.push(large)
            await store.pull("large", tmp_path)
            check_whole(manifest, tmp_path)

    run(work())


def test_pulls_of_one_host_fetch_each_file_once(run: Run, server: NatsServer, large: Path, tmp_path: Path, elsewhere: None) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            store = ModelStore(bus)
            manifest = await store.push(large)
            pulls = [store.pulling(manifest, files_of(manifest), tmp_path / str(number % 3)) for number in range(5)]
            await asyncio.gather(*(pull.run() for pull in pulls))
            whole = sum(file.bytes for file in files_of(manifest))
            assert sum(pull.fetched_bytes for pull in pulls) == whole
            for number in range(3):
                check_whole(manifest, tmp_path / str(number))
            later = store.pulling(manifest, files_of(manifest), tmp_path / "later")
            await later.run()
            assert later.fetched_bytes == 0
            check_whole(manifest, tmp_path / "later")

    run(work())


def test_pulls_into_one_directory_agree_without_a_cache_folder(run: Run, server: NatsServer, large: Path, tmp_path: Path) -> None:
    """As two users of one machine, who know nothing of each other's files."""

    async def work() -> None:
        async with await connect(server) as bus:
            store = ModelStore(bus)
            manifest = await store.push(large)
            (tmp_path / "file").write_bytes(b"")
            known = KnownFiles(tmp_path / "file" / "no folder")
            pulls = [Pull(bus, store._find, manifest, files_of(manifest), tmp_path / "in", known) for _ in range(3)]
            await asyncio.gather(*(pull.run() for pull in pulls))
            assert sum(pull.fetched_bytes for pull in pulls) == sum(file.bytes for file in files_of(manifest))
            check_whole(manifest, tmp_path / "in")

    run(work())


def test_a_file_of_a_neighbour_that_has_changed_is_fetched(
    run: Run, server: NatsServer, large: Path, tmp_path: Path, elsewhere: None
) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            store = ModelStore(bus)
            manifest = await store.push(large)
            await store.pull("large", tmp_path / "first")
            file = large_file(manifest)
            (tmp_path / "first" / file.name).write_bytes(b"\0" * file.bytes)
            (tmp_path / "first" / "head.onnx").unlink()
            pull = store.pulling(manifest, files_of(manifest), tmp_path / "second")
            await pull.run()
            assert pull.fetched_bytes == file.bytes + next(each.bytes for each in files_of(manifest) if each.name == "head.onnx")
            check_whole(manifest, tmp_path / "second")

    run(work())


def test_a_neighbour_that_stands_still_is_not_waited_for(
    run: Run, server: NatsServer, large: Path, tmp_path: Path, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "_STALLED_S", 0.2)

    async def work() -> None:
        async with await connect(server) as bus:
            store = ModelStore(bus)
            manifest = await store.push(large)
            known = KnownFiles(Path(os.environ["MESH_CACHE_DIR"]) / "files")
            claim = known.claim(large_file(manifest).sha256, tmp_path / "never")
            assert claim is not None
            await store.pull("large", tmp_path / "in")
            claim.release()
            check_whole(manifest, tmp_path / "in")

    run(work())


def test_a_rate_is_kept(run: Run, server: NatsServer, large: Path, tmp_path: Path, elsewhere: None) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            store = ModelStore(bus)
            manifest = await store.push(large)
            began = time.perf_counter()
            await store.pull("large", tmp_path, bytes_per_s=10 * MB)
            assert time.perf_counter() - began > 1.0  # 12 MB, the first of which come at once
            check_whole(manifest, tmp_path)

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
    run: Run, server: NatsServer, large: Path, tmp_path: Path, elsewhere: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pulling, "PATIENCE_S", 0.5)

    async def work() -> None:
        async with await connect(server) as bus:
            manifest = await ModelStore(bus).push(large)

            async def find(file: FileInfo) -> StoredObject:
                raise Unavailable("no server")

            pull = Pull(bus, find, manifest, files_of(manifest), tmp_path, KnownFiles(tmp_path / "known"))
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
def test_a_pull_goes_on_when_the_server_of_a_cluster_that_leads_is_killed(run: Run, large: Path, tmp_path: Path, elsewhere: None) -> None:
    async def work(servers: list[NatsServer]) -> None:
        options = BusOptions(tuple(server.url for server in servers))
        async with await Bus.connect(options, name="pull", timeout_s=60) as bus:
            store = ModelStore(bus)
            await until(lambda: has_jetstream(bus), because="the servers elect a leader first, and say so only to those who ask")
            manifest = await store.push(large)
            reached = asyncio.Event()

            def note(name: str, done: int, total: int) -> None:
                if done > 4 * MB:
                    reached.set()

            running = asyncio.create_task(store.pull("large", tmp_path / "in", progress=note, bytes_per_s=8 * MB))
            await asyncio.wait_for(reached.wait(), 60)
            (await leader_of(bus, STREAM, servers)).kill()
            await running
            check_whole(manifest, tmp_path / "in")

    with cluster(tmp_path / "servers") as servers:
        run(work(servers))


def gated(store: ModelStore, name: str, gate: asyncio.Event) -> pulling.FindObject:
    """Finds objects as the store does; that of the file `name` only once the gate is open."""

    async def find(file: FileInfo) -> StoredObject:
        if file.name == name:
            await gate.wait()
        return await store._find(file)

    return find


def test_a_shard_loads_the_first_layers_while_the_last_ones_come(
    run: Run, server: NatsServer, model: Path, tmp_path: Path, elsewhere: None
) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            store = ModelStore(bus)
            manifest = await store.push(model)
            gate, loop = asyncio.Event(), asyncio.get_running_loop()
            layers = LayerRange(0, 3)
            last = manifest.block("head").files[-1].name
            pull = Pull(bus, gated(store, last, gate), manifest, files_of(manifest), tmp_path / "in", KnownFiles(tmp_path / "known"))

            def loading(what: str, done: int, total: int) -> None:
                if what == "load layer_002":  # so the blocks before it are loaded, and the last file has not come
                    assert not (tmp_path / "in" / last).exists()
                    loop.call_soon_threadsafe(gate.set)

            options = ShardOptions("early", tmp_path / "in", layers, rows=2, context=CONTEXT, chunk=16, warm_up=False, incoming=pull)
            shard = Shard(bus, options, progress=loading)
            task = asyncio.create_task(shard.run())
            try:
                await until_ready(shard.ready, task)
                assert gate.is_set()
            finally:
                shard.stop()
                await task
            check_whole(manifest, tmp_path / "in")

    run(work())


def test_a_shard_that_is_stopped_while_it_waits_for_blocks_ends_at_once(
    run: Run, server: NatsServer, model: Path, tmp_path: Path, elsewhere: None
) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            store = ModelStore(bus)
            manifest = await store.push(model)
            waits, loop = asyncio.Event(), asyncio.get_running_loop()
            last = manifest.block("head").files[-1].name
            pull = Pull(
                bus, gated(store, last, asyncio.Event()), manifest, files_of(manifest), tmp_path / "in", KnownFiles(tmp_path / "known")
            )

            def loading(what: str, done: int, total: int) -> None:
                if what == "load head":
                    loop.call_soon_threadsafe(waits.set)

            options = ShardOptions(
                "stopped", tmp_path / "in", LayerRange(0, 3), rows=2, context=CONTEXT, chunk=16, warm_up=False, incoming=pull
            )
            shard = Shard(bus, options, progress=loading)
            task = asyncio.create_task(shard.run())
            await asyncio.wait_for(waits.wait(), 60)
            shard.stop()
            await asyncio.wait_for(task, 4)
            assert not shard.computing

    run(work())


def test_a_shard_reports_why_its_blocks_do_not_come(run: Run, own: NatsServer, large: Path, tmp_path: Path, elsewhere: None) -> None:
    async def work() -> None:
        async with await connect(own) as bus:
            store = ModelStore(bus)
            manifest = await store.push(large)
            objects = await bus.client.jetstream().object_store(subjects.OBJECTS_MODELS)
            await objects.delete(f"sha256.{large_file(manifest).sha256}")
            pull = store.pulling(manifest, files_of(manifest), tmp_path / "in")
            shard = Shard(bus, ShardOptions("lacking", tmp_path / "in", LayerRange(0, 3), context=CONTEXT, warm_up=False, incoming=pull))
            with pytest.raises(CorruptModel, match=r"layer_001\.onnx\.data is not in the object store: push the model again"):
                await shard.run()

    run(work())
