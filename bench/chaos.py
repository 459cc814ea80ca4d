"""Kill, suspend and restart everything under load, and compare every token with an undisturbed run.

    python bench/chaos.py [--kills 100] [--stops 20] [--server-restarts 5] [--mode balance|mirror] [--sessions 8] [--generations 0]
        [--seed 1] [--out result.json]

A mesh of real processes: 3 ranges x 2 replicas, 2 coordinators, an embedded nats-server; 8 sessions at a time, greedy and sampled. It goes
on until every disturbance is over and --generations are complete. The
disturbances come one after the other in a seeded order: SIGKILL of a shard or a coordinator, which is restarted after a random delay;
SIGSTOP, and SIGCONT after a random time; SIGKILL of the nats-server, which is restarted with its store. A coordinator is left
alone while the other one is away, so that one always answers. Shards are disturbed at any time.

The model is a tiny one with random weights, made from the tests' exports, so that the mesh is measured, not the model. A pause is the time
between two tokens of a session around a disturbance, for every session that was generating then, whether the disturbance hit it or not.
The exit code is 1 if a token was lost, repeated or wrong, or a generation failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from mesh.client import AsyncMeshClient
from mesh.errors import MeshError
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.runtime.sampling import SamplingParams

ROOT = Path(__file__).parent.parent
CONTEXT, ROWS = 256, 16
PROMPTS = 24
VOCABULARY = 96
AWAY_MOST = 3
"""The most shards that are down or suspended at the same time, because the machine has to restart them meanwhile."""


@dataclass(frozen=True)
class Plan:
    """The extent of a run. generations: at least so many. gap_s: between two disturbances. away_s: until a process is there again."""

    kills: int = 100
    stops: int = 20
    server_restarts: int = 5
    sessions: int = 8
    generations: int = 0
    max_tokens: tuple[int, int] = (60, 180)
    gap_s: tuple[float, float] = (0.1, 2.0)
    away_s: tuple[float, float] = (0.0, 3.0)
    longest_s: float = 1800.0


@dataclass(frozen=True)
class Wish:
    """A request and its right answer."""

    tokens: list[int]
    max_tokens: int
    options: dict[str, Any]
    expected: list[int]


@dataclass
class Report:
    generations: int = 0
    tokens: int = 0
    lost: int = 0
    repeated: int = 0
    wrong: int = 0
    failed: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    pauses: dict[str, list[float]] = field(default_factory=dict)
    median_step_s: float = 0.0
    wall_s: float = 0.0
    counters: dict[str, int] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        return not (self.lost or self.repeated or self.wrong or self.failed) and self.generations > 0

    def as_dict(self) -> dict[str, Any]:
        pauses = {
            kind: {
                "count": len(seconds),
                "p50_ms": round(1e3 * statistics.median(seconds), 1),
                "p99_ms": round(1e3 * sorted(seconds)[min(len(seconds) - 1, int(0.99 * len(seconds)))], 1),
                "max_ms": round(1e3 * max(seconds), 1),
            }
            for kind, seconds in sorted(self.pauses.items())
            if seconds
        }
        return {
            "generations": self.generations,
            "tokens": self.tokens,
            "disturbances": dict(sorted(self.done.items())),
            "lost": self.lost,
            "repeated": self.repeated,
            "wrong": self.wrong,
            "failed": self.failed,
            "differences": self.differences,
            "median_step_ms": round(1e3 * self.median_step_s, 2),
            "pauses": pauses,
            "coordinators": self.counters,
            "wall_s": round(self.wall_s, 1),
        }


def make_wishes(model: Path, plan: Plan, seed: int) -> list[Wish]:
    """The requests, with the answers of one process that is not disturbed."""
    from mesh.runtime.generate import Pipeline

    random = Random(seed)
    pipeline = Pipeline.load(model, context=CONTEXT)
    wishes = []
    for number in range(PROMPTS):
        tokens = [random.randrange(VOCABULARY - 1) for _ in range(random.randint(1, 60))]
        most = random.randint(*plan.max_tokens)
        options: dict[str, Any] = {"temperature": 0.0}
        if number % 3 == 2:
            options = {"temperature": 0.9, "top_k": 30, "seed": random.randrange(1000), "repetition_penalty": 1.1}
        expected = pipeline.complete(tokens, SamplingParams(**options), max_tokens=most).ids
        wishes.append(Wish(tokens, most, options, expected))
    return wishes


class Chaos:
    """One run. All random choices come from `seed`; only the machine's timing does not."""

    def __init__(self, mesh: LocalMesh, wishes: Sequence[Wish], plan: Plan, seed: int) -> None:
        self.mesh = mesh
        self.wishes = wishes
        self.plan = plan
        self.random = Random(seed)
        self.report = Report()
        self._away: set[str] = set()
        self._coming: set[asyncio.Task[None]] = set()
        self._gaps: list[tuple[float, float]] = []  # between two tokens of one session, on the clock of perf_counter
        self._struck: list[tuple[float, str]] = []
        self._over = False

    async def run(self) -> Report:
        began = time.perf_counter()
        async with asyncio.timeout(self.plan.longest_s), AsyncMeshClient(self.mesh.url, model=self.mesh.manifest.name) as client:
            sessions = [asyncio.create_task(self._session(client, Random(self.random.random()))) for _ in range(self.plan.sessions)]
            try:
                await asyncio.sleep(1.0)  # every session has begun, or soon will
                await self._disturb()
                self._over = True
                await asyncio.gather(*sessions)
                await self._wait_whole(client)
            finally:
                for task in (*sessions, *self._coming):
                    task.cancel()
                await asyncio.gather(*sessions, *self._coming, return_exceptions=True)
            status = await client.status()
        report = self.report
        names = ("finished", "failed", "restarts", "failovers", "suspected", "asked", "late")
        report.counters = {name: sum(int(getattr(c.stats, name)) for c in status.coordinators) for name in names}
        report.median_step_s = statistics.median(b - a for a, b in self._gaps)
        for at, kind in self._struck:
            report.pauses.setdefault(kind, []).extend(b - a for a, b in self._gaps if a <= at < b)
        report.wall_s = time.perf_counter() - began
        return report

    # -- load ----------------------------------------------------------------------------------------------------------

    async def _session(self, client: AsyncMeshClient, random: Random) -> None:
        while not self._over or self.report.generations < self.plan.generations:
            await self._generate(client, random.choice(self.wishes))

    async def _generate(self, client: AsyncMeshClient, wish: Wish) -> None:
        report = self.report
        seen: list[int] = []
        last = None
        try:
            async with client.stream(tokens=wish.tokens, max_tokens=wish.max_tokens, ignore_eos=True, **wish.options) as stream:
                async for chunk in stream:
                    if chunk.token is None:
                        continue
                    now = time.perf_counter()
                    if last is not None:
                        self._gaps.append((last, now))
                    last = now
                    if chunk.index < len(seen):
                        report.repeated += 1
                        continue
                    report.lost += chunk.index - len(seen)
                    seen.append(chunk.token.id)
        except MeshError as error:
            report.failed.append(f"after {len(seen)} tokens: {error.code}: {error}")
            return
        report.generations += 1
        report.tokens += len(seen)
        report.lost += max(len(wish.expected) - len(seen), 0)
        different = [index for index, (a, b) in enumerate(zip(seen, wish.expected, strict=False)) if a != b]
        report.wrong += len(different)
        if different:
            first = different[0]
            report.differences.append(
                f"{len(different)} tokens of {len(seen)} from {first} on ({seen[first : first + 4]}, not "
                f"{wish.expected[first : first + 4]}), {len(wish.tokens)} of prompt, {wish.options}"
            )

    # -- disturbances --------------------------------------------------------------------------------------------------

    async def _disturb(self) -> None:
        plan, random = self.plan, self.random
        todo = ["kill"] * plan.kills + ["stop"] * plan.stops + ["server"] * plan.server_restarts
        random.shuffle(todo)
        for what in todo:
            await asyncio.sleep(random.uniform(*plan.gap_s))
            while len(self._away) >= AWAY_MOST:
                self._check_coming()
                await asyncio.sleep(0.05)
            away_s = random.uniform(*plan.away_s)
            if what == "server":
                await self._restart_server(away_s / 3)
                continue
            name = random.choice([name for name in sorted(self.mesh.processes) if self._may_go(name)])
            kind = f"{what} {name.partition('-')[0]}"
            self._away.add(name)
            self._struck.append((time.perf_counter(), kind))
            self.report.done[kind] += 1
            process = self.mesh.processes[name]
            os.kill(process.pid, signal.SIGKILL if what == "kill" else signal.SIGSTOP)
            back = self._start_again(name, away_s) if what == "kill" else self._go_on(name, process.pid, away_s * 3)
            self._coming.add(asyncio.create_task(back))
            self._check_coming()
        while self._away:
            self._check_coming()
            await asyncio.sleep(0.05)

    def _check_coming(self) -> None:
        """Raise the error of a process that could not be brought back."""
        for task in [task for task in self._coming if task.done()]:
            self._coming.discard(task)
            task.result()

    def _may_go(self, name: str) -> bool:
        if name in self._away:
            return False
        return name.startswith("shard") or not any(other.startswith("coordinator") for other in self._away)

    async def _start_again(self, name: str, away_s: float) -> None:
        await asyncio.sleep(away_s)
        self.mesh.restart(name)
        await self._wait_there(name)
        self._away.discard(name)

    async def _go_on(self, name: str, pid: int, away_s: float) -> None:
        await asyncio.sleep(away_s)
        os.kill(pid, signal.SIGCONT)
        await self._wait_there(name)
        self._away.discard(name)

    async def _restart_server(self, away_s: float) -> None:
        server = self.mesh.server
        assert server is not None
        self.report.done["restart nats-server"] += 1
        self._struck.append((time.perf_counter(), "restart nats-server"))
        server.kill()
        await asyncio.sleep(away_s)
        server.revive()

    async def _wait_there(self, name: str) -> None:
        """Wait until the process of this name says that it serves. The check has a connection of its own, because others may be broken."""
        while True:
            pid = self.mesh.processes[name].pid
            try:
                async with AsyncMeshClient(self.mesh.url, model=self.mesh.manifest.name) as client:
                    status = await client.status()
                    ready = {lease.pid for lease in status.shards if lease.state == "ready"}
                    ready |= {int(coordinator.stats.pid) for coordinator in status.coordinators}
                    if pid in ready:
                        return
            except MeshError as error:
                print(f"{name}: {error}", file=sys.stderr)
            if self.mesh.processes[name].poll() is not None:
                raise RuntimeError(f"{name} ended by itself with code {self.mesh.processes[name].returncode}")
            await asyncio.sleep(0.3)

    async def _wait_whole(self, client: AsyncMeshClient) -> None:
        """Wait until every row is free again, which shows that no row leaked."""
        while True:
            leases = (await client.status()).shards
            if len(leases) == self.mesh.shard_count and all(lease.free_rows == lease.rows for lease in leases):
                return
            await asyncio.sleep(0.3)


def run(model: Path, plan: Plan, seed: int, *, mode: str, coordinators: int = 2, logs: Path | None = None) -> Report:
    wishes = make_wishes(model, plan, seed)
    options = LocalOptions(
        model=model,
        shards=3,
        replicas=2,
        mode=mode,
        coordinators=coordinators,
        rows=max(plan.sessions, ROWS),
        context=CONTEXT,
        failover_timeout_s=180.0,
        http=False,
        logs=logs,
    )
    with LocalMesh(options) as mesh:
        return asyncio.run(Chaos(mesh, wishes, plan, seed).run())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--stops", type=int, default=20)
    parser.add_argument("--server-restarts", type=int, default=5)
    parser.add_argument("--sessions", type=int, default=Plan.sessions)
    parser.add_argument("--max-tokens", type=int, nargs=2, default=Plan.max_tokens, metavar=("LEAST", "MOST"))
    parser.add_argument("--generations", type=int, default=0)
    parser.add_argument("--gap", type=float, default=Plan.gap_s[1], help="the longest time between two disturbances, s")
    parser.add_argument("--coordinators", type=int, default=2)
    parser.add_argument("--mode", choices=("balance", "mirror"), default="balance")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    plan = Plan(
        args.kills,
        args.stops,
        args.server_restarts,
        sessions=args.sessions,
        generations=args.generations,
        max_tokens=(args.max_tokens[0], args.max_tokens[1]),
        gap_s=(Plan.gap_s[0], args.gap),
    )
    with tempfile.TemporaryDirectory() as folder:
        report = run(make_model(Path(folder)), plan, args.seed, mode=args.mode, coordinators=args.coordinators, logs=args.logs)
    document = {"mode": args.mode, "seed": args.seed, **report.as_dict()}
    text = json.dumps(document, indent=1)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    return 0 if report.clean else 1


def make_model(folder: Path) -> Path:
    """A llama of 3 layers with random weights."""
    from mesh.importer.options import ImportOptions
    from mesh.importer.run import import_model

    import_model(ROOT / "tests" / "fixtures" / "onnx" / "llama-dynamo.onnx", folder / "tiny", ImportOptions(), name="tiny")
    return folder / "tiny"


if __name__ == "__main__":
    sys.exit(main())
