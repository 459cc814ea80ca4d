"""Clients of four kinds that compare every token with a reference: what bench/blackbox.py and bench/soak.py put on a mesh.

    nats      the Python client, streaming
    plain     one NATS request with a `session` and a `seed`, answered by one message, as `nats req` sends it
    sse       HTTP, streaming; goes on with Last-Event-ID, as docs/http.md describes
    http      HTTP, one answer; sent again after a 502 of the load balancer

Each generation gets one verdict: right, lost (a token is missing), repeated, wrong, error, or hang (nothing came for HANG_S).
"""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from typing import Any

import httpx
from chaos import Wish

from mesh.bus import Bus, Received
from mesh.bus.connection import ERROR_HEADER
from mesh.client import AsyncMeshClient
from mesh.errors import MeshError

HANG_S = 60.0
"""A generation that makes no progress for so long hangs."""
PLAIN_AGAIN_S = 15.0
"""A plain NATS request is sent again after so long without an answer. nats/README.md says that this is safe with a session and a seed."""
AGAIN_S = 0.2
"""Before a stream over HTTP is begun again."""
KINDS = ("nats", "plain", "sse", "http")
VERDICTS = ("right", "lost", "repeated", "wrong", "error", "hang")


@dataclass
class Generation:
    """One generation as its client sees it. at_s: the perf_counter times at which it began and at which each token came."""

    kind: str
    wish: Wish
    seen: list[int] = field(default_factory=list)
    at_s: list[float] = field(default_factory=lambda: [time.perf_counter()])
    lost: int = 0
    repeated: int = 0
    again: int = 0
    failed: str = ""
    hung: bool = False

    def take(self, index: int, token: int) -> None:
        """A token came, as the one of this index."""
        self.at_s.append(time.perf_counter())
        if index < len(self.seen):
            self.repeated += 1
            return
        self.lost += index - len(self.seen)
        self.seen.append(token)

    @property
    def wrong(self) -> int:
        return sum(a != b for a, b in zip(self.seen, self.wish.expected, strict=False))

    def verdict(self, *, whole: bool = True) -> str:
        """`whole`: the generation was to run to its end; otherwise what came must be the beginning of the answer."""
        missing = len(self.wish.expected) - len(self.seen) if whole else 0
        for name, fault in (("hang", self.hung), ("error", bool(self.failed)), ("repeated", self.repeated), ("lost", self.lost)):
            if fault:
                return name
        return "wrong" if self.wrong else "lost" if missing > 0 else "repeated" if missing < 0 else "right"

    def described(self) -> str:
        first = next((i for i, (a, b) in enumerate(zip(self.seen, self.wish.expected, strict=False)) if a != b), None)
        place = "" if first is None else f", {self.wrong} differ from token {first} on"
        asked = f"{len(self.wish.tokens)} tokens of prompt, {self.wish.options}, sent again {self.again} times"
        return f"{self.kind}: {len(self.seen)} of {len(self.wish.expected)} tokens{place}; {asked}; {self.failed}"


@dataclass
class Tally:
    """What became of all generations."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind, verdict)
    again: Counter[str] = field(default_factory=Counter)  # how often the clients of a kind sent a request again
    left: int = 0  # generations that their clients left
    tokens: int = 0
    faults: list[str] = field(default_factory=list)
    gaps: deque[tuple[str, float, float]] = field(default_factory=deque)  # kind, begin, end: the time between two tokens

    def add(self, generation: Generation, *, whole: bool = True) -> None:
        verdict = generation.verdict(whole=whole)
        self.counts[generation.kind, verdict] += 1
        self.again[generation.kind] += generation.again
        self.left += not whole
        self.tokens += len(generation.seen)
        if verdict != "right":
            self.faults.append(f"{time.strftime('%H:%M:%S')} {verdict}: {generation.described()}")
            print(self.faults[-1], file=sys.stderr, flush=True)
        at = generation.at_s
        self.gaps.extend((generation.kind, a, b) for a, b in pairwise(at))

    @property
    def generations(self) -> int:
        return sum(self.counts.values())

    @property
    def bad(self) -> int:
        return sum(count for (_, verdict), count in self.counts.items() if verdict != "right")

    def as_dict(self) -> dict[str, Any]:
        return {
            "generations": self.generations,
            "tokens": self.tokens,
            "left_early": self.left,
            "verdicts": {verdict: sum(self.counts[kind, verdict] for kind in KINDS) for verdict in VERDICTS},
            "by_client": {kind: {v: self.counts[kind, v] for v in VERDICTS if self.counts[kind, v]} for kind in KINDS},
            "sent_again": dict(self.again),
            "faults": self.faults,
        }

    def table(self) -> str:
        lines = ["client | " + " | ".join(VERDICTS) + " | sent again", "---|" + "---|" * len(VERDICTS) + "---"]
        for kind in (*KINDS, "together"):
            of = KINDS if kind == "together" else (kind,)
            counts = [str(sum(self.counts[one, verdict] for one in of)) for verdict in VERDICTS]
            lines.append(" | ".join((kind, *counts, str(sum(self.again[one] for one in of)))))
        return "\n".join(f"| {line} |" if not line.startswith("---") else f"|{line}|" for line in lines)


@dataclass(frozen=True)
class Ways:
    """How the clients reach the mesh."""

    client: AsyncMeshClient
    bus: Bus
    http: httpx.AsyncClient  # its base URL is that of the load balancer, or of a gateway
    model: str


Client = Callable[[Ways, Generation, int | None], Awaitable[None]]


async def generate(ways: Ways, kind: str, wish: Wish, tally: Tally, leave_after: int | None = None) -> Generation:
    """Generate once and count the verdict. leave_after: the client leaves after so many tokens."""
    generation = Generation(kind, wish)
    try:
        await CLIENTS[kind](ways, generation, leave_after)
    except TimeoutError:
        generation.hung = True
    except MeshError as error:
        generation.failed = f"{error.code}: {error}"
    except httpx.HTTPError as error:
        generation.failed = f"{type(error).__name__}: {error}"
    tally.add(generation, whole=leave_after is None)
    return generation


async def _nats(ways: Ways, generation: Generation, leave_after: int | None) -> None:
    wish = generation.wish
    async with ways.client.stream(tokens=wish.tokens, max_tokens=wish.max_tokens, ignore_eos=True, **wish.options) as stream:
        while True:
            async with asyncio.timeout(HANG_S):
                try:
                    chunk = await anext(stream)
                except StopAsyncIteration:
                    return
            if chunk.token is not None:
                generation.take(chunk.index, chunk.token.id)
            if leave_after is not None and len(generation.seen) >= leave_after:
                return


async def _plain(ways: Ways, generation: Generation, leave_after: int | None) -> None:
    answers: asyncio.Queue[Received] = asyncio.Queue()
    inbox = ways.bus.new_inbox()
    subscription = await ways.bus.subscribe(inbox, answers.put)
    session = secrets.token_hex(16)
    body = {**_body(generation.wish), "session": session}
    body.setdefault("seed", 1)
    try:
        async with asyncio.timeout(HANG_S):
            while True:
                await ways.bus.publish(f"mesh.v1.{ways.model}.generate", json.dumps(body).encode(), reply=inbox)
                try:
                    async with asyncio.timeout(PLAIN_AGAIN_S):
                        answer = await answers.get()
                except TimeoutError:
                    generation.again += 1
                    continue
                if answer.headers.get("Status") == "503":  # no coordinator listens at this moment
                    generation.again += 1
                    await asyncio.sleep(AGAIN_S)
                    continue
                break
        if ERROR_HEADER in answer.headers:
            generation.failed = f"{answer.headers[ERROR_HEADER]}: {answer.data[:300].decode(errors='replace')}"
            return
        for index, token in enumerate(json.loads(answer.data)["tokens"]):
            generation.take(index, token)
    finally:
        await subscription.stop()


async def _sse(ways: Ways, generation: Generation, leave_after: int | None) -> None:
    body = {**_body(generation.wish), "stream": True}
    last_id: str | None = None
    heard_s = time.monotonic()
    while True:
        if time.monotonic() - heard_s > HANG_S:
            raise TimeoutError
        headers = {} if last_id is None else {"Last-Event-ID": last_id}
        try:
            async with ways.http.stream("POST", "/api/v1/inference", json=body, headers=headers) as answer:
                if answer.status_code >= 500:  # no gateway is there, or it has no mesh
                    generation.failed = f"{answer.status_code}: {(await answer.aread())[:300].decode(errors='replace')}"
                elif answer.status_code != 200:
                    generation.failed = f"{answer.status_code}: {(await answer.aread())[:300].decode(errors='replace')}"
                    return
                else:
                    lines = answer.aiter_lines()
                    event_id, data = None, None
                    while True:
                        left_s = heard_s + HANG_S - time.monotonic()
                        async with asyncio.timeout(max(left_s, 0.0)):  # comments that keep the connection are no progress
                            try:
                                line = await anext(lines)
                            except StopAsyncIteration:
                                break
                        if line.startswith("id: "):
                            event_id = line.removeprefix("id: ")
                        elif line.startswith("data: "):
                            data = line.removeprefix("data: ")
                        elif not line and data is not None:
                            document, data = json.loads(data), None
                            generation.failed = ""
                            heard_s = time.monotonic()
                            if "error" in document:
                                generation.failed = json.dumps(document["error"])
                                return
                            if document["done"]:
                                if document["tokens"] != generation.seen:
                                    generation.failed = f"the last event has {len(document['tokens'])} other tokens"
                                return
                            last_id = event_id or last_id
                            generation.take(document["index"], document["token"])
                            if leave_after is not None and len(generation.seen) >= leave_after:
                                return
        except httpx.TransportError as error:
            generation.failed = f"{type(error).__name__}: {error}"
        generation.again += 1
        await asyncio.sleep(AGAIN_S)


async def _http(ways: Ways, generation: Generation, leave_after: int | None) -> None:
    async with asyncio.timeout(HANG_S):
        while True:
            answer = await ways.http.post("/api/v1/inference", json=_body(generation.wish))
            if answer.status_code != 502:
                break
            generation.again += 1  # the load balancer has lost the gateway, and the other one before
            await asyncio.sleep(AGAIN_S)
    if answer.status_code != 200:
        generation.failed = f"{answer.status_code}: {answer.text[:300]}"
        return
    for index, token in enumerate(answer.json()["tokens"]):
        generation.take(index, token)


CLIENTS: dict[str, Client] = {"nats": _nats, "plain": _plain, "sse": _sse, "http": _http}


def _body(wish: Wish) -> dict[str, Any]:
    return {"tokens": wish.tokens, "max_tokens": wish.max_tokens, "ignore_eos": True, **wish.options}


@dataclass
class Load:
    """Clients that generate one after another until `stop`. `numbers`: how many of each kind. `leaving`: the share of generations that
    their clients leave early."""

    ways: Ways
    wishes: list[Wish]
    numbers: dict[str, int]
    random: Random
    leaving: float = 0.0
    tally: Tally = field(default_factory=Tally)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)
    _over: bool = False

    def start(self) -> None:
        for kind, number in self.numbers.items():
            for _ in range(number):
                self._tasks.append(asyncio.create_task(self._client(kind, Random(self.random.random()))))

    async def _client(self, kind: str, random: Random) -> None:
        while not self._over:
            wish = random.choice(self.wishes)
            leave_after = None
            if kind in ("nats", "sse") and random.random() < self.leaving:
                leave_after = random.randrange(1, max(2, wish.max_tokens - 1))
            generation = await generate(self.ways, kind, wish, self.tally, leave_after)
            if generation.failed:
                await asyncio.sleep(AGAIN_S)

    def check(self) -> None:
        """Raise the error that ended a client; that is a fault of this program."""
        for task in self._tasks:
            if task.done():
                task.result()

    async def stop(self) -> None:
        """Let the generations under way end, and wait for them."""
        self._over = True
        await asyncio.gather(*self._tasks)

    async def end(self) -> None:
        """Cancel what runs. Idempotent."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
