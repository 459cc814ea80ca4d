"""Prompts that begin as earlier ones did have the tokens of one process that computes everything, through kills between turns.

`make test-prefixes` asks 2,000 times; the usual run a few.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from system_tools import until_leases

from mesh.client import AsyncMeshClient
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.protocol.status import ShardLease
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams

REQUESTS, SEED = int(os.environ.get("MESH_REUSES", "60")), int(os.environ.get("MESH_SEED", "1"))
KILL_EVERY = 20 if REQUESTS < 200 else 50
CHATS, CONTEXT, VOCABULARY = 6, 256, 95
SAMPLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.9, "seed": 11},
    {"temperature": 1.0, "seed": 5, "top_k": 20, "repetition_penalty": 1.2, "presence_penalty": 0.4},
)
BLOCK = 16


@pytest.fixture(scope="module")
def mesh(model: Path) -> Iterator[LocalMesh]:
    """Two ranges, each with a mirror, and two coordinators."""
    options = LocalOptions(model=model, shards=2, replicas=2, mode="mirror", coordinators=2, rows=4, context=CONTEXT)
    with LocalMesh(options) as running:
        yield running


@pytest.fixture(scope="module")
def whole(model: Path) -> Pipeline:
    """One process that computes every prompt as a whole."""
    return Pipeline.load(model, context=CONTEXT)


def numbers(count: int, seed: int) -> list[int]:
    return [random.Random(seed * 1000 + place).randrange(VOCABULARY) for place in range(count)]


async def all_ready(mesh: LocalMesh) -> None:
    """Until every process that was started is ready."""

    def pids(role: str) -> set[int]:
        return {process.pid for name, process in mesh.processes.items() if name.startswith(role)}

    def ready(found: Mapping[str, ShardLease]) -> bool:
        return pids("shard") <= {lease.pid for lease in found.values() if lease.state == "ready"}

    await until_leases(mesh, ready)
    async with AsyncMeshClient(mesh.url, model="tiny") as client:
        while not pids("coordinator") <= {each.stats.pid for each in await client.coordinators() if each.serving}:
            pass  # each question takes a while


@pytest.mark.slow
def test_random_requests_with_kills_between_them_have_the_tokens_of_one_process(mesh: LocalMesh, whole: Pipeline) -> None:
    picks = random.Random(SEED)
    names = [name for name in mesh.processes if name.startswith(("shard", "coordinator"))]
    begins = [numbers(size, seed) for seed, size in enumerate((20, 40, 60))]
    totals = {"requests": 0, "reused": 0, "prompt": 0, "kills": 0}

    async def one(client: AsyncMeshClient, chat: int, history: list[int]) -> list[int]:
        """A turn; returns the history for the next one. Some turns change the end of what was said before."""
        sampling, most = SAMPLINGS[(chat + len(history)) % len(SAMPLINGS)], picks.randint(1, 24)
        answer = await client.generate(tokens=history, max_tokens=most, ignore_eos=True, cache_salt=f"t{chat % 2}", **sampling)
        expected = whole.complete(history, SamplingParams(**sampling), max_tokens=most)
        assert list(answer.tokens) == expected.ids, f"{answer.usage.cached_tokens} of {len(history)} tokens reused, {sampling}"
        assert answer.usage.cached_tokens < len(history)
        totals["requests"] += 1
        totals["reused"] += answer.usage.cached_tokens
        totals["prompt"] += len(history)
        going_on = history if picks.random() < 0.8 else history[: picks.randrange(10, len(history))]
        return [*going_on, *answer.tokens, *numbers(picks.randint(1, 12), picks.randrange(1000))]

    async def chats() -> None:
        histories = {chat: begins[chat % 3] for chat in range(CHATS)}
        async with AsyncMeshClient(mesh.url, model="tiny") as client:
            while totals["requests"] < REQUESTS:
                if totals["requests"] // KILL_EVERY > totals["kills"]:
                    name = names[totals["kills"] % len(names)]
                    totals["kills"] += 1
                    mesh.processes[name].kill()
                    if picks.random() < 0.5:  # otherwise the next turn comes while it is not even noticed
                        mesh.restart(name)
                        await all_ready(mesh)
                some = picks.sample(sorted(histories), 3)
                found = await asyncio.gather(*(one(client, chat, histories[chat]) for chat in some))
                for chat, history in zip(some, found, strict=True):
                    histories[chat] = history if len(history) < CONTEXT - 60 else begins[picks.randrange(3)]
                for name in names:
                    if mesh.processes[name].poll() is not None:
                        mesh.restart(name)
                        await all_ready(mesh)

    asyncio.run(asyncio.wait_for(chats(), 600 + 2 * REQUESTS))
    print(f"{totals}: no token that differs")
    assert totals["reused"] > totals["prompt"] // 10, "hardly anything was reused, so nothing was shown"


@pytest.mark.slow
def test_a_chat_computes_what_is_new_and_its_mirror_serves_after_a_kill(mesh: LocalMesh, whole: Pipeline) -> None:
    async def chat() -> None:
        await all_ready(mesh)
        history = numbers(100, 7)
        async with AsyncMeshClient(mesh.url, model="tiny") as client:
            for turn in range(4):
                async with client.stream(tokens=history, max_tokens=10, ignore_eos=True, cache_salt="chat") as stream:
                    async for _ in stream:
                        pass
                answer = stream.completion
                assert answer is not None and list(answer.tokens) == whole.complete(history, SamplingParams(), max_tokens=10).ids
                assert answer.usage.cached_tokens == (0 if turn == 0 else (len(history) - 4) // BLOCK * BLOCK)
                history = [*history, *answer.tokens, 1, 2, 3]
                if turn == 2:  # the shards that have served so far
                    sessions = [report for each in (await client.status()).coordinators for report in each.stats.recent]
                    route = next(report.route for report in sessions if report.prompt_tokens == answer.usage.prompt_tokens)
                    killed = [name for name in mesh.processes if any(name == shard for shard in route)]
                    assert len(killed) == 2
                    for name in killed:
                        mesh.processes[name].kill()
        for name in killed:
            mesh.restart(name)
        await all_ready(mesh)

    asyncio.run(asyncio.wait_for(chat(), 120))
