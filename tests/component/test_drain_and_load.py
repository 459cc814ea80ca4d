"""`mesh drain` and `mesh load` do not leave layers without a shard unless they are told to, and the command that they advise works."""

from __future__ import annotations

import asyncio
import re
import shlex
import sys
from asyncio.subprocess import PIPE, STDOUT
from pathlib import Path

from running import Run
from serving import connect, shards
from waiting import leases

from mesh.bus import ModelStore
from mesh.local.nats_server import NatsServer
from mesh.types import LayerRange, even_ranges


async def mesh(*arguments: str) -> tuple[int, str]:
    """(exit code, output) of a command."""
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "mesh.cli", *arguments, stdout=PIPE, stderr=STDOUT)
    said, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, " ".join(said.decode().split())


def test_the_only_shard_of_its_layers_is_drained_only_when_forced(run: Run, tmp_path: Path, model: Path) -> None:
    async def work(server: NatsServer) -> None:
        async with await connect(server) as bus, shards(server.url, model, even_ranges(3, 2)) as (first, second):
            name, layers = first.options.name, str(first.state.shape.layers)
            code, said = await mesh("drain", name, "--nats", server.url)
            assert code != 0 and f"layers {layers} would be without a shard" in said and "mesh push MODEL_DIR" in said and "--force" in said
            assert first.status == "ready"
            await ModelStore(bus).push(model)
            code, said = await mesh("drain", name, "--nats", server.url)
            assert code != 0 and "mesh push" not in said
            advised = re.search(r"`(mesh join [^`]*)`", said)
            assert advised is not None, said
            command = [sys.executable, "-m", "mesh.cli", *shlex.split(advised[1])[1:], "--name", "joined", "--dir", str(tmp_path / "kept")]
            joined = await asyncio.create_subprocess_exec(*command, "--quiet", stdout=PIPE, stderr=STDOUT)
            try:
                found = await leases(bus, lambda there: "joined" in there and there["joined"].state == "ready")
                assert found["joined"].layers == first.state.shape.layers
                code, said = await mesh("drain", name, "--nats", server.url)
                assert code == 0 and "is draining" in said and "no shard" not in said
            finally:
                joined.kill()
                await joined.wait()
            last = second.options.name
            code, said = await mesh("drain", last, "--nats", server.url, "--force")
            assert code == 0 and f"layers {second.state.shape.layers} have no shard that is ready now" in said

    with NatsServer.start() as server:
        run(work(server))


def test_a_load_that_leaves_a_gap_is_refused_and_the_advised_load_works(run: Run, model: Path) -> None:
    async def work(server: NatsServer) -> None:
        ranges = [LayerRange(0, 2), LayerRange(2, 3), LayerRange(2, 3)]
        async with await connect(server) as bus, shards(server.url, model, ranges, overlap=2) as (first, second, third):
            await leases(bus, lambda there: len(there) == 3 and all(lease.held_end for lease in there.values()))
            name = first.options.name
            code, said = await mesh("load", name, "--layers", "0-3", "--nats", server.url)
            assert code != 0 and "layers 0-2 would be without a shard" in said
            assert first.state.shape.layers == LayerRange(0, 2)
            advised = re.search(r"`(mesh load [^`]*)`", said)
            assert advised is not None and any(shard.options.name in advised[1] for shard in (second, third)), said
            code, said = await mesh(*shlex.split(advised[1])[1:])
            assert code == 0, said
            code, said = await mesh("load", name, "--layers", "0-3", "--nats", server.url)
            assert code == 0 and "no shard" not in said, said
            code, said = await mesh("load", name, "--layers", "0-1", "--nats", server.url, "--force")
            assert code == 0, said

    with NatsServer.start() as server:
        run(work(server))


def test_a_drain_that_was_asked_for_by_a_signal_is_not_refused(run: Run, server: NatsServer, model: Path) -> None:
    async def work() -> None:
        async with shards(server.url, model, even_ranges(3, 1)) as (shard,):
            assert shard.drain() == 0  # what SIGTERM calls
            await asyncio.wait_for(shard._stop.wait(), 10)

    run(work())


def test_a_signal_ends_a_shard_that_drains_and_was_to_stay(run: Run, server: NatsServer, model: Path) -> None:
    async def work() -> None:
        async with shards(server.url, model, even_ranges(3, 1)) as (shard,):
            shard.drain(60, stop=False)  # `mesh drain --keep`
            shard.drain()  # SIGTERM, while it still drains
            await asyncio.wait_for(shard._stop.wait(), 10)

    run(work())
