"""A perfect model of shards and of the network between them and a coordinator, for tests of the core.

Every message waits in a box until the test takes it out, in any order that NATS could deliver it in: messages of one sender to
one receiver keep their order, all others do not. A stage remembers the tokens of each row by position; the last one answers with
a function of everything before and at the position. So a token is right only if every stage has the whole history, in the right
row, at the right positions. A shard that mirrors gets every frame to the others of its range as well.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

from mesh.coordinator.core.events import (
    CloseRow,
    Effect,
    Emit,
    Ended,
    Event,
    FrameLost,
    FrameOut,
    FrameRow,
    OpenRefused,
    OpenRow,
    PrefixKept,
    Probe,
    ProbeAnswered,
    Rejected,
    ReplicaGone,
    ReplicaSeen,
    Result,
    ResultRow,
    RowOpened,
    RowsAnswered,
    Submit,
)
from mesh.coordinator.core.machine import Core
from mesh.coordinator.core.prefixes import Beginning
from mesh.coordinator.core.routing import Replica
from mesh.coordinator.core.scheduler import Flight
from mesh.coordinator.core.session import GenerationRequest, Session
from mesh.errors import Busy, MessageRejected, Unavailable
from mesh.protocol.frame import EMBEDDED
from mesh.runtime.row_states import RowStates
from mesh.types import LayerRange

__all__ = ["FakeMesh", "Sampled", "expected", "next_token"]

VOCABULARY = 50


@dataclass(frozen=True)
class Sampled:
    """`state`: in place of a token, for a session that asked for a hidden state; as the next token, it depends on the whole history.
    `finite`: whether every number of the state is one."""

    id: int
    state: int | None = None
    finite: bool = True


def next_token(history: Sequence[int]) -> int:
    value = 7
    for token in history:
        value = (value * 31 + token + 1) % 1_000_003
    return value % VOCABULARY


def expected(request: GenerationRequest) -> list[int]:
    """The tokens of an undisturbed generation."""
    history = list(request.prompt)
    while len(history) - len(request.prompt) < request.max_tokens:
        token = next_token(history)
        if token in request.stop_ids:
            break
        history.append(token)
    return history[len(request.prompt) :]


@dataclass
class Reservation:
    row: int
    epoch: int
    filled: int = 0
    missing: bool = False
    holds: tuple[Beginning, ...] = ()  # under these names others find it
    embeds: bool = False
    states: RowStates | None = None

    @property
    def begins(self) -> tuple[int, ...] | None:
        return None if self.states is None else self.states.begins(self.filled)

    def keep(self, positions: int) -> None:
        self.filled = min(self.filled, positions)
        self.filled = self.filled if self.begins is None else self.begins[-1]


@dataclass
class Shard:
    replica: Replica
    carries: bool = False  # a step begins only where the row's states stand
    reservations: dict[int, Reservation] = field(default_factory=dict)  # key -> reservation
    cache: dict[int, dict[int, int]] = field(default_factory=dict)  # row -> position -> token
    stopped: bool = False  # it lives, and does nothing
    steps: int = 0
    followed: int = 0
    kept: dict[str, tuple[int, int]] = field(default_factory=dict)  # free too, the oldest first: digest -> (row, positions)

    @property
    def free(self) -> int:
        return self.replica.rows - len(self.reservations)

    def reserve(self, opens: OpenRow) -> Reservation | None:
        """A row for a new session; None: all are taken. What it reuses is copied, unless no other row is free."""
        if not self.free:
            return None
        reuse = None if self.carries else opens.reuse
        positions, found = (0, {}) if reuse is None else self.find(reuse)
        row = self.free_row(None if reuse is None else reuse.digest)
        self.cache[row] = found
        states = RowStates() if self.carries else None
        holds = [] if reuse is None or not positions else [Beginning(reuse.digest, positions)]
        holds += [] if opens.prompt is None else [opens.prompt]
        return Reservation(row, opens.epoch, positions, holds=tuple(holds), embeds=opens.request.embed, states=states)

    def find(self, reuse: Beginning) -> tuple[int, dict[int, int]]:
        """(positions, their tokens) of what a row holds of `reuse`."""
        rows = [self.kept[reuse.digest]] if reuse.digest in self.kept else []
        for reservation in self.reservations.values():
            rows += [
                (reservation.row, min(held.positions, reservation.filled)) for held in reservation.holds if held.digest == reuse.digest
            ]
        row, positions = max(rows, key=lambda found: found[1], default=(0, 0))
        positions = min(positions, reuse.positions)
        return positions, {position: self.cache[row][position] for position in range(positions)}

    def free_row(self, wanted: str | None) -> int:
        taken = {reservation.row for reservation in self.reservations.values()} | {row for row, _ in self.kept.values()}
        unused = next((row for row in range(self.replica.rows) if row not in taken), None)
        if unused is not None:
            return unused
        return self.kept.pop(next((digest for digest in self.kept if digest != wanted), next(iter(self.kept))))[0]

    def close(self, key: int, kept: Beginning | None) -> None:
        reservation = self.reservations.pop(key)
        positions = 0 if kept is None or self.carries else min(kept.positions, reservation.filled)
        if kept is not None and positions:
            self.kept.pop(kept.digest, None)
            self.kept[kept.digest] = (reservation.row, positions)

    def check(self) -> None:
        rows = [reservation.row for reservation in self.reservations.values()] + [row for row, _ in self.kept.values()]
        assert len(set(rows)) == len(rows), "two sessions in one row"


class FakeMesh:
    """The core, its shards, and what is under way. `tokens` and `ended` are what clients saw."""

    def __init__(self, core: Core) -> None:
        self.core = core
        self.now = 0.0
        self.shards: dict[str, Shard] = {}
        self.boxes: dict[tuple[str, str], deque[object]] = {}
        self.requests: dict[str, GenerationRequest] = {}
        self.tokens: dict[str, list[int]] = {}
        self.states: dict[str, int | None] = {}
        self.ended: dict[str, Ended] = {}
        self.rejected: dict[str, Rejected] = {}
        self.frames: list[FrameOut] = []
        self.kept: list[PrefixKept] = []

    # -- what a test looks at ------------------------------------------------------------------------------------------

    def session(self, id: str) -> Session | None:
        """The core's own, if it has not ended."""
        return self.core._state.by_id.get(id)

    @property
    def flights(self) -> dict[int, Flight]:
        """The frames that are out."""
        return self.core._state.scheduler.flights

    # -- what a test does ----------------------------------------------------------------------------------------------

    def event(self, event: Event) -> None:
        for effect in self.core.handle(event, self.now):
            self._carry_out(effect)
        self.check()

    def join(
        self,
        shard: str,
        layers: LayerRange,
        *,
        rows: int = 2,
        context: int = 64,
        chunk: int = 4,
        instance: str = "",
        mirrors: bool = False,
        processor: str = "",
        packs: bool = True,
        carries: bool = False,
    ) -> None:
        replica = Replica(shard, layers, rows, rows, context, chunk, instance, mirrors=mirrors, processor=processor, packs=packs)
        self.shards[shard] = Shard(replica, carries)
        self.event(ReplicaSeen(replica))

    def lease(self, shard: str, *, draining: bool = False) -> None:
        there = self.shards[shard]
        self.event(ReplicaSeen(replace(there.replica, free_rows=there.free, draining=draining)))

    def heartbeat(self) -> None:
        """The coordinator says which sessions it has; every shard closes what is missing twice."""
        for shard in self.shards.values():
            for key, reservation in list(shard.reservations.items()):
                if key in self.core.session_keys():
                    reservation.missing = False
                elif reservation.missing:
                    del shard.reservations[key]
                else:
                    reservation.missing = True

    def kill(self, shard: str, *, noticed: bool = True) -> None:
        """The process dies: what was on its way to it is lost."""
        del self.shards[shard]
        for pair in [pair for pair in self.boxes if shard in pair]:
            for message in self.boxes.pop(pair):
                self._vanish(message)
        if noticed:
            self.event(ReplicaGone(shard))

    def submit(self, request: GenerationRequest) -> None:
        self.requests[request.id] = request
        self.tokens[request.id] = list(request.prefix)
        self.event(Submit(request))

    def deliver(self, random: Random) -> bool:
        """One message, of any sender to any receiver, arrives."""
        pairs = sorted(pair for pair, box in self.boxes.items() if box and not self._stopped(pair[1]))
        if not pairs:
            return False
        pair = random.choice(pairs)
        message = self.boxes[pair].popleft()
        if pair[1] == "core":
            assert isinstance(message, (RowOpened, OpenRefused, Result, FrameLost, ProbeAnswered, ReplicaGone))
            self.event(message if not isinstance(message, RowOpened | OpenRefused) else self._with_next(message, pair, random))
        elif pair[1] in self.shards:
            self._arrive(self.shards[pair[1]], message)
        return True

    def lose(self, random: Random) -> None:
        """Some message that is under way never arrives."""
        pairs = sorted(pair for pair, box in self.boxes.items() if box)
        if pairs:
            box = self.boxes[random.choice(pairs)]
            message = box[at := random.randrange(len(box))]
            del box[at]
            self._vanish(message)

    def double(self, random: Random) -> None:
        """Some message that is under way arrives twice."""
        pairs = sorted(pair for pair, box in self.boxes.items() if box)
        if pairs:
            box = self.boxes[random.choice(pairs)]
            box.append(random.choice(box))

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

    def _with_next(self, first: RowOpened | OpenRefused, pair: tuple[str, str], random: Random) -> Event:
        """An answer about a row; some of those that follow it come with it."""
        box, answers = self.boxes[pair], [first]
        while box and random.random() < 0.5:
            following = box[0]
            if not isinstance(following, RowOpened | OpenRefused):
                break
            answers.append(following)
            box.popleft()
        return RowsAnswered(tuple(answers)) if len(answers) > 1 else first

    def _stopped(self, name: str) -> bool:
        return name in self.shards and self.shards[name].stopped

    def _vanish(self, message: object) -> None:
        if isinstance(message, OpenRow | RowOpened | OpenRefused):  # the requester's time runs out
            refused = OpenRefused(message.key, message.epoch, message.stage, message.shard, False, Unavailable("no answer"))
            self._send("nobody", "core", refused)

    def _send(self, sender: str, receiver: str, message: object) -> None:
        self.boxes.setdefault((sender, receiver), deque()).append(message)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case OpenRow(shard=shard, layers=layers):
                if shard is None:
                    free = [s for s in self.shards.values() if s.replica.layers == layers]
                    shard = max(free, key=lambda s: s.free).replica.shard if free else None
                if shard is None or shard not in self.shards:
                    error = Unavailable("nobody listens")
                    self._send("nobody", "core", OpenRefused(effect.key, effect.epoch, effect.stage, shard, False, error))
                else:
                    self._send("core", shard, effect)
            case CloseRow(shard=shard):
                self._send("core", shard, effect)
            case Probe(shard=shard):
                if shard in self.shards:
                    self._send("core", shard, effect)
                else:
                    self._send("nobody", "core", ReplicaGone(shard))
            case FrameOut():
                self.frames.append(effect)
                self._send_frame("core", effect, 0)
            case PrefixKept():
                self.kept.append(effect)
            case Emit(session=id, index=index, token=token):
                assert id not in self.ended and id not in self.rejected
                if self.requests[id].embed:
                    assert token.id == EMBEDDED and id not in self.states
                    self.states[id] = token.state
                    return
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
            case OpenRow(key=key, epoch=epoch, stage=stage):
                reservation = shard.reservations.get(key)
                if reservation is not None and epoch < reservation.epoch:
                    error = MessageRejected("epoch: is over", field="epoch")
                    self._send(name, "core", OpenRefused(key, epoch, stage, name, False, error, permanent=True))
                    return
                if reservation is not None and epoch > reservation.epoch:
                    reservation.epoch = epoch
                    reservation.keep(message.keep)
                if reservation is None:
                    reservation = shard.reserve(message)
                    if reservation is None:
                        self._send(name, "core", OpenRefused(key, epoch, stage, name, True, Busy("full", retry_after_s=1)))
                        return
                    shard.reservations[key] = reservation
                reservation.missing = False
                self._send(name, "core", RowOpened(key, epoch, stage, name, reservation.row, reservation.filled, reservation.begins))
            case CloseRow(key=key, epoch=epoch, kept=left):
                reservation = shard.reservations.get(key)
                if reservation is not None and reservation.epoch <= epoch:
                    shard.close(key, left)
            case Probe(asked_at=asked_at):
                self._send(name, "core", ProbeAnswered(name, asked_at, frozenset()))
            case (FrameOut() as out, int(stage)):
                self._compute(shard, out, stage)

    def _send_frame(self, sender: str, out: FrameOut, stage: int) -> None:
        """To the shard it is for, and to those of the range that follow."""
        hop = out.route[stage]
        self._send(sender, hop.shard, (out, stage))
        for shard in self.shards.values():
            if shard.replica.mirrors and shard.replica.layers == hop.layers and shard.replica.shard != hop.shard:
                self._send(sender, shard.replica.shard, (out, stage))

    def _compute(self, shard: Shard, out: FrameOut, stage: int) -> None:
        name = shard.replica.shard
        mine = out.route[stage].shard == name
        kept: list[FrameRow] = []
        gone: list[FrameRow] = []
        for row in out.rows:
            reservation = shard.reservations.get(row.key)
            well = (
                reservation is not None
                and reservation.epoch == row.epoch
                and self._can_begin(reservation, row.start)
                and (reservation.row == row.rows[stage] or not mine)
            )
            (kept if well else gone).append(row)
        if gone and mine:
            self._send(name, "core", FrameLost(out.frame, frozenset(row.key for row in gone), name))
        if not kept:
            return
        shard.steps += mine
        shard.followed += not mine
        for row in kept:
            reservation = shard.reservations[row.key]
            stop = row.start + len(row.tokens)
            reservation.filled = max(reservation.filled, stop) if reservation.states is None else stop
            if reservation.states is not None:
                reservation.states.advance(row.start, len(row.tokens))
            cache = shard.cache[reservation.row]
            assert all(position in cache for position in range(row.start)), "a hole in the history"
            for offset, token in enumerate(row.tokens):
                cache[row.start + offset] = token
        if not mine:
            return
        if stage + 1 < len(out.route):
            self._send_frame(name, FrameOut(out.frame, out.kind, out.route, tuple(kept)), stage + 1)
            return
        answers = []
        for row in kept if out.kind == "packed" or kept[0].wants else ():  # a prefill chunk that wants nothing is only acknowledged
            position = row.start + len(row.tokens) - 1
            cache = shard.cache[row.rows[stage]]
            answers.append(ResultRow(row.key, position, self._sampled(shard, row, [cache[p] for p in range(position + 1)])))
        self._send(name, "core", Result(out.frame, tuple(answers)))

    def _can_begin(self, reservation: Reservation, start: int) -> bool:
        """Whether a step may begin there. Where no states stand, the row has no more from now on than those before."""
        if start > reservation.filled or reservation.begins is None or start in reservation.begins:
            return start <= reservation.filled
        reservation.keep(start)
        return False

    def _sampled(self, shard: Shard, row: FrameRow, history: list[int]) -> Sampled | None:
        if not row.wants:
            return None
        token = next_token(history)
        return Sampled(EMBEDDED, token) if shard.reservations[row.key].embeds else Sampled(token)


def session_of(mesh: FakeMesh, request: str) -> Session:
    """The session of a request that the core still has."""
    session = mesh.session(request)
    assert session is not None, f"the core has no session of {request}"
    return session
