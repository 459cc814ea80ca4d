"""The crash of an idle process is an event: of a shard, of one of two coordinators, and of the only coordinator."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from running import Run

from mesh.client import AsyncMeshClient
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.protocol.events import Event

PATIENCE_S = 60.0


async def event(client: AsyncMeshClient, kind: str, who: str) -> Event:
    """The first one of that kind about `who`."""
    async with asyncio.timeout(PATIENCE_S):
        async for found in client.events(last=100, follow=True):
            if (found.kind, found.who) == (kind, who):
                return found
    raise AssertionError("the events ended")


def test_the_crash_of_an_idle_process_is_an_event(model: Path, run: Run) -> None:
    with LocalMesh(LocalOptions(model=model, shards=2, rows=2, context=64)) as mesh:

        async def crash() -> None:
            async with AsyncMeshClient(options=mesh.bus, model="tiny") as client:
                os.kill(mesh.processes["shard-2"].pid, signal.SIGKILL)
                lost = await event(client, "lost", "shard-2")
                assert lost.model == "tiny" and lost.detail
                mesh.restart("shard-2")
                (only,) = await client.coordinators()
                os.kill(mesh.processes["coordinator-1"].pid, signal.SIGKILL)
                mesh.processes["coordinator-1"].wait()
                mesh.restart("coordinator-1")
                lost = await event(client, "lost", only.name)
                assert lost.detail == "the coordinator ended without leaving"

        run(crash())
