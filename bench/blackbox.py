"""Kill and suspend everything at its worst moments, with clients of every kind, and compare every token with an undisturbed run.

    python bench/blackbox.py [MODEL_DIR] [--generations 2000] [--seed 1] [--mode balance|mirror] [--logs FOLDER] [--out result.json]

A mesh of real processes: a cluster of 3 nats-servers with JetStream, 3 ranges x 2 replicas, 2 coordinators, 2 gateways, and nginx in front
of them. The clients are those of bench/clients.py: the Python client, plain NATS requests, streams over HTTP that go on with Last-Event-ID,
and plain HTTP requests; greedy and sampled. The script knows nothing of the code: it has signals, ports and logs.

The disturbances (DISTURBANCES) come one after the other in a seeded order, until so many generations have ended. A coordinator, a gateway
or a replica is left alone while the other one of its kind is away, and so are two of three nats-servers, except that now and then all
three are killed at once. So somebody can always serve, and a generation without progress is a fault. At most AWAY_MOST processes are
away at once. (bench/chaos.py takes both replicas of a range away.)

A pause is the time between two tokens of a stream around a disturbance, for every stream at that moment, whether it was hit or not.
The exit code is 1 unless every generation was right.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any

import httpx
import numpy as np
from chaos import AWAY_MOST, ROOT, ROWS, VOCABULARY, Chaos, Plan, Wish, make_model, make_wishes
from clients import HANG_S, Load, Ways, generate
from edges import free_ports, gateways, nginx, url_of

from mesh.bus import Bus, BusOptions
from mesh.client import AsyncMeshClient
from mesh.errors import ConfigError, Replaced
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.local.nats_server import NatsServer
from mesh.local.supervisor import Child
from mesh.runtime.sampling import SamplingParams

CONTEXT = 1024
LONG_PROMPT = (600, 900)
GAP_S = (0.5, 3.0)
CLIENTS = {"nats": 4, "plain": 1, "sse": 4, "http": 2}
STREAMS = ("KV_mesh_sessions", "KV_mesh_shards")
"""Whose JetStream leaders are disturbed."""
LEAVES_S = 30.0
"""The earlier one of two shards of one name must end within this time after it went on."""
DISTURBANCES = {
    "kill shard": 6,
    "kill shard that starts": 3,
    "kill shard in a prefill": 5,
    "kill coordinator": 2,
    "kill coordinator after a request": 5,
    "kill gateway": 5,
    "stop shard": 3,
    "stop coordinator": 3,
    "stop gateway": 1,
    "twin of a shard": 2,
    "kill JetStream leader": 3,
    "stop JetStream leader": 3,
    "kill every nats-server": 1,
}
"""Each kind, and how often it comes in a round."""


def make_long_wishes(model: Path, seed: int) -> list[Wish]:
    """Requests whose prefill takes long."""
    from mesh.runtime.generate import Pipeline

    random, pipeline, wishes = Random(seed + 1), Pipeline.load(model, context=CONTEXT), []
    for _ in range(4):
        tokens = [random.randrange(VOCABULARY - 1) for _ in range(random.randint(*LONG_PROMPT))]
        expected = pipeline.complete(tokens, SamplingParams(temperature=0.0), max_tokens=20).ids
        wishes.append(Wish(tokens, 20, {"temperature": 0.0}, expected))
    return wishes


class BlackBox(Chaos):
    """One run. `self._away` has the names of processes that are down or suspended now."""

    def __init__(
        self,
        mesh: LocalMesh,
        servers: list[NatsServer],
        edges: dict[str, Child],
        front: str,
        wishes: list[Wish],
        long_wishes: list[Wish],
        args: argparse.Namespace,
        logs: Path,
    ) -> None:
        super().__init__(mesh, wishes, Plan(gap_s=GAP_S), args.seed)
        self._servers = servers
        self._edges = edges
        self._front = front
        self._long = long_wishes
        self._generations = args.generations
        self._minutes = args.minutes
        self._logs = logs
        self._ways: Ways
        self._load: Load
        self._aimed: list[asyncio.Task[Any]] = []
        self.unruly: list[str] = []

    async def drive(self) -> dict[str, Any]:
        began = time.perf_counter()
        model = self.mesh.manifest.name
        options = BusOptions(tuple(self.mesh.url.split(",")))
        async with (
            await Bus.connect(options, name="blackbox") as bus,
            AsyncMeshClient(options=options, model=model) as client,
            httpx.AsyncClient(base_url=self._front, timeout=2 * HANG_S, limits=httpx.Limits(max_connections=64)) as web,
        ):
            self._ways = Ways(client, bus, web, model)
            self._load = Load(self._ways, list(self.wishes), CLIENTS, Random(self.random.random()))
            self._load.start()
            try:
                await asyncio.sleep(1.0)
                await self._disturb()
                await asyncio.gather(*self._aimed)
                await self._load.stop()
                async with asyncio.timeout(2 * HANG_S):
                    await self._wait_whole(client)
            except TimeoutError:
                self.unruly.append("some rows were not given back")
            finally:
                await self._load.end()
                for task in (*self._aimed, *self._coming):
                    task.cancel()
                await asyncio.gather(*self._aimed, *self._coming, return_exceptions=True)
            status = await client.status()
        names = ("finished", "failed", "restarts", "failovers", "suspected", "asked", "late")
        return {
            **self._load.tally.as_dict(),
            "disturbances": dict(sorted(self.report.done.items())),
            "pauses": self._pauses(),
            "coordinators": {name: sum(int(getattr(c.stats, name)) for c in status.coordinators) for name in names},
            "unruly": self.unruly,
            "wall_s": round(time.perf_counter() - began, 1),
            "text": self._load.tally.table(),
            "bad": self._load.tally.bad,
        }

    def _pauses(self) -> dict[str, dict[str, float]]:
        """Of streams alone: a whole answer has no tokens to wait between."""
        gaps = [(a, b) for kind, a, b in self._load.tally.gaps if kind in ("nats", "sse")]
        since, until = np.array(gaps).T
        found: dict[str, list[float]] = {"none": (until - since).tolist()}
        for at, kind in self._struck:
            hit = (since <= at) & (at < until)
            found.setdefault(kind, []).extend((until - since)[hit].tolist())
        return {
            kind: {
                "count": len(seconds),
                "p50_ms": round(1e3 * float(np.median(seconds)), 1),
                "p99_ms": round(1e3 * float(np.quantile(seconds, 0.99, method="higher")), 1),
                "max_ms": round(1e3 * max(seconds), 1),
            }
            for kind, seconds in sorted(found.items())
            if seconds
        }

    # -- disturbances --------------------------------------------------------------------------------------------------

    async def _disturb(self) -> None:
        todo: list[str] = []
        ends = time.monotonic() + 60 * self._minutes
        while self._load.tally.generations < self._generations and time.monotonic() < ends:
            if not todo:
                todo = [kind for kind, count in DISTURBANCES.items() for _ in range(count)]
                self.random.shuffle(todo)
            await asyncio.sleep(self.random.uniform(*self.plan.gap_s))
            await self._until(lambda: len(self._away) < AWAY_MOST)
            self._load.check()
            await self._strike(todo.pop())
            self._check_coming()
        await self._until(lambda: not self._away)

    async def _until(self, hold: Callable[[], bool]) -> None:
        while not hold():
            self._check_coming()
            await asyncio.sleep(0.05)

    async def _strike(self, kind: str) -> None:
        group = next(group for group in ("shard", "coordinator", "gateway", "leader", "server") if group in kind)
        if kind == "kill every nats-server":
            await self._until(lambda: not any(name.startswith("server") for name in self._away))
            self._note(kind)
            for server in self._servers:
                server.kill()
            await asyncio.sleep(self.random.uniform(0.0, 1.0))
            for server in self._servers:
                server.revive()
            return
        if group == "leader":
            await self._until(lambda: not any(name.startswith("server") for name in self._away))
            leader = await self._leader(self.random.choice(STREAMS))
            if leader is not None:
                self._go(f"server-{leader}", kind, self._without_leader(self._servers[leader], kind))
            return
        await self._until(lambda: bool(self._candidates(group)))
        name = self.random.choice(self._candidates(group))
        away_s = self.random.uniform(*self.plan.away_s)
        pid = self._pid(name)
        match kind:
            case "kill shard in a prefill":
                for client in ("nats", "sse"):
                    self._aim(client, self.random.choice(self._long))
                await asyncio.sleep(self.random.uniform(0.0, 0.15))
            case "kill coordinator after a request":
                for client in ("nats", "plain", "sse", "http"):
                    self._aim(client, self.random.choice(self.wishes))
                await asyncio.sleep(self.random.uniform(0.0, 0.2))
        if kind.startswith("stop"):
            self._go(name, kind, self._go_on(name, pid, away_s * 3 if group != "gateway" else away_s))
            os.kill(pid, signal.SIGSTOP)
        elif kind == "twin of a shard":
            os.kill(pid, signal.SIGSTOP)
            self._go(name, kind, self._twin(name, pid, self.random.choice((None, self.random.uniform(0.0, 8.0)))))
        elif kind == "kill shard that starts":
            os.kill(pid, signal.SIGKILL)
            self._go(name, kind, self._kill_again(name, away_s, self.random.choice(("loading layers", "compiling"))))
        else:
            os.kill(pid, signal.SIGKILL)
            self._go(name, kind, self._start_again(name, away_s))

    def _note(self, kind: str, name: str = "") -> None:
        self._struck.append((time.perf_counter(), kind))
        self.report.done[kind] += 1
        count = self._load.tally
        print(f"{time.strftime('%H:%M:%S')} {kind} {name} ({count.generations} generations, {count.bad} bad)", file=sys.stderr, flush=True)

    def _go(self, name: str, kind: str, back: Awaitable[None]) -> None:
        """A disturbance of `name` begins; it is over when `back` has ended."""
        self._away.add(name)
        self._note(kind, name)

        async def over() -> None:
            await back
            self._away.discard(name)

        self._coming.add(asyncio.create_task(over()))

    def _aim(self, client: str, wish: Wish) -> None:
        self._aimed = [task for task in self._aimed if not task.done()]
        self._aimed.append(asyncio.create_task(generate(self._ways, client, wish, self._load.tally)))

    def _pid(self, name: str) -> int:
        return self._edges[name].pid if name in self._edges else self.mesh.processes[name].pid

    def _candidates(self, group: str) -> list[str]:
        return [
            name for name in sorted((*self.mesh.processes, *self._edges)) if name.startswith(group) and not self._peers(name) & self._away
        ]

    def _peers(self, name: str) -> set[str]:
        """The processes that can stand in for this one, and itself."""
        group, _, number = name.partition("-")
        first = (int(number) - 1) // 2 * 2 + 1  # two of each: coordinators, gateways, and replicas of a range
        return {f"{group}-{first}", f"{group}-{first + 1}"}

    async def _start_again(self, name: str, away_s: float) -> None:
        await asyncio.sleep(away_s)
        if name in self._edges:
            self._edges[name].kill()
            self._edges[name].revive()
        else:
            self.mesh.restart(name)
        await self._wait_there(name)

    async def _wait_there(self, name: str) -> None:
        if name not in self._edges:
            await super()._wait_there(name)
            return
        async with httpx.AsyncClient(base_url=url_of(self._edges[name])) as web:
            while True:
                try:
                    if (await web.get("/api/v1/health/live", timeout=5)).status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                if self._edges[name].returncode is not None:
                    raise RuntimeError(f"{name} ended by itself: {self._edges[name].log[-3:]}")
                await asyncio.sleep(0.1)

    async def _kill_again(self, name: str, away_s: float, said: str) -> None:
        """Kill a shard that starts, as soon as its log says how far it is."""
        await asyncio.sleep(away_s / 3)
        log = self._logs / f"{name}.log"
        before = log.stat().st_size
        self.mesh.restart(name)
        process = self.mesh.processes[name]
        while process.poll() is None:
            with log.open("rb") as file:
                file.seek(before)
                if said.encode() in file.read():
                    break
            await asyncio.sleep(0.02)
        await asyncio.sleep(self.random.uniform(0.0, 0.3))
        self._note(f"killed while {said.split()[0]}", name)
        process.kill()
        await self._start_again(name, away_s)

    async def _twin(self, name: str, pid: int, after_s: float | None) -> None:
        """A replacement of the same name starts while the first one is suspended. The first one goes on when the replacement serves, or
        after `after_s`. One of them must stay and serve, and the other one must end: the first one as replaced, or the replacement because
        the name is taken, if the first one went on before the replacement had asked."""
        child = self.mesh._children[name]
        first = child.process
        await asyncio.sleep(self.random.uniform(0.0, 2.0))
        second = Child(child.command, self._logs / f"{name}-twin-{time.time_ns()}.log", child.environment).process
        child.process = second
        if after_s is None:
            await self._wait_there(name)
        else:
            await asyncio.sleep(after_s)
        self._note("a twin goes on", name)
        os.kill(pid, signal.SIGCONT)
        deadline = time.monotonic() + LEAVES_S
        while first.poll() is None and second.poll() is None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if second.poll() is not None and second.returncode == ConfigError.exit_code and first.poll() is None:
            child.process = first
        elif first.poll() is None:
            self.unruly.append(f"{name}: of two twins both live after {LEAVES_S:g} s")
            first.kill()
        elif first.returncode != Replaced.exit_code or second.poll() is not None:
            self.unruly.append(
                f"{name}: the twins ended with {first.returncode} and {second.poll()}, not with {Replaced.exit_code} and not"
            )
        await self._wait_there(name)

    async def _leader(self, stream: str) -> int | None:
        try:
            info = await self._ways.bus.client.jetstream().stream_info(stream)
        except Exception:  # it is being chosen
            return None
        return int(info.cluster.leader.removeprefix("mesh-")) - 1 if info.cluster and info.cluster.leader else None

    async def _without_leader(self, server: NatsServer, kind: str) -> None:
        away_s = self.random.uniform(1.0, 8.0)
        if kind.startswith("kill"):
            server.kill()
            await asyncio.sleep(away_s)
            server.revive()
        else:
            os.kill(server.pid, signal.SIGSTOP)
            await asyncio.sleep(away_s)
            os.kill(server.pid, signal.SIGCONT)
        await asyncio.sleep(2.0)  # until it has caught up with the others; two of three are always there


def start_cluster(folder: Path, stack: ExitStack) -> list[NatsServer]:
    """Three servers as nats/cluster-*.conf describe them but for the ports."""
    ports = free_ports(6)
    routes = ",".join(f"nats://127.0.0.1:{port}" for port in ports[3:])
    servers = []
    for index in range(3):
        name = f"cluster-{index + 1}"
        (folder / name).mkdir()
        arguments = ("--cluster_listen", f"nats://127.0.0.1:{ports[3 + index]}", "--routes", routes)
        config = ROOT / "nats" / f"{name}.conf"
        server = NatsServer.start(config=config, directory=folder / name, port=ports[index], arguments=arguments)
        servers.append(stack.enter_context(server))
    return servers


def table(pauses: dict[str, dict[str, float]], done: dict[str, int]) -> str:
    lines = ["| disturbance | count | pauses | median ms | p99 ms | max ms |", "|---|---|---|---|---|---|"]
    for kind, one in pauses.items():
        cells = (kind, done.get(kind, ""), one["count"], one["p50_ms"], one["p99_ms"], one["max_ms"])
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> dict[str, Any]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = args.model or make_model(folder)
        wishes = make_wishes(model, Plan(max_tokens=(20, 120)), args.seed)
        long_wishes = make_long_wishes(model, args.seed)
        logs = args.logs or folder
        logs.mkdir(parents=True, exist_ok=True)
        servers = start_cluster(folder, stack)
        nats = ",".join(server.url for server in servers)
        options = LocalOptions(
            model=model,
            nats=nats,
            shards=3,
            replicas=2,
            mode=args.mode,
            coordinators=2,
            rows=ROWS,
            context=CONTEXT,
            failover_timeout_s=180.0,
            http=False,
            logs=logs,
        )
        mesh = stack.enter_context(LocalMesh(options))
        edges = stack.enter_context(gateways(2, nats, logs))
        front = stack.enter_context(nginx([url_of(edge) for edge in edges.values()], folder))
        return asyncio.run(BlackBox(mesh, servers, edges, front, wishes, long_wishes, args, logs).drive())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="a model directory (default: the tiny one of the tests)")
    parser.add_argument("--generations", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=60.0, help="the longest time")
    parser.add_argument("--mode", choices=("balance", "mirror"), default="balance")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logs", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    os.environ.setdefault("MESH_RESOURCES_WORKER_THREADS", "1")
    result = run(args)
    print(result.pop("text"))
    print(f"\n{table(result['pauses'], result['disturbances'])}")
    failed = bool(result.pop("bad") or result["unruly"])
    if args.out is not None:
        args.out.write_text(json.dumps({"mode": args.mode, "seed": args.seed, **result}, indent=1) + "\n")
    for line in (*result["faults"], *result["unruly"]):
        print(line)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
