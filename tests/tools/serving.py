"""Shards and coordinators that run in the event loop of the test."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from waiting import until

from mesh.bus import Bus, BusOptions
from mesh.coordinator.service import Coordinator, CoordinatorOptions
from mesh.local.nats_server import NatsServer
from mesh.runtime.programs import Compiled
from mesh.shard.service import Shard, ShardOptions
from mesh.types import LayerRange

CONTEXT = 64
COMPILED: Compiled = {}  # by every shard of this process, so that each program is made once
PROMPT, LONG_TOKENS = [5, 17, 33], 40
LONG: dict[str, Any] = {"tokens": PROMPT, "max_tokens": LONG_TOKENS, "ignore_eos": True}
"""A request that lasts long enough for something to happen to it."""

_unique = itertools.count(1)


def unique(letter: str) -> str:
    """A name that no other shard or coordinator of this process has."""
    return f"{letter}{next(_unique)}"


async def connect(server: NatsServer) -> Bus:
    """A connection of the test's own."""
    return await Bus.connect(BusOptions((server.url,)), name="test")


async def until_ready(ready: asyncio.Event, task: asyncio.Task[None]) -> None:
    """Until the event is set; raises what ended the task if it ends first."""
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait([waiting, task], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    if task.done():
        task.result()


@asynccontextmanager
async def shards(url: str, model: Path, ranges: Sequence[LayerRange], **options: Any) -> AsyncIterator[list[Shard]]:
    """Running shards, one a range, each with a connection of its own; `check()` at the end."""
    running: list[Shard] = []
    tasks: list[asyncio.Task[None]] = []
    try:
        for layers in ranges:
            name = unique("s")
            bus = await Bus.connect(BusOptions((url,)), name=name)
            settings = {"rows": 4, "context": CONTEXT, "chunk": 16, "warm_up": False, **options}
            running.append(Shard(bus, ShardOptions(name=name, directory=model, layers=layers, **settings), compiled=COMPILED))
            tasks.append(asyncio.create_task(running[-1].run()))
        for shard, task in zip(running, tasks, strict=True):
            await until_ready(shard.ready, task)
        yield running
    finally:
        for shard in running:
            shard.stop()
        await asyncio.gather(*tasks, return_exceptions=True)
        for shard in running:
            shard.state.check()
            await shard.bus.close()


@asynccontextmanager
async def coordinator(url: str, model: Path, *, idle: bool = True, **options: Any) -> AsyncIterator[Coordinator]:
    """A running coordinator. At the end its core is checked and must become idle; `idle=False` where it may leave work behind."""
    async with await Bus.connect(BusOptions(urls=(url,)), name="coordinator") as bus:
        running = Coordinator(bus, CoordinatorOptions(model, **options))
        task = asyncio.create_task(running.run())
        try:
            await until_ready(running.ready, task)
            yield running
            if idle:
                await until(lambda: running.core.idle, because="a shard gives a row back after its client has been told")
            running.core.check()
        finally:
            running.stop()
            await task
