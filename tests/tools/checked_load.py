"""Prompts that are generated again and again while something happens to the mesh; every answer is compared with one process's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from waiting import until

from mesh.client import AsyncMeshClient
from mesh.client.results import MeshStatus
from mesh.errors import ServiceError
from mesh.local.mesh import LocalMesh, LocalOptions

CONTEXT, TOKENS = 256, 160
PROMPTS = [[5, 17, 33], [90], [7, 7, 7, 60, 3], list(range(1, 30))]


def options(model: Path, **values: Any) -> LocalOptions:
    return LocalOptions(model=model, **{"shards": 2, "replicas": 2, "rows": 8, "context": CONTEXT, "http": False, **values})


class Load:
    """The prompts, generated again and again until `stop`; every answer is compared."""

    def __init__(self, client: AsyncMeshClient, undisturbed: list[list[int]], prompts: list[list[int]] = PROMPTS) -> None:
        self._client = client
        self._undisturbed = undisturbed
        self._prompts = prompts
        self._over = False
        self._news = asyncio.Event()
        self.tokens = self.finished = 0
        self.tasks = [asyncio.create_task(self._go_on(index)) for index in range(len(prompts))]

    async def _go_on(self, index: int) -> None:
        while not self._over:
            seen: list[int] = []
            async with self._client.stream(tokens=self._prompts[index], max_tokens=TOKENS, temperature=0.0, ignore_eos=True) as stream:
                async for chunk in stream:
                    if chunk.token is not None:
                        assert chunk.index == len(seen)
                        seen.append(chunk.token.id)
                        self.tokens += 1
                        self._news.set()
            assert seen == self._undisturbed[index]
            self.finished += 1

    async def more(self, tokens: int = 40) -> None:
        """Until so many more tokens have come. What went wrong with a session is raised."""
        wanted = self.tokens + tokens
        while self.tokens < wanted:
            self._news.clear()
            waiting = asyncio.create_task(self._news.wait())
            done, _ = await asyncio.wait([waiting, *self.tasks], return_when=asyncio.FIRST_COMPLETED, timeout=120)
            waiting.cancel()
            assert done, "no token for 120 s"
            for task in self.tasks:
                if task.done():
                    task.result()

    async def stop(self) -> None:
        self._over = True
        await asyncio.gather(*self.tasks)


@asynccontextmanager
async def load(
    mesh: LocalMesh, undisturbed: list[list[int]], prompts: list[list[int]] = PROMPTS
) -> AsyncIterator[tuple[Load, AsyncMeshClient]]:
    async with AsyncMeshClient(options=mesh.bus, model="tiny") as client:
        running = Load(client, undisturbed, prompts)
        try:
            await running.more()
            yield running, client
            await running.stop()
        finally:
            for task in running.tasks:
                task.cancel()
            await asyncio.gather(*running.tasks, return_exceptions=True)


async def counted(client: AsyncMeshClient, name: str) -> int:
    async def asked() -> MeshStatus | None:
        try:
            return await client.status()
        except ServiceError:  # a cluster that has lost a server chooses another leader first
            return None

    status = await until(asked, because="a cluster tells nobody when it has a leader again")
    return sum(int(getattr(coordinator.stats, name)) for coordinator in status.coordinators)
