"""`mesh bench`: put load on a mesh, and measure."""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from mesh.bus import BusOptions
from mesh.client import AsyncMeshClient
from mesh.commands.bare_hop import bare_hop_between_stages_s, bare_hop_s
from mesh.commands.connection import bus_options
from mesh.commands.generate import add_mesh_arguments
from mesh.errors import BadRequest, MeshError, Unavailable
from mesh.settings.units import format_seconds

__all__ = ["add_parser", "percentiles", "run_command"]

_DESCRIPTION = """\
Generate under load and report the time to the first token, the time between tokens, the throughput, and for each hop of a decode step
the time beyond computing. For comparison, bare NATS hops of the same size are measured as well: between two idle connections, and between
two processes that read as much memory as a stage before they send. Prompts are random tokens, the same for the same seed."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("bench", help="load a mesh and measure it", description=_DESCRIPTION)
    add_mesh_arguments(parser)
    parser.add_argument("--requests", type=int, default=32, metavar="N", help="number of requests (default 32)")
    load = parser.add_mutually_exclusive_group()
    load.add_argument("--concurrency", type=int, default=8, metavar="N", help="so many requests at a time (default 8)")
    load.add_argument("--rate", type=float, metavar="R", help="so many requests a second instead, at random times (Poisson)")
    parser.add_argument("--prompt-tokens", default="16-64", metavar="N[-M]", help="length of prompts (default 16-64)")
    parser.add_argument("--max-tokens", default="32", metavar="N[-M]", help="tokens to generate (default 32)")
    parser.add_argument("--seed", type=int, default=0, help="seed of lengths, prompts and arrival times (default 0)")
    parser.add_argument("--no-hop", action="store_true", help="do not measure bare NATS hops")
    parser.add_argument("--json", action="store_true", help="print one object and nothing else")
    parser.set_defaults(run=run_command)


@dataclass
class _Outcome:
    """One request: perf_counter times of sending and of each token, and the error if it failed."""

    prompt_tokens: int
    sent_s: float
    token_s: list[float] = field(default_factory=list)
    hops: dict[str, float] = field(default_factory=dict)
    error: MeshError | None = None


def run_command(args: argparse.Namespace) -> int:

    for name in ("requests", "concurrency"):
        if getattr(args, name) < 1:
            raise BadRequest(f"--{name} {getattr(args, name)}: give at least 1", field=name)
    if args.rate is not None and args.rate <= 0:
        raise BadRequest(f"--rate {args.rate}: give more than 0 requests a second", field="rate")
    prompts, answers = _span(args.prompt_tokens, "prompt-tokens"), _span(args.max_tokens, "max-tokens")
    report = asyncio.run(_bench(args, bus_options(args), prompts, answers))
    if args.json:
        sys.stdout.buffer.write(orjson.dumps(report) + b"\n")
    else:
        _print(report)
    return 0 if report["failed"] == 0 else 1


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """{mean, p50, p95, p99, max} of `values` by nearest rank; None if there are none."""
    if not values:
        return None
    ranked = sorted(values)
    found = {f"p{p}": ranked[min(len(ranked) - 1, -(-p * len(ranked) // 100) - 1)] for p in (50, 95, 99)}
    return {"mean": sum(ranked) / len(ranked), **found, "max": ranked[-1]}


async def _bench(args: argparse.Namespace, options: BusOptions, prompts: tuple[int, int], answers: tuple[int, int]) -> dict[str, Any]:
    random = Random(args.seed)
    async with AsyncMeshClient(options=options, model=args.model, retries=0) as client:
        status = await client.status()
        coordinator = next((c for c in status.coordinators if args.model in (None, c.model)), None)
        if coordinator is None:
            raise Unavailable("no coordinator answers: start one, or see `mesh status`")
        model, vocabulary = coordinator.model, coordinator.stats.vocab_size
        plans: list[dict[str, Any]] = []
        salt = secrets.token_hex(8)  # what an earlier run has left in the mesh is not reused
        for _ in range(args.requests):
            tokens = [random.randrange(vocabulary) for _ in range(random.randint(*prompts))]
            count = random.randint(*answers)
            plans.append({"tokens": tokens, "max_tokens": count, "ignore_eos": True, "model": model, "cache_salt": salt})
        shards = [shard for shard in status.shards if shard.model == model]
        bare: dict[str, float] = {}
        if shards and not args.no_hop:
            size = shards[0].hidden_size * shards[0].hidden_itemsize
            bare["bare_hop_s"] = await bare_hop_s(options, size)
            stage_bytes = max(shard.weights_bytes for shard in shards)
            bare["bare_hop_between_stages_s"] = await bare_hop_between_stages_s(options, size, stage_bytes)
        began = time.perf_counter()
        outcomes = await _load(client, plans, args, random)
        took_s = time.perf_counter() - began
    return _report(outcomes, took_s, bare, model, stages=len({shard.layers for shard in shards}))


async def _load(client: AsyncMeshClient, plans: Sequence[dict[str, Any]], args: argparse.Namespace, random: Random) -> list[_Outcome]:
    gate = asyncio.Semaphore(args.concurrency if args.rate is None else len(plans))

    async def one(plan: dict[str, Any]) -> _Outcome:
        async with gate:
            outcome = _Outcome(len(plan["tokens"]), time.perf_counter())
            try:
                async with client.stream(**plan) as stream:
                    async for chunk in stream:
                        if chunk.token is not None:
                            outcome.token_s.append(chunk.received_s)
                assert stream.completion is not None
                outcome.hops = dict(stream.completion.timing.hops)
            except MeshError as error:
                outcome.error = error
            return outcome

    tasks = []
    for plan in plans:
        tasks.append(asyncio.create_task(one(plan)))
        if args.rate is not None:
            await asyncio.sleep(random.expovariate(args.rate))
    return list(await asyncio.gather(*tasks))


def _report(outcomes: Sequence[_Outcome], took_s: float, bare: dict[str, float], model: str, *, stages: int) -> dict[str, Any]:
    done = [outcome for outcome in outcomes if outcome.error is None]
    tokens = sum(len(outcome.token_s) for outcome in done)
    gaps = [b - a for outcome in done for a, b in zip(outcome.token_s, outcome.token_s[1:], strict=False)]
    weights = sum(outcome.hops.get("steps", 0) for outcome in done)
    names = ("step_s", "compute_s", "queue_s", "codec_s", "hop_s")
    step = {name: sum(o.hops[name] * o.hops["steps"] for o in done if o.hops.get("steps")) / weights for name in names} if weights else None
    errors: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.error is not None:
            errors[outcome.error.code] = errors.get(outcome.error.code, 0) + 1
    return {
        "model": model,
        "stages": stages,
        "requests": len(outcomes),
        "failed": len(outcomes) - len(done),
        "errors": errors,
        "seconds": took_s,
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in done),
        "tokens": tokens,
        "tokens_per_s": tokens / took_s,
        "requests_per_s": len(done) / took_s,
        "first_token_s": percentiles([o.token_s[0] - o.sent_s for o in done if o.token_s]),
        "inter_token_s": percentiles(gaps),
        "total_s": percentiles([o.token_s[-1] - o.sent_s for o in done if o.token_s]),
        "step": step,
        "bare_hop_s": None,
        "bare_hop_between_stages_s": None,
        **bare,
    }


def _print(report: dict[str, Any]) -> None:
    table = Table("", "mean", "p50", "p95", "p99", "max", title=f"{report['model']}, {report['stages']} stages")
    for name, title in (("first_token_s", "first token"), ("inter_token_s", "between tokens"), ("total_s", "whole request")):
        values = report[name]
        if values is not None:
            table.add_row(title, *(format_seconds(values[column]) for column in ("mean", "p50", "p95", "p99", "max")))
    console = Console()
    console.print(table)
    console.print(
        f"{report['requests']} requests ({report['failed']} failed) in {format_seconds(report['seconds'])}: "
        f"{report['tokens_per_s']:.1f} tokens/s, {report['requests_per_s']:.2f} requests/s"
    )
    for code, count in report["errors"].items():
        console.print(f"{count} x {code}")
    step = report["step"]
    if step is not None:
        console.print(
            f"a step of {format_seconds(step['step_s'])}: {format_seconds(step['compute_s'])} computing, "
            f"{format_seconds(step['queue_s'])} waiting for other work, {format_seconds(step['hop_s'])} for each hop"
        )
    if report["bare_hop_s"] is not None:
        console.print(
            f"a bare NATS hop takes {format_seconds(report['bare_hop_s'])} where nothing else is done, "
            f"{format_seconds(report['bare_hop_between_stages_s'])} between processes that read a stage's weights before they send"
        )


def _span(text: str, name: str) -> tuple[int, int]:
    """`16` or `16-64` as (least, most)."""
    low, _, high = text.partition("-")
    try:
        span = int(low), int(high or low)
    except ValueError:
        span = 0, 0
    if not 1 <= span[0] <= span[1]:
        raise BadRequest(f"--{name} {text}: give a count such as 32, or a range such as 16-64", field=name)
    return span
