"""A process whose network brings it nothing any more while what it sends arrives: the others go on without it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from one_way import Line
from running import Run
from serving import COMPILED, CONTEXT, LONG, PROMPT, connect, coordinator, shards, unique, until_ready

from mesh.bus import Bus, BusOptions, Received
from mesh.client import AsyncMeshClient
from mesh.local.nats_server import NatsServer
from mesh.protocol import topics
from mesh.protocol.generation import Generate
from mesh.shard.service import Shard, ShardOptions
from mesh.types import LayerRange, even_ranges

STEP_S = 0.05
GAP_S = 4.0
"""From the cut to the next token: SILENT_S, a takeover, and what a busy machine adds."""


def slowed(shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    """A generation is to last until it has been disturbed."""
    assert shard.stage is not None
    decode: Callable[..., Any] = shard.stage.decode

    def slow(*arguments: Any) -> Any:
        time.sleep(STEP_S)  # the pace of the tokens
        return decode(*arguments)

    monkeypatch.setattr(shard.stage, "decode", slow)


def test_a_connection_that_brings_nothing_is_closed(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with Line.to(server.port) as line, await Bus.connect(BusOptions((line.url,)), name="deaf") as bus:
            lost, back = asyncio.Event(), asyncio.Event()
            bus.on_change(lambda connected: (back if connected else lost).set())
            line.deaf = True
            await asyncio.wait_for(lost.wait(), GAP_S)
            line.deaf = False
            await asyncio.wait_for(back.wait(), 20)

    run(work())


def test_the_sessions_of_a_coordinator_that_hears_nothing_are_taken_over(
    run: Run, server: NatsServer, model: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with (
            Line.to(server.port) as line,
            await connect(server) as bus,
            shards(server.url, model, even_ranges(3, 1)) as (shard,),
            coordinator(line.url, model, idle=False, health_check_interval_s=0.5) as deaf,
            coordinator(server.url, model, health_check_interval_s=0.5) as other,
            AsyncMeshClient(server.url, model="tiny") as client,
        ):
            await client.generate(**LONG)
            slowed(shard, monkeypatch)
            answers: asyncio.Queue[Received] = asyncio.Queue()
            inbox = bus.new_inbox()
            await bus.subscribe(inbox, answers.put)
            request = Generate(tokens=tuple(PROMPT), max_tokens=LONG["max_tokens"], ignore_eos=True, temperature=0.0, stream=True)
            await bus.send(topics.GENERATE_AT.at("tiny", deaf.continuity.instance), request, reply=inbox)
            tokens: dict[int, int] = {}
            epoch, cut_at, gap_s = 0, 0.0, 0.0
            while True:
                received = await asyncio.wait_for(answers.get(), 60)
                document = orjson.loads(received.data)
                if document["epoch"] < epoch:
                    continue
                epoch = document["epoch"]
                if "index" in document:
                    if cut_at and not gap_s and document["index"] not in tokens:
                        gap_s = time.monotonic() - cut_at
                    tokens[document["index"]] = document["token"]
                if document["done"]:
                    break
                if len(tokens) == 10 and not cut_at:
                    line.deaf = True
                    cut_at = time.monotonic()
            assert [tokens[index] for index in range(len(expected))] == expected
            assert other.continuity.resumed == 1
            assert gap_s < GAP_S
            line.deaf = False

    run(work())


def test_sessions_leave_a_shard_that_hears_nothing_and_none_comes_to_it(
    run: Run, server: NatsServer, model: Path, expected: list[int]
) -> None:
    async def work() -> None:
        async with (
            Line.to(server.port) as line,
            await Bus.connect(BusOptions((line.url,)), name="mesh-shard") as bus,
            shards(server.url, model, [LayerRange(0, 3)]),
            coordinator(server.url, model) as serving,
            AsyncMeshClient(server.url, model="tiny") as client,
        ):
            options = ShardOptions(
                name=unique("s"), directory=model, layers=LayerRange(0, 3), rows=4, context=CONTEXT, chunk=16, warm_up=False
            )
            shard = Shard(bus, options, compiled=COMPILED)
            task = asyncio.create_task(shard.run())
            await until_ready(shard.ready, task)
            await asyncio.gather(*(client.generate(**LONG) for _ in range(6)))
            line.deaf = True
            last, longest, until_s = time.monotonic(), 0.0, time.monotonic() + 8.0
            while time.monotonic() < until_s:
                answer = await client.generate(**LONG, temperature=0.0)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
                assert list(answer.tokens) == expected
            assert longest < GAP_S
            assert serving.core.counters.failed == 0
            line.deaf = False
            shard.stop()
            await task

    run(work())
