"""How long the client waits when a shard is killed: the gap between two tokens, in steps.

    python bench/failover.py MODEL_DIR [--mode mirror|balance] [--rounds 6] [--sessions 1] [--prompt 64] [--out result.json]

A mesh of 3 ranges x 2 replicas. In each round, sessions generate, and a shard on the route of one of them is killed with SIGKILL at a
random moment (of the first, middle and last stage in turn). It is restarted before the next round. The report has, for each round, the
longest gap between two tokens of a session that was hit, the median gap before the kill, and in balance mode the time that the prefill of
the same history took in an undisturbed run at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from mesh.bus import Bus
from mesh.client import AsyncMeshClient
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.protocol import topics
from mesh.protocol.status import StatsRequest

BEFORE, AFTER = 40, 40
"""The least number of tokens before the kill, and the number after it."""


async def generate(client: AsyncMeshClient, prompt: list[int], count: int, at: list[float]) -> tuple[list[int], float, int]:
    """The tokens, the seconds to the first one, and how often the route changed. The times of the tokens are appended to `at`."""
    tokens = []
    began = time.perf_counter()
    async with client.stream(tokens=prompt, max_tokens=count, temperature=0.0, ignore_eos=True) as stream:
        async for chunk in stream:
            if chunk.token is not None:
                at.append(time.perf_counter())
                tokens.append(chunk.token.id)
    assert stream.completion is not None
    return tokens, at[0] - began, stream.completion.timing.restarts


async def wait_whole(mesh: LocalMesh, client: AsyncMeshClient) -> None:
    pids = {process.pid for name, process in mesh.processes.items() if name.startswith("shard")}
    while not pids <= {lease.pid for lease in (await client.status()).shards if lease.state == "ready"}:
        await asyncio.sleep(0.3)


async def frames_out(bus: Bus, shard: str) -> int:
    return (await bus.request(topics.STATS.at(shard), StatsRequest(), timeout_s=10)).frames_out


async def round_of(
    mesh: LocalMesh, client: AsyncMeshClient, bus: Bus, args: argparse.Namespace, number: int, random: Random
) -> dict[str, Any]:
    prompts = [[random.randrange(5, 90) for _ in range(args.prompt)] for _ in range(args.sessions)]
    times: list[list[float]] = [[] for _ in prompts]
    count = BEFORE + AFTER + 20
    tasks = [asyncio.create_task(generate(client, prompt, count, at)) for prompt, at in zip(prompts, times, strict=True)]
    while min(len(at) for at in times) < BEFORE:
        await asyncio.sleep(0.001)
    first = 2 * (number % 3) + 1  # the shards of a range are numbered one after the other
    victims = [f"shard-{first}", f"shard-{first + 1}"]
    before = {name: await frames_out(bus, name) for name in victims}
    await asyncio.sleep(0.2)
    victim = max([(await frames_out(bus, name) - before[name], name) for name in victims])[1]  # a mirror sends nothing
    await asyncio.sleep(random.uniform(0, 0.1))
    frames_before = (await client.status()).coordinators[0].stats.prefill_frames
    killed = time.perf_counter()
    mesh.processes[victim].kill()
    results = await asyncio.gather(*tasks)
    after = (await client.status()).coordinators[0].stats.prefill_frames
    gaps = [list(pairwise(at)) for at in times]
    steps = [b - a for each in gaps for a, b in each if b < killed]
    hit = [max(b - a for a, b in each if b >= killed) for each, (_, _, restarts) in zip(gaps, results, strict=True) if restarts]
    lone = [(await generate(client, prompt, count, []))[0] for prompt in prompts[: args.compare]]
    history = [*prompts[0], *lone[0][: BEFORE + 10]]
    prefill_s = (await generate(client, history, 1, []))[1]
    mesh.restart(victim)
    await wait_whole(mesh, client)
    step_s = statistics.median(steps)
    return {
        "stage": number % 3,
        "hit": len(hit),
        "step_ms": round(1e3 * step_s, 2),
        "pause_ms": [round(1e3 * seconds, 1) for seconds in hit],
        "prefill_ms": round(1e3 * prefill_s, 1),
        "pause_steps": [round(seconds / step_s, 2) for seconds in hit],
        "pause_less_prefill_steps": [round((seconds - prefill_s) / step_s, 2) for seconds in hit],
        "prefill_frames": after - frames_before,
        "wrong": sum(tokens != alone for (tokens, _, _), alone in zip(results, lone, strict=False)),
    }


async def measure(mesh: LocalMesh, args: argparse.Namespace) -> list[dict[str, Any]]:
    random = Random(args.seed)
    rounds: list[dict[str, Any]] = []
    async with AsyncMeshClient(mesh.url, model=mesh.manifest.name) as client, await Bus.connect(mesh.bus, name="bench") as bus:
        await generate(client, [5, 6, 7], 60, [])
        number = args.first
        while len(rounds) < args.rounds:
            rounds.append(await round_of(mesh, client, bus, args, number, random))
            print(json.dumps(rounds[-1]), flush=True)
            number += 1
    return rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--mode", choices=("mirror", "balance"), default="mirror")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--first", type=int, default=0, help="stage of the first round")
    parser.add_argument("--sessions", type=int, default=1)
    parser.add_argument("--compare", type=int, default=8, help="so many sessions of a round are compared with themselves alone")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    options = LocalOptions(
        model=args.model,
        shards=3,
        replicas=2,
        mode=args.mode,
        rows=args.rows,
        context=args.context,
        http=False,
        logs=args.logs,
        prefix_reuse="off",
    )
    with LocalMesh(options) as mesh:
        rounds = asyncio.run(measure(mesh, args))
    if args.out is not None:
        args.out.write_text(json.dumps({"mode": args.mode, "sessions": args.sessions, "rounds": rounds}, indent=1) + "\n")
    return 1 if any(each["wrong"] for each in rounds) else 0


if __name__ == "__main__":
    sys.exit(main())
