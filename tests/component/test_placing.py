"""Shards that join a mesh agree on layer ranges, fetch only those, and form a mesh that answers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from running import Run

from mesh.bus import Bus, BusOptions, ModelStore, Received
from mesh.errors import DoesNotFit, ModelNotFound
from mesh.local.nats_server import NatsServer
from mesh.model.manifest import Manifest
from mesh.model.memory import predict
from mesh.protocol import topics
from mesh.protocol.events import Event
from mesh.shard.placing import place
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
