"""Two shards of each range, two coordinators: the load is shared, and a shard that dies costs a pause."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from oracle import Oracle
from running import Run
from system_tools import all_rows_free

from mesh.client import AsyncMeshClient
from mesh.local.mesh import LocalMesh, LocalOptions

CONTEXT, COUNT = 256, 200
LONG: dict[str, Any] = {"max_tokens": COUNT, "ignore_eos": True}
"""Long enough that all are still under way when the shard is killed."""


@pytest.fixture(scope="module")
def oracle(model: Path) -> Oracle:
    return Oracle(model, context=CONTEXT)


@pytest.fixture(params=["balance", "mirror"])
def pairs(model: Path, request: pytest.FixtureRequest) -> Iterator[LocalMesh]:
    """Ranges 0-2 and 2-3, each on two shards; two coordinators."""
    with LocalMesh(LocalOptions(model=model, shards=2, replicas=2, mode=request.param, coordinators=2, rows=8, context=CONTEXT)) as running:
        yield running


def test_load_is_shared_and_a_killed_shard_costs_no_token(pairs: LocalMesh, oracle: Oracle, run: Run) -> None:
    async def generate() -> None:
        async with AsyncMeshClient(pairs.url, model="tiny") as client:
            assert len((await client.status()).coordinators) == 2
            prompts = [[number, 7, 2 * number, 11] for number in range(8)]
            begun = [asyncio.Event() for _ in prompts]

            async def one(number: int) -> tuple[list[int], Any]:
                seen = []
                async with client.stream(tokens=prompts[number], **LONG) as stream:
                    async for chunk in stream:
                        if chunk.token is not None:
                            seen.append(chunk.token.id)
                        if len(seen) == 5:
                            begun[number].set()
                return seen, stream.completion

            tasks = [asyncio.create_task(one(number)) for number in range(len(prompts))]
            for event in begun:
                await event.wait()
            pairs.processes["shard-1"].kill()
            for prompt, (seen, completion) in zip(prompts, await asyncio.gather(*tasks), strict=True):
                assert seen == oracle.greedy(prompt, COUNT) == list(completion.tokens)
            status = await client.status()
            assert sum(c.stats.finished for c in status.coordinators) == 8
            assert sum(c.stats.failed for c in status.coordinators) == 0
            assert sum(c.stats.failovers for c in status.coordinators) >= 1
            for _ in range(60):  # NATS draws one for each request: of eight, all go to the same one in 1 run of 128
                if all(c.stats.tokens > 0 for c in status.coordinators):
                    break
                await client.generate(tokens=[5], max_tokens=1)
                status = await client.status()
            assert all(c.stats.tokens > 0 for c in status.coordinators), "one coordinator had all the requests"
        await all_rows_free(pairs)

    run(generate())
