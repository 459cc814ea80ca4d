"""A shard serves another range of the layers it holds; a neighbour's range is taken over without loading."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from driver import Driver
from running import Run
from serving import CONTEXT, shards
from waiting import leases

from mesh.bus import Bus, BusOptions
from mesh.errors import BadRequest, Unavailable
from mesh.local.nats_server import NatsServer
from mesh.protocol import topics
from mesh.protocol.control import Load, Loaded, Open
from mesh.protocol.status import ShardLease
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams
from mesh.shard.service import Shard
from mesh.types import LayerRange

PROMPT = [5, 17, 33, 60, 2, 41]


@pytest.fixture(scope="module")
def tokens(model: Path) -> list[int]:
    return Pipeline.load(model, context=CONTEXT, chunk=16).complete(PROMPT, SamplingParams(temperature=0.0), max_tokens=10).ids


async def load(driver: Driver, shard: Shard, start: int, stop: int, timeout_s: float = 30.0) -> Loaded:
    message = Load(layers_start=start, layers_end=stop, timeout_s=timeout_s, force=True)
    return await driver.bus.request(topics.LOAD.at(shard.options.name), message, timeout_s=60)


async def lease_of(driver: Driver, shard: Shard, state: str, layers: LayerRange) -> ShardLease:
    """Its lease, once it says so."""
    name = shard.options.name

    def says(found: Mapping[str, ShardLease]) -> bool:
        return name in found and (found[name].state, found[name].layers) == (state, layers)

    return (await leases(driver.bus, says))[name]


def test_a_boundary_moves_and_a_neighbours_range_is_taken_over(
    run: Run, server: NatsServer, model: Path, tokens: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        ranges = [LayerRange(0, 1), LayerRange(1, 3)]
        async with shards(server.url, model, ranges, overlap=1, warm_up=True) as running:
            low, high = running
            async with Driver.on(server.url, model, running) as driver:
                assert await driver.generate(1, PROMPT, 10) == tokens
                await driver.close(1)
            before = high.instance
            monkeypatch.setattr("mesh.runtime.loading.load_block", _refuse)
            async with Driver.on(server.url, model, running) as driver:
                assert (await load(driver, high, 2, 3)).sessions == 0
                assert (await load(driver, low, 0, 2)).layers_end == 2
                assert high.instance != before
                assert (await lease_of(driver, high, "ready", LayerRange(2, 3))).instance == high.instance
            async with Driver.on(server.url, model, running) as driver:  # with the ranges of now
                assert await driver.generate(2, PROMPT, 10) == tokens
                await driver.close(2)
                low.stop()  # its range is high's from now on: high holds the embedding too
                assert (await load(driver, high, 0, 3)).shard == high.options.name
            async with Driver.on(server.url, model, [high]) as driver:
                assert await driver.generate(3, PROMPT, 10) == tokens

    run(work())


def _refuse(*arguments: Any, **more: Any) -> None:
    raise AssertionError("nothing is loaded")


def test_sessions_may_end_first_and_no_new_ones_begin(run: Run, server: NatsServer, model: Path, tokens: list[int]) -> None:
    async def work() -> None:
        async with (
            shards(server.url, model, [LayerRange(0, 2), LayerRange(2, 3)], overlap=1) as running,
            Driver.on(server.url, model, running) as driver,
        ):
            await driver.open(1, len(PROMPT))
            moving = asyncio.create_task(load(driver, running[1], 1, 3))
            await lease_of(driver, running[1], "draining", LayerRange(2, 3))
            message = Open(session=2, epoch=1, coordinator=driver.name, model_hash=driver.manifest.model_hash, prompt_length=3)
            with pytest.raises(Unavailable):
                await driver.bus.request(topics.OPEN.at(running[1].options.name), message, timeout_s=10)
            with pytest.raises(Unavailable, match=r"already|draining"):
                await load(driver, running[1], 2, 3)
            assert not moving.done()
            assert (await driver.prefill(1, PROMPT)).tokens[0] == tokens[0]  # it goes on meanwhile
            await driver.close(1)
            assert (await moving).sessions == 0
            await driver.close(1)

    run(work())


def test_after_the_deadline_sessions_are_dropped_and_layers_not_held_are_refused(run: Run, server: NatsServer, model: Path) -> None:
    async def work() -> None:
        async with (
            shards(server.url, model, [LayerRange(0, 2), LayerRange(2, 3)], overlap=1) as running,
            Driver.on(server.url, model, running) as driver,
        ):
            with pytest.raises(BadRequest, match="holds layers 1-3, which are not all of 0-3"):
                await load(driver, running[1], 0, 3)
            await driver.open(1, len(PROMPT))
            assert (await load(driver, running[1], 1, 3, timeout_s=0.1)).sessions == 1
            assert running[1].state.sessions == 0 and running[1].state.free_rows == running[1].state.shape.rows
            await driver.close(1)

    run(work())


def test_a_shard_without_a_cache_gives_the_same_tokens(run: Run, server: NatsServer, model: Path, tokens: list[int]) -> None:
    async def work() -> None:
        async with (
            shards(server.url, model, [LayerRange(0, 2), LayerRange(2, 3)], kv_cache=False) as running,
            Driver.on(server.url, model, running) as driver,
        ):
            assert await driver.generate(1, PROMPT, 10) == tokens

    async def connected() -> None:
        async with await Bus.connect(BusOptions((server.url,)), name="t"):
            await work()

    run(connected())
