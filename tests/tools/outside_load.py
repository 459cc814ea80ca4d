"""Clients of a mesh on other machines: prompts, generated again and again over NATS until a line comes on standard input.

    outside_load.py EXPECTED.json MODEL      the connection is in MESH_NATS_ variables

EXPECTED.json: [{"tokens": [...], "answer": [...]}]. Each token is compared as it comes. Prints a line `started` when every session has
tokens, and at the end one object: what was generated, lost, repeated or wrong, and each gap between two tokens that was longer than
GAP_S, with the wall clock's time of its begin.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mesh.client import AsyncMeshClient
from mesh.commands.connection import add_connection_arguments, bus_options
from mesh.errors import MeshError

GAP_S = 0.25


@dataclass
class Report:
    generations: int = 0
    tokens: int = 0
    lost: int = 0
    repeated: int = 0
    wrong: int = 0
    failed: list[str] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)  # (begin on the wall clock, seconds)


class Load:
    def __init__(self, client: AsyncMeshClient, wishes: list[dict[str, Any]]) -> None:
        self._client = client
        self._wishes = wishes
        self.report = Report()
        self.over = asyncio.Event()
        self._going = asyncio.Barrier(len(wishes) + 1)

    async def run(self) -> None:
        sessions = [asyncio.create_task(self._session(wish)) for wish in self._wishes]
        await self._going.wait()
        print("started", flush=True)
        await asyncio.gather(*sessions)

    async def _session(self, wish: dict[str, Any]) -> None:
        first = True
        while not self.over.is_set():
            await self._generate(wish, first)
            first = False

    async def _generate(self, wish: dict[str, Any], first: bool) -> None:
        report, expected = self.report, wish["answer"]
        seen, last = 0, None
        try:
            options: dict[str, Any] = {"max_tokens": len(expected), "temperature": 0.0, "ignore_eos": True}
            async with self._client.stream(tokens=wish["tokens"], **options) as stream:
                async for chunk in stream:
                    if chunk.token is None:
                        continue
                    now = time.time()
                    if last is not None and now - last > GAP_S:
                        report.gaps.append((last, round(now - last, 3)))
                    last = now
                    if first and seen == 0:
                        await self._going.wait()
                    report.repeated += chunk.index < seen
                    report.lost += max(chunk.index - seen, 0)
                    report.wrong += chunk.index < len(expected) and chunk.token.id != expected[chunk.index]
                    seen = max(seen, chunk.index + 1)
                    report.tokens += 1
        except MeshError as error:
            report.failed.append(f"after {seen} tokens: {error.code}: {error}")
            return
        report.lost += len(expected) - seen
        report.generations += 1


async def main() -> None:
    wishes = json.loads(Path(sys.argv[1]).read_text())
    parser = argparse.ArgumentParser()
    add_connection_arguments(parser)
    options = bus_options(parser.parse_args([]))
    async with AsyncMeshClient(options=options, model=sys.argv[2]) as client:
        load = Load(client, wishes)
        running = asyncio.create_task(load.run())
        told = asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
        await asyncio.wait({running, asyncio.ensure_future(told)}, return_when=asyncio.FIRST_COMPLETED)
        load.over.set()
        await running
    print(json.dumps(asdict(load.report)), flush=True)


if __name__ == "__main__":
    asyncio.run(main())
