"""Asking a mesh as any client would, and waiting for what its shards say."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from waiting import leases

from mesh.bus import Bus, BusOptions, Received
from mesh.client import AsyncMeshClient
from mesh.local.mesh import LocalMesh
from mesh.protocol.status import ShardLease


async def raw(url: str, subject: str, request: dict[str, Any] | bytes, *, timeout_s: float = 60.0) -> Received:
    """The first message that answers the request, be it a result or an error."""
    data = request if isinstance(request, bytes) else orjson.dumps(request)
    async with await Bus.connect(BusOptions(urls=(url,)), name="raw") as bus:
        answers: asyncio.Queue[Received] = asyncio.Queue()
        inbox = bus.new_inbox()
        await bus.subscribe(inbox, answers.put)
        await bus.publish(subject, data, reply=inbox)
        return await asyncio.wait_for(answers.get(), timeout_s)


async def until_leases(mesh: LocalMesh, hold: Callable[[Mapping[str, ShardLease]], bool]) -> None:
    """Until `hold` is true of the leases of the shards."""
    async with await Bus.connect(mesh.bus, name="watching") as bus:
        await leases(bus, hold)


async def all_rows_free(mesh: LocalMesh) -> None:
    """Until every shard reports that all its rows are free. They are asked again whenever a row is given back."""
    async with AsyncMeshClient(mesh.url) as client, await Bus.connect(BusOptions(urls=(mesh.url,)), name="watching") as bus:
        changed = asyncio.Event()

        async def note(received: Received) -> None:
            changed.set()

        await bus.subscribe("mesh.v1.control.*.close", note)
        await bus.flush()
        while True:
            changed.clear()
            there = {lease.shard for lease in (await client.status()).shards}
            stats = await client.shard_stats()
            if there and there == {shard.shard for shard in stats} and all(shard.free_rows == shard.rows for shard in stats):
                return
            with contextlib.suppress(TimeoutError):  # a shard that was away, or frees rows because a coordinator is, tells nobody
                await asyncio.wait_for(changed.wait(), 0.5)
