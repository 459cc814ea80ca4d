"""Asking a mesh as any client would, and waiting for what its shards say."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from mesh.bus import Bucket, Bus, BusOptions, LeaseTable, Received
from mesh.local import LocalMesh
from mesh.messages import ShardLease
from mesh.subjects import KV_SHARDS


async def raw(url: str, subject: str, request: dict[str, Any] | bytes, *, timeout_s: float = 60.0) -> Received:
    """The first message that answers, whatever it is."""
    data = request if isinstance(request, bytes) else orjson.dumps(request)
    async with await Bus.connect(BusOptions(urls=(url,)), name="raw") as bus:
        answers: asyncio.Queue[Received] = asyncio.Queue()
        inbox = bus.new_inbox()
        await bus.subscribe(inbox, answers.put)
        await bus.publish(subject, data, reply=inbox)
        return await asyncio.wait_for(answers.get(), timeout_s)


async def all_rows_free(mesh: LocalMesh) -> None:
    """Until every shard's lease says so."""
    async with await Bus.connect(BusOptions(urls=(mesh.url,)), name="watching") as bus:
        changed = asyncio.Event()
        table = LeaseTable(Bucket(bus, KV_SHARDS, ttl_s=5.0), ShardLease, lambda name, lease: changed.set())
        await table.start()
        while not (table.leases and all(lease.free_rows == lease.rows for lease in table.leases.values())):
            changed.clear()
            await changed.wait()
        await table.stop()
