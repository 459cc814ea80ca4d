"""Many prompts at once: when each has its first token, and what those feel that already decode.

    python bench/crowd.py MODEL_DIR [--shards 1,3] [--parts together,beside,overtake,poisson] [--rounds 3] [--out FILE]
        [--gguf MODEL.gguf --llama BIN]

    together   32 requests arrive at one time, prompts of --lengths, 64 tokens each: until all have their first token, until the last
               token. With --llama, llama-batched-bench takes turns with it: the same sizes of the same file
    beside     while 16 sessions decode, 16 prompts of 1,000 tokens arrive: the longest gap of the 16 beside their median
    overtake   a short prompt arrives while one of 6,000 tokens is prefilled: its first token, and how long the long one takes
    poisson    prompts of 16 to 1,500 tokens, answers of 16 to 256, at growing rates: the highest at which 95 % have their first token
               within 2 s and a time between tokens within 2.5 times that of a lone session

Every part has a mesh of its own on this machine. One client process sends everything over one connection.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from compare_llama import Llama
from load_tools import Outcome, Wish, end, stream, until_token, wait_idle

from mesh.client import AsyncMeshClient
from mesh.local.mesh import LocalMesh, LocalOptions

ARRIVALS, ANSWER = 32, 64


def wish(length: int, max_tokens: int, seed: int) -> Wish:
    random = Random(seed)
    return Wish([random.randrange(100, 4000) for _ in range(length)], max_tokens, [])


def mesh_of(model: Path, shards: int, rows: int, context: int) -> LocalMesh:
    options = ("--queue", "512")
    return LocalMesh(
        LocalOptions(model=model, shards=shards, rows=rows, context=context, http=False, prefix_reuse="off", coordinator_arguments=options)
    )


def failed(outcomes: Sequence[Outcome]) -> list[str]:
    return [str(each.error) for each in outcomes if each.error is not None]


async def all_of(client: AsyncMeshClient, wishes: Sequence[Wish]) -> tuple[float, list[Outcome]]:
    """(when they were sent, what became of them)"""
    outcomes = [Outcome(each) for each in wishes]
    began = time.perf_counter()
    await asyncio.gather(*(stream(client, outcome) for outcome in outcomes))
    if failed(outcomes):
        raise SystemExit(f"{len(failed(outcomes))} requests failed: {failed(outcomes)[0]}")
    await wait_idle(client)
    return began, outcomes


# -- parts -------------------------------------------------------------------------------------------------------------------


async def together(mesh: LocalMesh, length: int, arrivals: int, seed: int) -> dict[str, float]:
    async with AsyncMeshClient(mesh.url, model=mesh.manifest.name, stall_timeout_s=600.0) as client:
        began, outcomes = await all_of(client, [wish(length, ANSWER, seed * 1000 + index) for index in range(arrivals)])
    firsts = [each.token_s[0] - began for each in outcomes]
    return {"first_p50_s": statistics.median(firsts), "firsts_s": max(firsts), "last_s": max(each.token_s[-1] for each in outcomes) - began}


def take_turns(args: argparse.Namespace, shards: Sequence[int]) -> dict[str, Any]:
    """The part `together`: meshes and llama.cpp in turn, prompts of every length."""
    llama = Llama(args.llama, os.cpu_count() or 1) if args.llama and args.gguf else None
    meshes = {count: mesh_of(args.model, count, args.rows, max(args.lengths) + ANSWER) for count in shards}
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    try:
        for mesh in meshes.values():
            mesh.__enter__()
            asyncio.run(together(mesh, min(args.lengths), ARRIVALS, 99))  # the first turn is not measured
        for turn in range(args.rounds):
            for length in args.lengths:
                for count, mesh in meshes.items():
                    name = f"{count} shard" + "s" * (count > 1)
                    found.setdefault(name, {}).setdefault(length, []).append(asyncio.run(together(mesh, length, args.arrivals, turn)))
                if llama is not None:
                    batches = max(args.arrivals // args.rows, 1)
                    times, _ = llama.decode(args.gguf, [args.rows], length, ANSWER)
                    first, step = times[args.rows]["prefill"], times[args.rows]["step"]
                    whole = first + step * ANSWER
                    row = {"first_p50_s": first, "firsts_s": first + whole * (batches - 1), "last_s": whole * batches}
                    found.setdefault("llama.cpp", {}).setdefault(length, []).append(row)
            print({name: {length: rows[-1] for length, rows in by.items()} for name, by in found.items()}, file=sys.stderr, flush=True)
    finally:
        for mesh in meshes.values():
            mesh.__exit__(None, None, None)
    return {
        name: {length: {key: round(statistics.median(row[key] for row in rows), 2) for key in rows[0]} for length, rows in by.items()}
        for name, by in found.items()
    }


async def beside(mesh: LocalMesh, rounds: int) -> dict[str, Any]:
    """How 16 prompts of 1,000 tokens disturb 16 sessions that decode."""
    ratios, firsts = [], []
    async with AsyncMeshClient(mesh.url, model=mesh.manifest.name, stall_timeout_s=600.0) as client:
        for turn in range(rounds + 1):
            others = [Outcome(wish(16, 600, turn * 100 + index)) for index in range(16)]
            tasks = [asyncio.create_task(stream(client, outcome)) for outcome in others]
            await until_token(others, 24, tasks)
            began = time.perf_counter()
            arriving = [Outcome(wish(1000, 2, turn * 100 + 50 + index)) for index in range(16)]
            await asyncio.gather(*(stream(client, outcome) for outcome in arriving))
            over = max(each.token_s[0] for each in arriving)
            await end(tasks)
            await wait_idle(client)
            gaps = [b - a for each in others for a, b in each.gaps if b >= began and a <= over]
            if turn:  # the first turn is not measured
                ratios.append((statistics.median(gaps), max(gaps)))
                firsts.append(over - began)
    return {
        "median_gap_ms": round(1e3 * statistics.median(median for median, _ in ratios), 1),
        "longest_gap_ms": round(1e3 * statistics.median(longest for _, longest in ratios), 1),
        "longest_to_median": round(statistics.median(longest / median for median, longest in ratios), 2),
        "all_first_tokens_s": round(statistics.median(firsts), 2),
    }


async def overtake(mesh: LocalMesh, rounds: int) -> dict[str, Any]:
    short_s, long_s, alone_s = [], [], []
    async with AsyncMeshClient(mesh.url, model=mesh.manifest.name, stall_timeout_s=600.0) as client:
        for turn in range(rounds):
            began, (alone,) = await all_of(client, [wish(6000, 2, turn)])
            alone_s.append(alone.token_s[0] - began)
            long = Outcome(wish(6000, 2, 500 + turn))
            task = asyncio.create_task(stream(client, long))
            await asyncio.sleep(alone_s[-1] / 4)
            short = await stream(client, Outcome(wish(16, 2, 900 + turn)))
            await task
            short_s.append(short.token_s[0] - short.sent_s)
            long_s.append(long.token_s[0] - long.sent_s)
            await wait_idle(client)
    return {
        "short_first_token_s": round(statistics.median(short_s), 2),
        "long_s": round(statistics.median(long_s), 1),
        "long_alone_s": round(statistics.median(alone_s), 1),
    }


async def at_rate(client: AsyncMeshClient, rate: float, seconds: float, seed: int) -> list[Outcome]:
    random, tasks, outcomes = Random(seed), [], []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        await asyncio.sleep(random.expovariate(rate))
        outcomes.append(Outcome(wish(random.randint(16, 1500), random.randint(16, 256), random.getrandbits(30))))
        tasks.append(asyncio.create_task(stream(client, outcomes[-1])))
    await asyncio.gather(*tasks)
    await wait_idle(client)
    return outcomes


async def poisson(mesh: LocalMesh, seconds: float, rates: Sequence[float]) -> dict[str, Any]:
    """The share of requests that have a first token within 2 s and a mean time between tokens of 2.5 lone steps, at each of `rates`;
    without any, at ever higher ones until fewer than 95 % have."""
    async with AsyncMeshClient(mesh.url, model=mesh.manifest.name, stall_timeout_s=600.0) as client:
        for turn in range(2):
            _, (lone,) = await all_of(client, [wish(16, 64, turn)])
        lone_s = statistics.median(b - a for a, b in pairwise(lone.token_s))
        rows: list[dict[str, Any]] = []
        for rate in rates or [0.25 * 1.25**turn for turn in range(40)]:
            if not rates and rows and rows[-1]["good"] < 0.95:
                break
            outcomes = await at_rate(client, rate, seconds, seed=7)
            kept = [each.token_s[0] - each.sent_s <= 2.0 and pace(each) <= 2.5 * lone_s for each in outcomes if each.token_s]
            first = sorted(each.token_s[0] - each.sent_s for each in outcomes if each.token_s)
            rows.append({"rate": round(rate, 2), "requests": len(outcomes), "good": round(sum(kept) / len(outcomes), 3)})
            rows[-1] |= {"pace_p95_ms": round(1e3 * sorted(pace(each) for each in outcomes)[int(len(outcomes) * 0.95)], 1)}
            rows[-1] |= {"first_p95_s": round(first[int(len(first) * 0.95)], 2), "failed": len(failed(outcomes))}
            print(rows[-1], file=sys.stderr, flush=True)
    return {
        "lone_step_ms": round(1e3 * lone_s, 1),
        "rates": rows,
        "held": max((row["rate"] for row in rows if row["good"] >= 0.95), default=0),
    }


def pace(outcome: Outcome) -> float:
    """The mean time between tokens."""
    return (outcome.token_s[-1] - outcome.token_s[0]) / max(len(outcome.token_s) - 1, 1)


# -- all of it ---------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(part) for part in text.split(",")]  # noqa: E731
    parser.add_argument("model", type=Path)
    parser.add_argument("--shards", type=numbers, default=[1, 3])
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["together", "beside", "overtake", "poisson"])
    parser.add_argument("--lengths", type=numbers, default=[8, 32, 128])
    parser.add_argument("--arrivals", type=int, default=ARRIVALS, help="of `together`")
    parser.add_argument("--rows", type=int, default=ARRIVALS, help="of `together`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each rate of `poisson`")
    parser.add_argument("--rates", type=lambda text: [float(part) for part in text.split(",")], default=[], help="of `poisson`, a second")
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--llama", type=Path, help="the folder of llama.cpp's tools")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    results: dict[str, Any] = {}
    if "together" in args.parts:
        results["together"] = take_turns(args, args.shards)
        print(json.dumps(results["together"]), flush=True)
    alone = {
        "beside": (lambda mesh: beside(mesh, args.rounds), 32, 1024),
        "overtake": (lambda mesh: overtake(mesh, args.rounds), 4, 6144),
        "poisson": (lambda mesh: poisson(mesh, args.seconds, args.rates), 32, 2048),
    }
    for part in (part for part in args.parts if part in alone):
        run, rows, context = alone[part]
        for count in args.shards:
            with mesh_of(args.model, count, rows, context) as mesh:
                results.setdefault(part, {})[count] = asyncio.run(run(mesh))
            print(json.dumps({part: {count: results[part][count]}}), flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
