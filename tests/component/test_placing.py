"""Shards that join a mesh agree on layer ranges, fetch only those, and form a mesh that answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from running import Run

from mesh.bus import Bucket, Bus, BusOptions, ModelStore, Received
from mesh.errors import DoesNotFit, ModelNotFound
from mesh.local.nats_server import NatsServer
from mesh.model.manifest import Manifest
from mesh.model.memory import predict
from mesh.protocol import subjects, topics
from mesh.protocol.events import Event
from mesh.protocol.status import ShardLease
from mesh.shard.placing import place, withdraw
from mesh.types import LayerRange


def test_machines_that_join_at_once_take_different_layers(run: Run, model: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(model)

    def needed(layers: LayerRange) -> int:
        embed, head = layers.start == 0, layers.stop == 3
        return predict(manifest, layers, embed=embed, head=head, rows=2, context=64, chunk=256).total_bytes

    # room for two layers with the embedding, or for the last one with the head, not for three
    memory = max(needed(LayerRange(0, 2)), needed(LayerRange(2, 3)))
    assert memory < needed(LayerRange(0, 3))

    async def work(url: str) -> None:
        async with await Bus.connect(BusOptions((url,)), name="t") as bus:

            async def join(name: str, memory_bytes: int = memory) -> Any:
                options = await place(bus, name, model=None, memory_bytes=memory_bytes, rows=2, context=64, directory=tmp_path / name)
                assert options.incoming is not None
                await options.incoming.run()
                return options

            with pytest.raises(ModelNotFound, match="mesh push"):
                await join("early")
            await ModelStore(bus).push(model)
            with pytest.raises(DoesNotFit):
                await join("small", 1000)
            said: asyncio.Queue[Received] = asyncio.Queue()
            await bus.subscribe(topics.EVENTS.at("plan_changed"), said.put)
            await bus.flush()
            both = await asyncio.gather(join("a"), join("b"))
            changes = [Event.parse((await asyncio.wait_for(said.get(), 60)).data) for _ in both]
            assert {(change.who, change.data["layers"]) for change in changes} == {(o.name, str(o.layers)) for o in both}
            assert len({change.data["epoch"] for change in changes}) == 2
            assert sorted(options.layers for options in both) == [LayerRange(0, 2), LayerRange(2, 3)]
            for options in both:
                embed, head = options.layers.start == 0, options.layers.stop == 3
                manifest.verify_files(options.directory, options.layers, checksums=True, embed=embed, head=head)
                assert (options.directory / "embed.onnx").exists() == embed
            third = await join("c")
            assert third.layers in (LayerRange(0, 2), LayerRange(2, 3))

    with NatsServer.start() as server:
        run(work(server.url))


def test_shards_that_join_on_one_host_share_its_free_memory(run: Run, model: Path, tmp_path: Path) -> None:
    manifest = Manifest.load(model)

    def needed(layers: LayerRange) -> int:
        embed, head = layers.start == 0, layers.stop == 3
        return predict(manifest, layers, embed=embed, head=head, rows=2, context=64, chunk=256).total_bytes

    free = needed(LayerRange(0, 2)) + needed(LayerRange(2, 3)) - 1  # either fits alone; both do not

    async def work(url: str) -> None:
        async with await Bus.connect(BusOptions((url,)), name="t") as bus:
            await ModelStore(bus).push(model)

            async def join(name: str, layers: LayerRange, *, shared: bool) -> Any:
                directory = tmp_path / name
                return await place(
                    bus,
                    name,
                    model=None,
                    memory_bytes=free,
                    shared=shared,
                    rows=2,
                    context=64,
                    directory=directory,
                    layers=layers,
                )

            await join("first", LayerRange(0, 2), shared=True)
            with pytest.raises(DoesNotFit):  # the first has claimed its memory and does not have it yet
                await join("second", LayerRange(2, 3), shared=True)
            assert (await join("third", LayerRange(2, 3), shared=False)).layers == LayerRange(2, 3), "its --memory was given"

    with NatsServer.start() as server:
        run(work(server.url))


def test_a_shard_that_was_killed_is_replaced_before_its_lease_has_run_out(run: Run, model: Path, tmp_path: Path) -> None:
    async def work(url: str) -> None:
        async with await Bus.connect(BusOptions((url,)), name="t") as bus, await Bus.connect(BusOptions((url,)), name="s") as shard:
            await ModelStore(bus).push(model)
            manifest, cut = Manifest.load(model), (LayerRange(0, 2), LayerRange(2, 3))

            async def join(name: str) -> LayerRange:
                directory = tmp_path / name
                return (await place(bus, name, model=None, memory_bytes=1 << 30, rows=2, context=64, directory=directory)).layers

            leases = Bucket(bus, subjects.KV_SHARDS, ttl_s=subjects.LEASE_TTL_S)
            for number, layers in enumerate(cut):
                await leases.put(f"s{number}", a_lease(f"s{number}", manifest, layers).to_bytes())
            listening = await shard.subscribe(topics.STATS.at("s0").subject, AsyncMock())
            await shard.flush()
            assert await join("one") == cut[1], "nobody listens in the place of s1"
            await listening.stop()
            await shard.flush()
            await leases.put("s0", a_lease("s0", manifest, cut[0]).to_bytes())
            assert await join("two") == cut[0], "one has claimed the other range"

    with NatsServer.start() as server:
        run(work(server.url))


def test_a_claim_that_was_taken_back_leaves_the_range_free(run: Run, model: Path, tmp_path: Path) -> None:
    async def work(url: str) -> None:
        async with await Bus.connect(BusOptions((url,)), name="t") as bus:
            await ModelStore(bus).push(model)
            manifest = Manifest.load(model)

            async def join(name: str, layers: LayerRange | None = None) -> LayerRange:
                directory = tmp_path / name
                options = await place(bus, name, model=None, memory_bytes=1 << 30, rows=2, context=64, directory=directory, layers=layers)
                return options.layers

            first = await join("one", LayerRange(0, 2))
            await join("two", LayerRange(2, 3))
            await withdraw(bus, manifest.name, "one")
            await withdraw(bus, manifest.name, "nobody")
            assert await join("three") == first

    with NatsServer.start() as server:
        run(work(server.url))


def a_lease(name: str, manifest: Manifest, layers: LayerRange) -> ShardLease:
    return ShardLease(
        shard=name,
        instance=f"{name}-1",
        model=manifest.name,
        model_hash=manifest.model_hash,
        layers_start=layers.start,
        layers_end=layers.stop,
        total_layers=manifest.layers,
        state="ready",
        rows=2,
        free_rows=2,
        context=64,
        chunk=16,
        hidden_size=manifest.hidden.size,
        hidden_itemsize=4,
        max_frame_bytes=1 << 20,
        queue_limit=8,
        frame_version=1,
    )
