"""Backups of JetStream: written from one real server, brought back to another one that has nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from clusters import cluster
from running import Run
from serving import connect, unique
from waiting import until

from mesh.bus import Bucket, Bus, BusOptions, EventLog, ModelStore, announce
from mesh.bus.backup import restore_streams, save_streams
from mesh.errors import BadRequest, ConfigError
from mesh.local.nats_server import NatsServer
from mesh.protocol.subjects import KV_PLACEMENT, STREAM_EVENTS


async def _fill(bus: Bus, name: str, count: int) -> int:
    """The revision of the last value."""
    bucket = Bucket(bus, name, durable=True)
    for index in range(count):
        await bucket.put(f"key-{index}", bytes([index % 256]) * 5000)
    return await bucket.put("key-0", b"the second value")


async def _happened(bus: Bus, who: str) -> None:
    await EventLog(bus).open()
    await announce(bus, "left", who)
    await bus.flush()


async def _who(bus: Bus) -> list[str]:
    return [event.who async for event in EventLog(bus).events(last=10)]


async def _values(bus: Bus, name: str) -> dict[str, tuple[int, bytes | None]]:
    return {entry.key: (entry.revision, entry.value) for entry in await Bucket(bus, name, durable=True).entries()}


def test_what_was_saved_comes_back_to_a_server_that_has_nothing(run: Run, model: Path, tmp_path: Path) -> None:
    name = unique("kept")

    async def work(first: NatsServer, second: NatsServer) -> None:
        async with await connect(first) as bus:
            await _fill(bus, name, 300)
            await Bucket(bus, KV_PLACEMENT, durable=True).put("shard-1", b"0-10")
            await _happened(bus, "before")
            await ModelStore(bus).push(model)
            before = await _values(bus, name)
            saved = await save_streams(bus, tmp_path / "backup")
            assert {"KV_mesh_placement", f"KV_{name}", "OBJ_mesh_models"} <= {stream.name for stream in saved.streams}
            with pytest.raises(ConfigError, match="already"):
                await save_streams(bus, tmp_path / "backup")
        async with await connect(second) as bus:
            await Bucket(bus, KV_PLACEMENT, durable=True).entries()  # a process has made it anew meanwhile, and it is empty
            await _happened(bus, "meanwhile")
            assert STREAM_EVENTS not in await restore_streams(bus, tmp_path / "backup")
            assert await _who(bus) == ["meanwhile"]
            assert await _values(bus, name) == before  # revisions as well, which compare and set goes by
            assert await Bucket(bus, name, durable=True).put("key-1", b"new") == 302
            (there,) = await ModelStore(bus).names()
            await ModelStore(bus).pull(there, tmp_path / "pulled")  # which compares every file with its checksum
            with pytest.raises(BadRequest, match=f"KV_{name} .*--replace"):
                await restore_streams(bus, tmp_path / "backup")
            assert STREAM_EVENTS in await restore_streams(bus, tmp_path / "backup", replace=True)
            assert await _values(bus, name) == before
            assert await _who(bus) == ["before"]

    with NatsServer.start() as first, NatsServer.start() as second:
        run(work(first, second))


def test_a_damaged_backup_changes_nothing(run: Run, server: NatsServer, tmp_path: Path) -> None:
    name = unique("damaged")

    async def work() -> None:
        async with await connect(server) as bus:
            await _fill(bus, name, 3)
            before = await _values(bus, name)
            await save_streams(bus, tmp_path / "backup", models=False)
            file = tmp_path / "backup" / f"KV_{name}.snapshot"
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
            with pytest.raises(ConfigError, match="changed or damaged"):
                await restore_streams(bus, tmp_path / "backup", replace=True)
            assert await _values(bus, name) == before
            file.unlink()
            with pytest.raises(ConfigError, match="not complete"):
                await restore_streams(bus, tmp_path / "backup", replace=True)
            with pytest.raises(ConfigError, match="mesh nats backup"):
                await restore_streams(bus, tmp_path / "nothing")
            await bus.client.jetstream().delete_stream(f"KV_{name}")

    run(work())


def test_a_cluster_of_three_gets_its_streams_back_on_all_three(run: Run, tmp_path: Path) -> None:
    name = unique("cluster")

    async def work(urls: tuple[str, ...]) -> None:
        async with await Bus.connect(BusOptions(urls=urls), name="backup") as bus:
            last = await until(lambda: _made(bus, name), because="a cluster tells nobody when it has a leader")
            before = await until(lambda: _values_up_to(bus, name, last), because="a server that answers reads may lack the last value")
            await save_streams(bus, tmp_path / "backup")
            await bus.client.jetstream().delete_stream(f"KV_{name}")
            await restore_streams(bus, tmp_path / "backup")
            assert await _values(bus, name) == before
            info = await bus.client.jetstream().stream_info(f"KV_{name}")
            assert info.config.num_replicas == 3

    with cluster(tmp_path) as servers:
        run(work(tuple(server.url for server in servers)))


async def _made(bus: Bus, name: str) -> int | None:
    """The revision of the last value, once all is written to three servers."""
    try:
        last = await _fill(bus, name, 20)
    except Exception:
        return None
    info = await bus.client.jetstream().stream_info(f"KV_{name}")
    return last if info.config.num_replicas == 3 else None


async def _values_up_to(bus: Bus, name: str, last: int) -> dict[str, tuple[int, bytes | None]] | None:
    values = await _values(bus, name)
    return values if values.get("key-0", (0, None))[0] == last else None
