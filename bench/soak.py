"""Half an hour of load with cancels, clients that leave, and hostile calls: does anything grow, and is any token wrong?

    python bench/soak.py [MODEL_DIR] [--minutes 30] [--seed 1] [--logs FOLDER] [--out result.json]

A mesh of processes: nats-server, 3 shards, 2 coordinators, and a gateway by itself. Clients of every kind (bench/clients.py) generate
all the time, a third of the streams are left early, and every HOSTILE_EVERY_S one hostile call of bench/hostile.py lasts HOSTILE_S.
At 10, 50 and 100 % of the time, the table has the memory, the open files and the threads of every process, and the messages and bytes of
every JetStream stream. Memory is the median of the last WINDOW_S. The exit code is 1 if a generation was not right, or if something grew
beyond its bound from 50 % to 100 %.

First, each hostile HTTP body is sent to the gateway for a few seconds: its memory before, at most, and GIVEN_BACK_S afterwards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import httpx
from chaos import Plan, Wish, make_model, make_wishes
from clients import HANG_S, Load, Ways
from edges import gateways, url_of
from hostile import BODIES, OTHERS
from load_tools import resident_bytes

from mesh.bus import Bus, BusOptions
from mesh.client import AsyncMeshClient
from mesh.errors import MeshError
from mesh.local.mesh import LocalMesh, LocalOptions

CONTEXT, ROWS = 256, 16
CLIENTS = {"nats": 3, "plain": 1, "sse": 3, "http": 1}
LEAVING = 1 / 3
POINTS = (0.1, 0.5, 1.0)
SAMPLE_S, WINDOW_S = 1.0, 30.0
HOSTILE_EVERY_S, HOSTILE_S = 12.0, 2.0
BODY_S, GIVEN_BACK_S = 2.0, 3.0

MEMORY_SHARE, MEMORY_MB = 1.1, 8.0
"""A process may have grown to this share of its memory at 50 %, and by so many MB beyond."""
FILES_MORE, THREADS_MORE = 8, 2
"""Open files: a connection of a client that is just there counts on both sides."""
STREAM_SHARE, STREAM_BYTES = 1.5, 256 * 1024
BOUNDED = {"mesh_events": 64 * 2**20, "mesh_dead": 4 * 2**20}
"""Streams that keep a history on purpose: their bound is their own limit, bytes."""


@dataclass(frozen=True)
class Sample:
    """One look at a process (with its children), or at a stream."""

    memory_mb: float
    files: int
    threads: int


def family(pid: int) -> list[int]:
    """A process and everything below it."""
    found, waiting = [], [pid]
    while waiting:
        one = waiting.pop()
        try:
            tasks = Path(f"/proc/{one}/task").iterdir()
            waiting += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except OSError:  # it has ended
            continue
        found.append(one)
    return found


def look(pid: int) -> Sample:
    memory, files, threads = 0, 0, 0
    for one in family(pid):
        try:
            memory += resident_bytes(one)
            files += len(list(Path(f"/proc/{one}/fd").iterdir()))
            threads += len(list(Path(f"/proc/{one}/task").iterdir()))
        except OSError:
            continue
    return Sample(memory / 1e6, files, threads)


class Watching:
    """Looks at the processes every SAMPLE_S, and keeps the last WINDOW_S."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._kept: dict[str, deque[Sample]] = {name: deque(maxlen=round(WINDOW_S / SAMPLE_S)) for name in pids}
        self.most_mb = dict.fromkeys(pids, 0.0)

    async def run(self) -> None:
        while True:
            for name, pid in self._pids.items():
                sample = look(pid)
                self._kept[name].append(sample)
                self.most_mb[name] = max(self.most_mb[name], sample.memory_mb)
            await asyncio.sleep(SAMPLE_S)

    def now(self) -> dict[str, dict[str, float]]:
        """The medians of the window."""
        return {
            name: {
                "memory_mb": round(statistics.median(sample.memory_mb for sample in kept), 1),
                "files": statistics.median_low([sample.files for sample in kept]),
                "threads": statistics.median_low([sample.threads for sample in kept]),
            }
            for name, kept in self._kept.items()
        }


async def streams(bus: Bus) -> dict[str, dict[str, int]]:
    """The messages and bytes of every stream, those of buckets too."""
    found = await bus.client.jetstream().streams_info()
    return {str(info.config.name): {"messages": int(info.state.messages), "bytes": int(info.state.bytes)} for info in found}


async def call(name: str, http: str, nats: str, model: str, seconds: float) -> dict[str, int]:
    """One hostile call by a process of its own; returns the answers that it got."""
    program = str(Path(__file__).with_name("hostile.py"))
    command = [sys.executable, program, "--call", name, "--http", http, "--nats", nats, "--seconds", str(seconds), model]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL)
    output, _ = await process.communicate()
    return dict(json.loads(output or b"{}"))


async def bodies(pid: int, http: str, nats: str, model: str) -> list[dict[str, Any]]:
    """The gateway's memory before, during and after each hostile body."""
    rows = []
    for way in ("http", "openai", "batch"):
        for body in BODIES:
            before = most = look(pid).memory_mb
            calling = asyncio.create_task(call(f"{way}:{body}", http, nats, model, BODY_S))
            while not calling.done():
                most = max(most, look(pid).memory_mb)
                await asyncio.sleep(0.02)
            await asyncio.sleep(GIVEN_BACK_S)
            after = look(pid).memory_mb
            row = {"call": f"{way}:{body}", "memory_mb": [round(value, 1) for value in (before, most, after)], "answers": await calling}
            rows.append(row)
            print(f"{row['call']:<24} {before:6.1f} {most:6.1f} {after:6.1f} MB  {row['answers']}", file=sys.stderr, flush=True)
    return rows


async def hostile_calls(http: str, nats: str, model: str, random: Random, answers: Counter[str]) -> None:
    names = [*OTHERS, *(f"{way}:{body}" for way in ("http", "nats", "openai", "batch") for body in BODIES)]
    while True:
        random.shuffle(names)
        for name in names:
            answers["calls"] += 1
            answers.update(await call(name, http, nats, model, HOSTILE_S))
            await asyncio.sleep(HOSTILE_EVERY_S - HOSTILE_S)


def grown(points: list[dict[str, Any]]) -> list[str]:
    """What is larger at the end than its bound, which follows from half-time."""
    half, end = points[-2], points[-1]
    found = []
    for name, now in end["processes"].items():
        before = half["processes"][name]
        bounds = {
            "memory_mb": before["memory_mb"] * MEMORY_SHARE + MEMORY_MB,
            "files": before["files"] + FILES_MORE,
            "threads": before["threads"] + THREADS_MORE,
        }
        found += [f"{name}: {what} {before[what]} -> {now[what]}" for what, bound in bounds.items() if now[what] > bound]
    for name, now in end["streams"].items():
        before = half["streams"].get(name, {"bytes": 0})
        bound = BOUNDED.get(name) or before["bytes"] * STREAM_SHARE + STREAM_BYTES
        if now["bytes"] > bound:
            found.append(f"{name}: {before['bytes']} -> {now['bytes']} bytes")
    return found


def table(points: list[dict[str, Any]], most_mb: dict[str, float]) -> str:
    head = " | ".join(f"{round(100 * share)} %" for share in POINTS)
    lines = [f"| process: MB, files, threads | {head} | most MB |", "|---|" + "---|" * len(POINTS) + "---|"]
    for name in points[0]["processes"]:
        cells = [point["processes"][name] for point in points]
        shown = " | ".join(f"{cell['memory_mb']}, {cell['files']}, {cell['threads']}" for cell in cells)
        lines.append(f"| {name} | {shown} | {most_mb[name]:.1f} |")
    lines += ["", f"| stream: messages, KB | {head} |", "|---|" + "---|" * len(POINTS)]
    for name in sorted({name for point in points for name in point["streams"]}):
        cells = [point["streams"].get(name, {"messages": 0, "bytes": 0}) for point in points]
        lines.append(f"| {name} | " + " | ".join(f"{cell['messages']}, {cell['bytes'] / 1e3:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


async def soak(mesh: LocalMesh, gateway: tuple[int, str], wishes: list[Wish], args: argparse.Namespace) -> dict[str, Any]:
    assert mesh.server is not None
    random, model = Random(args.seed), mesh.manifest.name
    pid, http = gateway
    pids = {"nats-server": mesh.server.pid, "gateway": pid, **{name: process.pid for name, process in mesh.processes.items()}}
    limits = httpx.Limits(max_connections=64)
    async with (
        await Bus.connect(BusOptions((mesh.url,)), name="soak") as bus,
        AsyncMeshClient(mesh.url, model=model) as client,
        httpx.AsyncClient(base_url=http, timeout=2 * HANG_S, limits=limits) as web,
    ):
        body_rows = [] if args.without_bodies else await bodies(pid, http, mesh.url, model)
        load = Load(Ways(client, bus, web, model), wishes, CLIENTS, random, leaving=LEAVING)
        watching, answers = Watching(pids), Counter[str]()
        began = time.monotonic()
        load.start()
        beside = [
            asyncio.create_task(watching.run()),
            asyncio.create_task(hostile_calls(http, mesh.url, model, random, answers)),
        ]
        points: list[dict[str, Any]] = []
        try:
            for share in POINTS:
                while time.monotonic() - began < share * 60 * args.minutes:
                    await asyncio.sleep(1.0)
                    load.check()
                    for task in beside:
                        if task.done():
                            task.result()
                points.append({"processes": watching.now(), "streams": await streams(bus)})
                print(json.dumps({"at": share, **load.tally.as_dict()}), file=sys.stderr, flush=True)
            await load.stop()
        finally:
            await load.end()
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        ended = [name for name, one in pids.items() if not look(one).threads]
        rows_free = await _rows_free(client)
    return {
        "minutes": args.minutes,
        "seed": args.seed,
        **load.tally.as_dict(),
        "hostile": dict(answers),
        "points": points,
        "most_mb": {name: round(value, 1) for name, value in watching.most_mb.items()},
        "grown": grown(points),
        "ended": ended,
        "rows_not_given_back": not rows_free,
        "gateway_bodies": body_rows,
        "text": f"{table(points, watching.most_mb)}\n\n{load.tally.table()}",
        "bad": load.tally.bad,
    }


async def _rows_free(client: AsyncMeshClient) -> bool:
    """Whether every row is given back within HANG_S."""
    deadline = time.monotonic() + HANG_S
    while time.monotonic() < deadline:
        try:
            leases = (await client.status()).shards
        except MeshError:
            leases = ()
        if leases and all(lease.free_rows == lease.rows for lease in leases):
            return True
        await asyncio.sleep(0.5)
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a model directory (default: the tiny one of the tests)")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--without-bodies", action="store_true", help="leave out the gateway's memory for each hostile body")
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("MESH_RESOURCES_WORKER_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        model = args.model or make_model(Path(folder))
        wishes = make_wishes(model, Plan(max_tokens=(20, 100)), args.seed)
        options = LocalOptions(model=model, shards=3, coordinators=2, rows=ROWS, context=CONTEXT, http=False, logs=args.logs)
        with LocalMesh(options) as mesh, gateways(1, mesh.url, Path(folder)) as edges:
            (edge,) = edges.values()
            result = asyncio.run(soak(mesh, (edge.pid, url_of(edge)), wishes, args))
    print(result.pop("text"))
    failed = bool(result.pop("bad") or result["grown"] or result["ended"] or result["rows_not_given_back"])
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    for line in (*result["faults"], *result["grown"], *(f"{name} has ended" for name in result["ended"])):
        print(line)
    if result["rows_not_given_back"]:
        print("some rows were not given back")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
