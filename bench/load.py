"""A mesh under more load than it has rows for: whether every answer is right, whether any client starves, whether memory stays constant.

    python bench/load.py [--model MODEL_DIR] [--shards 3] [--rows 16] [--parts crowd,arrival,leave,overload] [--seed 1] [--out FILE]

A whole mesh of real processes (nats-server, coordinator, shards) and its clients, each with a connection of its own, on one machine.

    crowd      --clients at a time stream --requests in all, prompts of --prompt tokens: each answer against its lone run in one
               process, time to the first token, time between the tokens of each client (all pooled), memory of every process
    arrival    while --others decode, the longest prompt arrives: the longest gap between two tokens of the others meanwhile beside
               the longest chunk of that prompt, and how many chunks were sent between two steps of the same session
    leave      a client cancels, or its connection is cut, in the middle: how many more steps are begun for its session, and how long
               until its rows are given back
    overload   every row is taken and the queue is full: how soon the answer `busy` comes, and whether the accepted sessions are slowed

Without --model, the model is a tiny one with random weights, made from the tests' exports, and prompts are random tokens. A model with a
tokenizer gets text of this repository. --distinct bounds the number of different requests, because each is first computed alone.
The exit code is 1 if an answer was wrong, or if a request failed that should not have failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from chaos import make_model
from load_tools import Memory, Outcome, Tap, Wish, counters, end, milliseconds, stream, until_token, wait_idle

from mesh.bus import Bus
from mesh.client import AsyncMeshClient
from mesh.commands.bench import percentiles
from mesh.errors import Busy
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.model.manifest import Manifest
from mesh.model.tokenizer import Tokenizer
from mesh.protocol.frame_codec import Kind

ROOT = Path(__file__).parent.parent
PARTS = ("crowd", "arrival", "leave", "overload")


def make_prompts(model: Path, lengths: Sequence[int], random: Random) -> list[list[int]]:
    """One prompt of each length: text of this repository if the model has a tokenizer, random tokens otherwise."""
    manifest = Manifest.load(model)
    if manifest.tokenizer is None:
        return [[random.randrange(manifest.vocab_size - 1) for _ in range(length)] for length in lengths]
    texts = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("nats/*.md")])
    text = Tokenizer.load(model).encode("\n".join(path.read_text() for path in texts), add_special=False)
    return [text[at : at + length] for length in lengths for at in [random.randrange(len(text) - length)]]


@dataclass(frozen=True)
class Work:
    """crowd: of any length. long: a short prompt with a long answer. longest: the longest prompt."""

    crowd: list[Wish]
    long: Wish
    longest: Wish


def make_work(model: Path, args: argparse.Namespace, random: Random) -> Work:
    """The requests, with the answers of one process that serves no other request."""
    from mesh.runtime.generate import Pipeline
    from mesh.runtime.sampling import SamplingParams

    low, high = args.prompt
    sizes = [(low, args.long_tokens), (high, 2)]
    if "crowd" in args.parts:
        sizes += [(low, args.max_tokens[1]), (high, args.max_tokens[0])]
        sizes += [(random.randint(low, high), random.randint(*args.max_tokens)) for _ in range(min(args.distinct, args.requests) - 2)]
    pipeline = Pipeline.load(model, context=args.context)
    greedy = SamplingParams(temperature=0.0)
    wishes = [
        Wish(prompt, most, pipeline.complete(prompt, greedy, max_tokens=most).ids)
        for prompt, (_, most) in zip(make_prompts(model, [length for length, _ in sizes], random), sizes, strict=True)
    ]
    return Work(wishes[2:], *wishes[:2])


# -- parts ---------------------------------------------------------------------------------------------------------------------


async def crowd(mesh: LocalMesh, work: Work, args: argparse.Namespace, random: Random) -> dict[str, Any]:
    """Run --clients connections. Each takes the next of --requests as soon as its last one has ended."""
    wishes = work.crowd
    todo = [Outcome(wish) for wish in (*wishes, *random.choices(wishes, k=args.requests - len(wishes)))]
    random.shuffle(todo)
    left = list(todo)
    memory = Memory(mesh)
    async with AsyncMeshClient(mesh.url, model=mesh.manifest.name) as looking:
        before = await counters(looking)

        async def one() -> None:
            async with AsyncMeshClient(mesh.url, model=mesh.manifest.name, stall_timeout_s=600.0, retry_busy=True) as client:
                while left:
                    outcome = left.pop()
                    await stream(client, outcome)

        watching = asyncio.create_task(memory.watch())
        began = time.perf_counter()
        await asyncio.gather(*(one() for _ in range(args.clients)))
        took_s = time.perf_counter() - began
        watching.cancel()
        memory.look()
        done = await counters(looking)
        done.subtract(before)
        await wait_idle(looking)
    gaps = [b - a for outcome in todo for a, b in outcome.gaps]
    worst = percentiles(gaps)
    assert worst is not None
    return {
        "clients": args.clients,
        "requests": len(todo),
        "distinct": len(wishes),
        "wrong": sum(outcome.wrong for outcome in todo),
        "failed": [f"{outcome.error.code}: {outcome.error}" for outcome in todo if outcome.error is not None],
        "seconds": round(took_s, 1),
        "tokens_per_s": round(sum(len(outcome.tokens) for outcome in todo) / took_s, 1),
        "prompt_tokens_per_s": round(sum(len(outcome.wish.tokens) for outcome in todo) / took_s, 1),
        "first_token_ms": milliseconds([outcome.token_s[0] - outcome.sent_s for outcome in todo if outcome.token_s]),
        "inter_token_ms": milliseconds(gaps),
        "p99_to_median": round(worst["p99"] / worst["p50"], 2),
        "gaps": len(gaps),
        "memory_mb": memory.as_dict(),
        "coordinator": dict(done),
    }


async def arrival(mesh: LocalMesh, work: Work, args: argparse.Namespace, random: Random) -> dict[str, Any]:
    """Send a prompt of the greatest length --rounds times beside --others that decode."""
    rounds = []
    model = mesh.manifest.name
    async with AsyncMeshClient(mesh.url, model=model) as client, await Bus.connect(mesh.bus, name="bench") as bus:
        for _ in range(args.rounds):
            async with Tap(mesh, bus) as tap:
                others = [Outcome(work.long) for _ in range(args.others)]
                tasks = [asyncio.create_task(stream(client, outcome)) for outcome in others]
                await until_token(others, 24, tasks)
                known = tap.keys()
                arriving = await stream(client, Outcome(work.longest))
                if arriving.error is not None:
                    raise arriving.error
                await end(tasks)
                await tap.until_closed(tap.keys())
            began, first = arriving.sent_s, arriving.token_s[0]
            steps = [b - a for outcome in others for a, b in outcome.gaps[4:] if b < began]
            during = [b - a for outcome in others for a, b in outcome.gaps if b >= began and a <= first]
            # one at a time: the next goes out when one is back
            sent = [at for at, kind, _ in tap.sent if kind is Kind.PREFILL and at >= began]
            chunks = [b - a for a, b in pairwise([*sent, first])]
            rounds.append(
                {
                    "step_ms": round(1e3 * statistics.median(steps), 2),
                    "chunks": len(chunks),
                    "chunk_ms": {"p50": round(1e3 * statistics.median(chunks), 1), "max": round(1e3 * max(chunks), 1)},
                    "first_token_ms": round(1e3 * (first - began), 1),
                    "others_gaps_ms": milliseconds(during),
                    "longest_gap_in_chunks": round(max(during) / max(chunks), 2),
                    "most_chunks_between_two_steps": chunks_between_steps(tap, known, began),
                    "wrong": arriving.wrong + sum(outcome.wrong_so_far for outcome in others),
                }
            )
            print(json.dumps(rounds[-1]), flush=True)
        await wait_idle(client)
    return {"others": args.others, "prompt": len(work.longest.tokens), "wrong": sum(each["wrong"] for each in rounds), "rounds": rounds}


def chunks_between_steps(tap: Tap, known: set[int], began: float) -> int:
    """The most prefill frames that were sent between two decode frames of the same session."""
    most, since = 0, dict.fromkeys(known, 0)
    for at, kind, keys in tap.sent:
        if at < began:
            continue
        if kind is Kind.PREFILL:
            since = {key: count + 1 for key, count in since.items()}
        for key in keys & known if kind is Kind.DECODE else ():
            most, since[key] = max(most, since[key]), 0
    return most


async def leave(mesh: LocalMesh, work: Work, args: argparse.Namespace, random: Random) -> dict[str, Any]:
    """Let one of --others close its stream, or its connection, in the middle; --rounds times each."""
    found: dict[str, list[dict[str, float]]] = {"cancelled": [], "connection cut": []}
    model, wrong = mesh.manifest.name, 0
    async with await Bus.connect(mesh.bus, name="bench") as bus, AsyncMeshClient(mesh.url, model=model) as client:
        for how in (how for _ in range(args.rounds) for how in found):
            async with Tap(mesh, bus) as tap, AsyncMeshClient(mesh.url, model=model) as going:
                outcomes = [Outcome(work.long) for _ in range(args.others + 1)]
                first = asyncio.create_task(stream(going, outcomes[0]))
                await until_token(outcomes[:1], 1, [first])
                (key,) = tap.keys()
                others = [asyncio.create_task(stream(client, outcome)) for outcome in outcomes[1:]]
                await until_token(outcomes, random.randint(6, 12), [first, *others])
                left_at = time.perf_counter()
                if how == "cancelled":
                    first.cancel()
                else:
                    await going._connected.client.close()
                await tap.until_closed([key])
                decodes = [at for at, kind, keys in tap.sent if kind is Kind.DECODE and key in keys]
                step_s = statistics.median(b - a for outcome in outcomes[1:] for a, b in outcome.gaps)
                found[how].append(
                    {
                        "steps": sum(at > left_at for at in decodes),
                        "seconds": tap.closed[key] - left_at,
                        "in_steps": round((tap.closed[key] - left_at) / step_s, 2),
                    }
                )
                await end([first, *others])
                await tap.until_closed(tap.keys())
                wrong += sum(outcome.wrong_so_far for outcome in outcomes)
        await wait_idle(client)
    return {
        "others": args.others,
        "wrong": wrong,
        **{
            how: {
                "steps_begun_afterwards": dict(sorted(Counter(str(each["steps"]) for each in rounds).items())),
                "rows_free_after_ms": milliseconds([each["seconds"] for each in rounds]),
                "rows_free_after_steps": {
                    "p50": statistics.median(each["in_steps"] for each in rounds),
                    "max": max(each["in_steps"] for each in rounds),
                },
            }
            for how, rounds in found.items()
        },
    }


async def overload(mesh: LocalMesh, work: Work, args: argparse.Namespace, random: Random) -> dict[str, Any]:
    """Fill rows and queue. Then send --refusals more requests, one after the other, and none of them again."""
    model = mesh.manifest.name
    async with AsyncMeshClient(mesh.url, model=model, stall_timeout_s=600.0) as client:
        accepted = [Outcome(work.long) for _ in range(args.rows + args.queue)]
        tasks = [asyncio.create_task(stream(client, outcome)) for outcome in accepted]
        while (await client.status()).coordinators[0].queued < args.queue:
            if any(task.done() for task in tasks):
                raise SystemExit("the queue did not fill: give a longer --long-tokens")
        await until_token([outcome for outcome in accepted if outcome.tokens], 8, tasks)
        refusals, retry_s, places = [], [], 0
        async with AsyncMeshClient(mesh.url, model=model, retries=0, retry_busy=False) as late:
            began = time.perf_counter()
            for _ in range(args.refusals):
                asking = asyncio.create_task(stream(late, Outcome(work.long)))
                sent = time.perf_counter()
                await asyncio.wait([asking], timeout=1.0)
                if not asking.done():  # a session had ended, so that there was a place
                    places += 1
                    await end([asking])
                    continue
                outcome = asking.result()
                if not isinstance(outcome.error, Busy):
                    raise outcome.error or SystemExit("a request was answered at once though the queue was full")
                refusals.append(time.perf_counter() - sent)
                retry_s.append(outcome.error.retry_after_s)
            ended = time.perf_counter()
        await asyncio.gather(*tasks)
        await wait_idle(client)
    return {
        "rows": args.rows,
        "queue": args.queue,
        "refused": len(refusals),
        "found_a_place": places,
        "busy_after_ms": milliseconds(refusals),
        "over_50_ms": sum(seconds > 0.05 for seconds in refusals),
        "retry_after_s": [min(retry_s), max(retry_s)] if retry_s else None,
        "accepted_gaps_meanwhile_ms": milliseconds([b - a for o in accepted for a, b in o.gaps if a >= began and b <= ended]),
        "accepted_gaps_afterwards_ms": milliseconds([b - a for o in accepted for a, b in o.gaps if a > ended]),
        "wrong": sum(outcome.wrong for outcome in accepted),
        "failed": [f"{outcome.error.code}: {outcome.error}" for outcome in accepted if outcome.error is not None],
    }


# -- all of it -----------------------------------------------------------------------------------------------------------------


async def measure(mesh: LocalMesh, work: Work, args: argparse.Namespace) -> dict[str, Any]:
    async with AsyncMeshClient(mesh.url, model=mesh.manifest.name) as client:  # the first run is not measured
        outcomes = [Outcome(work.long) for _ in range(args.rows)]
        await asyncio.gather(*(stream(client, outcome) for outcome in outcomes))
        await wait_idle(client)
    found = {}
    for part in args.parts:
        found[part] = await globals()[part](mesh, work, args, Random(f"{args.seed} {part}"))
        print(json.dumps({part: found[part]}, indent=1), flush=True)
    return found


def run(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    work = make_work(model, args, Random(args.seed))
    options = LocalOptions(
        model=model,
        shards=args.shards,
        rows=args.rows,
        context=args.context,
        http=False,
        logs=args.logs,
        prefix_reuse="off",
        coordinator_arguments=("--queue", str(args.queue)),
    )
    with LocalMesh(options) as mesh:
        return asyncio.run(measure(mesh, work, args))


def span(text: str) -> tuple[int, int]:
    low, _, high = text.partition("-")
    return int(low), int(high or low)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--queue", type=int, default=64)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS))
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--distinct", type=int, default=200)
    parser.add_argument("--prompt", type=span, default=(10, 1500), metavar="LOW-HIGH")
    parser.add_argument("--max-tokens", type=span, default=(16, 64), metavar="LOW-HIGH")
    parser.add_argument("--long-tokens", type=int, default=512, help="of the sessions that the other parts disturb")
    parser.add_argument("--others", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--refusals", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not set(args.parts) <= set(PARTS):
        parser.error(f"--parts: give some of {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        found = run(args.model or make_model(Path(folder)), args)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items() if name not in ("out", "logs")}
    if args.out is not None:
        args.out.write_text(json.dumps({**settings, "found": found}, indent=1) + "\n")
    return 1 if any(part.get("wrong") or part.get("failed") for part in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
