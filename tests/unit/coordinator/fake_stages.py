"""A perfect model of shards and of the network between them and a coordinator, for tests of the core.

Every message waits in a box until the test takes it out, in any order that NATS could deliver it in: messages of one sender to
one receiver keep their order, all others do not. A stage remembers the tokens of each row by position; the last one answers with
a function of everything before and at the position. So a token is right only if every stage has the whole history, in the right
row, at the right positions.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from mesh.coordinator.core import Core
from mesh.coordinator.events import (
    CloseRow,
    Effect,
    Emit,
    Ended,
    Event,
    FrameLost,
    FrameOut,
    Opened,
    OpenRefused,
    OpenRow,
    Rejected,
    ReplicaGone,
    ReplicaSeen,
    Result,
    ResultRow,
    Submit,
)
from mesh.coordinator.routing import Replica
from mesh.coordinator.session import Request
from mesh.errors import Busy, Unavailable
from mesh.types import LayerRange

__all__ = ["FakeMesh", "Sampled", "expected"]

VOCABULARY = 50


@dataclass(frozen=True)
class Sampled:
    id: int


def next_token(history: Sequence[int]) -> int:
    value = 7
    for token in history:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCABULARY


def expected(request: Request) -> list[int]:
    """The tokens of an undisturbed generation."""
    history = list(request.prompt)
    while len(history) - len(request.prompt) < request.max_tokens:
        token = next_token(history)
        if token in request.stop_ids:
            break
        history.append(token)
    return history[len(request.prompt) :]


@dataclass
class Shard:
    replica: Replica
    rows: dict[int, int] = field(default_factory=dict)  # row -> key
    cache: dict[int, dict[int, int]] = field(default_factory=dict)  # row -> position -> token

    def row_of(self, key: int) -> int | None:
        return next((row for row, held in self.rows.items() if held == key), None)

    def check(self) -> None:
        assert len(set(self.rows.values())) == len(self.rows), "one session in two rows"


class FakeMesh:
    """The core, its shards, and what is under way. `tokens` and `ended` are what clients saw."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.now = 0.0
        self.shards: dict[str, Shard] = {}
        self.boxes: dict[tuple[str, str], deque[object]] = {}
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.ended: dict[str, Ended] = {}
        self.rejected: dict[str, Rejected] = {}
        self.frames: list[FrameOut] = []

    # -- what a test does ----------------------------------------------------------------------------------------------

    def event(self, event: Event) -> None:
        for effect in self.core.handle(event, self.now):
            self._carry_out(effect)
        self.check()

    def join(self, shard: str, layers: LayerRange, *, rows: int = 2, context: int = 64, chunk: int = 4, instance: str = "") -> None:
        replica = Replica(shard, layers, rows, rows, context, chunk, instance)
        self.shards[shard] = Shard(replica)
        self.event(ReplicaSeen(replica))

    def lease(self, shard: str) -> None:
        there = self.shards[shard]
        free = there.replica.rows - len(there.rows)
        r = there.replica
        self.event(ReplicaSeen(Replica(r.shard, r.layers, r.rows, free, r.context, r.chunk, r.instance)))

    def kill(self, shard: str, *, noticed: bool = True) -> None:
        """The process dies: what was on its way to it is lost."""
        del self.shards[shard]
        for pair in [pair for pair in self.boxes if shard in pair]:
            for message in self.boxes.pop(pair):
                if isinstance(message, OpenRow | Opened | OpenRefused):  # the requester's time runs out
                    self._send("nobody", "core", OpenRefused(message.key, message.stage, False, Unavailable("no answer")))
        if noticed:
            self.event(ReplicaGone(shard))

    def submit(self, request: Request) -> None:
        self.requests[request.id] = request
        self.tokens[request.id] = []
        self.event(Submit(request))

    def deliver(self, random: Random) -> bool:
        """One message, of any sender to any receiver, arrives."""
        pairs = sorted(pair for pair, box in self.boxes.items() if box)
        if not pairs:
            return False
        pair = random.choice(pairs)
        message = self.boxes[pair].popleft()
        if pair[1] == "core":
            assert isinstance(message, (Opened, OpenRefused, Result, FrameLost))
            self.event(message)
        elif pair[1] in self.shards:
            self._arrive(self.shards[pair[1]], message)
        return True

    def settle(self, random: Random) -> None:
        while self.deliver(random):
            pass

    def check(self) -> None:
        self.core.check()
        for shard in self.shards.values():
            shard.check()
        for id, tokens in self.tokens.items():
            assert tokens == expected(self.requests[id])[: len(tokens)], f"{id}: wrong, lost or repeated tokens"

    # -- inside --------------------------------------------------------------------------------------------------------

    def _send(self, sender: str, receiver: str, message: object) -> None:
        self.boxes.setdefault((sender, receiver), deque()).append(message)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case OpenRow(shard=shard, layers=layers):
                if shard is None:
                    free = [s for s in self.shards.values() if s.replica.layers == layers]
                    shard = max(free, key=lambda s: s.replica.rows - len(s.rows)).replica.shard if free else None
                if shard is None or shard not in self.shards:
                    error = Unavailable("nobody listens")
                    self._send("nobody", "core", OpenRefused(effect.key, effect.stage, False, error))
                else:
                    self._send("core", shard, effect)
            case CloseRow(shard=shard):
                self._send("core", shard, effect)
            case FrameOut(route=route):
                self.frames.append(effect)
                self._send("core", str(route[0].shard), (effect, 0))
            case Emit(session=id, index=index, token=token):
                assert id not in self.ended and id not in self.rejected
                assert index == len(self.tokens[id]), "a token out of order"
                self.tokens[id].append(token.id)
            case Ended(session=id):
                assert id not in self.ended
                self.ended[id] = effect
            case Rejected(session=id):
                self.rejected[id] = effect

    def _arrive(self, shard: Shard, message: object) -> None:
        name = shard.replica.shard
        match message:
            case OpenRow(key=key, stage=stage):
                row = shard.row_of(key)
                if row is None:
                    row = next((row for row in range(shard.replica.rows) if row not in shard.rows), None)
                if row is None:
                    self._send(name, "core", OpenRefused(key, stage, True, Busy("full", retry_after_s=1)))
                    return
                shard.rows[row] = key
                shard.cache[row] = {}
                self._send(name, "core", Opened(key, stage, name, row))
            case CloseRow(key=key):
                row = shard.row_of(key)
                if row is not None:
                    del shard.rows[row]
            case (FrameOut() as out, int(stage)):
                self._compute(shard, out, stage)

    def _compute(self, shard: Shard, out: FrameOut, stage: int) -> None:
        name = shard.replica.shard
        kept, gone = [], []
        for row in out.rows:
            (kept if shard.rows.get(row.rows[stage]) == row.key else gone).append(row)
        if gone:
            self._send(name, "core", FrameLost(out.frame, frozenset(row.key for row in gone), name))
        if not kept:
            return
        for row in kept:
            cache = shard.cache[row.rows[stage]]
            assert all(position in cache for position in range(row.start)), "a hole in the history"
            for offset, token in enumerate(row.tokens):
                cache[row.start + offset] = token
        if stage + 1 < len(out.route):
            passed = FrameOut(out.frame, out.kind, out.route, tuple(kept), out.last)
            self._send(name, str(out.route[stage + 1].shard), (passed, stage + 1))
            return
        answers = []
        for row in kept if out.last else ():
            position = row.start + len(row.tokens) - 1
            cache = shard.cache[row.rows[stage]]
            answers.append(ResultRow(row.key, position, Sampled(next_token([cache[p] for p in range(position + 1)]))))
        self._send(name, "core", Result(out.frame, tuple(answers)))
