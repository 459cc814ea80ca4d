"""What a shard decides: which session has which row, and which rows of a frame may be computed. No I/O; the time is passed in.

Theory of operation. A shard has `rows` rows; a session takes the lowest free one. For each row the shard knows the session, its
epoch and `filled`: positions 0 .. filled-1 of the row's cache are computed, or will be by steps that are queued already. Queued steps
count as done because the compute thread takes steps in the order in which they were admitted.

    event                  row of that session      what happens
    open                   none                     lowest free row, else the row kept longest, filled 0; Busy if there is none
    open, reuse            none                     a row that holds what it names, or a copy of its beginning, filled as far as that goes;
                                                    where no row holds it, as above
    open, same epoch       there                    the same answer again
    open, higher epoch     there                    row kept, filled = min(filled, keep); lower epochs are fenced from now on
    open, lower epoch      there                    refused
    decode, its epoch      there, start <= filled   computed; filled = max(filled, start + 1)
    prefill, its epoch     there, start <= filled   computed; filled = start + count: its padding is written over what follows
    packed, its epoch      there, start <= filled   as a decode step if it is one token of the row, else as a prefill chunk
    frame row, its epoch   there, start > filled    NACK hole, from `filled` on: a step was lost
    frame row, its epoch   no states at its start   NACK hole, from the last position before it that has some
    frame row, lower epoch there                    NACK stale_epoch
    frame row              none, or a higher epoch  NACK unknown_session; nothing at all if its slot is another instance's
    close, expiry          there                    row free, unless it has a later epoch than the one that is closed
    close, kept            there                    the same, and what the row holds is kept until the row is needed
    heartbeat without it   there, twice in a row    row free: the coordinator does not know the session
    drain                  any                      no new sessions; open ones continue

A mirror is an ordinary shard that also follows the frames of the other replicas of its range. It computes those rows whose sessions are
open here too, in the rows that these have here, and sends neither a result nor a NACK. If it missed frames, `filled` shows that when the
session is opened again.

Kept rows. A free row may keep what it holds, under the digest that its coordinator gave it. A session that names the digest gets the row as
it is, where it begins with most of what the row holds. Otherwise it gets a copy of the beginning in another row, so that the longer history
stays for whoever goes on with it. A row that a session has is copied from, as far as it is filled. A row that is taken is found under the
digest that it was taken by until it is closed: two sessions that begin alike may ask for it at once. Rows are given up oldest first.

States. Where layers carry states, a step begins only where those of the row stand: at one of a few positions (RowStates, which the stage
keeps in the same way for what it computes). `filled` is then one of these, after each step its end. An answer to an open names all of them,
so that a replay begins where every shard can. Such a row is nothing that another session could begin with: its states at the end of a
common beginning are gone. It is neither kept nor copied.

A slot is a row with the tag of the shard's instance above it. Two processes may have the name of the shard for a while
(mesh/shard/lease.py), and both hear its frames. The one whose tag a slot does not carry leaves the slot to the other.

A frame that cannot be meant for this shard (wrong route, shapes or types) is rejected as a whole. Repeating a step changes nothing up to
its last position (mesh/runtime/engine.py), so a row that was computed before is simply computed again: recovery is replay.
"""

from __future__ import annotations

import heapq
import zlib
from collections import Counter, OrderedDict
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from mesh.errors import BadRequest, Busy, FrameRejected, MessageRejected, PromptTooLong, Unavailable
from mesh.protocol.control import Close, Open, Prefix
from mesh.protocol.frame import STEPS
from mesh.protocol.frame_codec import Frame, Kind, Nack
from mesh.protocol.status import Heartbeat
from mesh.runtime.row_states import RowStates
from mesh.types import LayerRange

__all__ = ["ROW_MASK", "Admission", "KeptRow", "Reservation", "ShardShape", "ShardState", "tag_of"]

DEFAULT_TTL_S = 10.0
"""How long a coordinator may be silent if it gave no time itself."""

_RETRY_AFTER_S = 0.5
_MAX_COORDINATORS = 1024
_ROW_BITS = 16
ROW_MASK: Final = (1 << _ROW_BITS) - 1
"""The bits of a slot that are the row."""


def tag_of(instance: str) -> int:
    """The tag that an instance's slots carry; another instance has another one, but for one case in 65,536."""
    return zlib.crc32(instance.encode()) & 0xFFFF


@dataclass(frozen=True, slots=True)
class ShardShape:
    """What does not change while a shard serves a range. `hidden_dtype` and `hidden_size` describe the hidden state between two shards."""

    shard: str
    model_hash: str
    layers: LayerRange
    total_layers: int
    rows: int
    context: int
    vocab_size: int
    hidden_size: int
    hidden_dtype: Any  # numpy dtype
    queue_limit: int  # the most frames that may be admitted and not yet computed
    tag: int = 0  # of the instance
    carries: bool = False  # whether steps begin where a row's states stand (mesh/runtime/row_states.py)

    @property
    def first(self) -> bool:
        return self.layers.start == 0

    @property
    def last(self) -> bool:
        return self.layers.stop == self.total_layers


@dataclass(frozen=True, slots=True)
class KeptRow:
    """A free row whose first `positions` positions may be gone on with."""

    row: int
    positions: int


@dataclass(slots=True)
class Reservation:
    """The row that a session has here, and the slot by which frames name it. `copy_of`: the row of which `filled` positions have to be
    copied here before any step is computed; whoever sees to that clears it. `holds`: what other sessions may find here. `states`: where
    the row's states stand, if the model carries some."""

    session: int
    epoch: int
    coordinator: str
    row: int
    slot: int
    filled: int
    copy_of: int | None = None
    holds: tuple[Prefix, ...] = ()
    states: RowStates | None = None
    missing: bool = False  # from the last heartbeat of its coordinator

    @property
    def begins(self) -> tuple[int, ...] | None:
        """The positions at which a step may begin; None: at any that is filled, or the one after."""
        return None if self.states is None else self.states.begins(self.filled)

    @property
    def said(self) -> dict[str, Any]:
        """What an answer to an open says of it."""
        return {"session": self.session, "epoch": self.epoch, "row": self.slot, "filled": self.filled, "begins": self.begins}

    def keep(self, positions: int) -> None:
        """No more than `positions` positions count as filled from now on; where states are carried, as many as one stands at."""
        self.filled = min(self.filled, positions)
        if self.states is not None:
            self.filled = self.states.begins(self.filled)[-1]

    def found(self, digest: str) -> int:
        """How many positions of what `digest` names are here by now."""
        return min(max((held.positions for held in self.holds if held.digest == digest), default=0), self.filled)

    def fill(self, kind: Kind, start: int, count: int) -> None:
        """Note that `count` positions from `start` on are written. A prefill chunk may be padded to a compiled size, and its padding
        overwrites what followed."""
        stop = start + count
        if self.states is not None:
            self.states.advance(start, count)
            self.filled = stop
            return
        self.filled = stop if kind is Kind.PREFILL or count > 1 else max(self.filled, stop)


@dataclass(frozen=True, slots=True)
class Admission:
    """Which `rows` of a frame to compute (indices; None: all of them), and the NACK frames to send for the others."""

    rows: np.ndarray | None
    nacks: tuple[Frame, ...]

    @property
    def nothing(self) -> bool:
        return self.rows is not None and len(self.rows) == 0


@dataclass
class ShardState:
    shape: ShardShape
    draining: bool = False
    queued: int = 0  # frames admitted and not yet computed
    followed: int = 0  # rows computed as a mirror
    missed: int = 0  # rows a mirror could not compute: it is behind
    gaps: Counter[str] = field(default_factory=Counter)  # rows, by why they were not computed
    reused: Counter[str] = field(default_factory=Counter)  # sessions that asked for a prefix: taken, copied, missed
    _reservations: dict[int, Reservation] = field(default_factory=dict)  # by session
    _free: list[int] = field(default_factory=list)  # heap
    _kept: OrderedDict[str, KeptRow] = field(default_factory=OrderedDict)  # free too, by the digest; the one to be given up first is first
    _pending: dict[tuple[str, int], int] = field(default_factory=dict)  # (coordinator, step) that has not gone on yet
    _heard: dict[str, tuple[float, float]] = field(default_factory=dict)  # coordinator -> (silent since, allowed for)

    def __post_init__(self) -> None:
        if self.shape.rows > 1 << _ROW_BITS:
            raise BadRequest(f"{self.shape.rows} rows: give {1 << _ROW_BITS} at most", field="rows")
        self._free = list(range(self.shape.rows))

    @property
    def free_rows(self) -> int:
        """Rows that a session can have, those that keep something among them."""
        return len(self._free) + len(self._kept)

    @property
    def kept_rows(self) -> int:
        return len(self._kept)

    @property
    def sessions(self) -> int:
        return len(self._reservations)

    @property
    def filled_positions(self) -> int:
        """Positions that are filled in the rows of open sessions."""
        return sum(reservation.filled for reservation in self._reservations.values())

    def reservation(self, session: int) -> Reservation | None:
        return self._reservations.get(session)

    # -- sessions ------------------------------------------------------------------------------------------------------

    def open(self, message: Open, now: float) -> Reservation:
        """Open a session. Busy: no row is free. Unavailable: the shard drains. PromptTooLong: the context is shorter than the prompt.
        MessageRejected: wrong model, or an epoch that is over."""
        if message.model_hash != self.shape.model_hash:
            raise MessageRejected(
                f"model_hash: {message.model_hash} is another model than {self.shape.model_hash}, which is served here", field="model_hash"
            )
        if message.prompt_length > self.shape.context:
            raise PromptTooLong(
                f"a prompt of {message.prompt_length} tokens, and this shard holds {self.shape.context} a row",
                tokens=message.prompt_length,
                limit=self.shape.context,
            )
        reservation = self._reservations.get(message.session)
        if reservation is not None:
            if message.epoch < reservation.epoch:
                raise MessageRejected(f"epoch: {message.epoch} is over, the session is at {reservation.epoch}", field="epoch")
            if message.epoch > reservation.epoch:
                reservation.keep(message.keep)
                reservation.epoch = message.epoch
                reservation.coordinator = message.coordinator
            reservation.missing = False
            self._hear(message.coordinator, now)
            return reservation
        if self.draining:
            raise Unavailable(f"shard {self.shape.shard} is draining: open the session on another replica of layers {self.shape.layers}")
        if not self.free_rows:
            raise Busy(
                f"all {self.shape.rows} rows of shard {self.shape.shard} (layers {self.shape.layers}) are taken",
                retry_after_s=_RETRY_AFTER_S,
            )
        reservation = self._reserve(message)
        self._reservations[message.session] = reservation
        self._hear(message.coordinator, now)
        return reservation

    def close(self, message: Close, now: float) -> int:
        """Close sessions of a coordinator. Returns how many were closed."""
        self._hear(message.coordinator, now)
        wanted = tuple(self._reservations) if message.all else message.sessions
        mine = [
            reservation
            for s in wanted
            if (reservation := self._reservations.get(s)) is not None
            and reservation.coordinator == message.coordinator
            and reservation.epoch <= message.epoch
        ]
        kept = {held.session: held for held in message.kept}
        for reservation in mine:
            self._leave(reservation, kept.get(reservation.session))
        return len(mine)

    def heartbeat(self, message: Heartbeat, now: float) -> list[int]:
        """Take in a coordinator's heartbeat, which says how long the coordinator may be silent. Returns the sessions that were closed
        because two heartbeats in a row did not name them."""
        coordinator = message.instance or message.coordinator
        if coordinator in self._heard or len(self._heard) < _MAX_COORDINATORS:
            self._heard[coordinator] = (now, message.ttl_s)
        if message.sessions is None:
            return []
        named = frozenset(message.sessions)
        gone = []
        for reservation in [reservation for reservation in self._reservations.values() if reservation.coordinator == coordinator]:
            if reservation.session in named:
                reservation.missing = False
            elif reservation.missing:
                self._leave(reservation)
                gone.append(reservation.session)
            else:
                reservation.missing = True
        return gone

    def expire(self, now: float) -> list[int]:
        """Close the sessions of coordinators that have been silent for too long. Returns those sessions."""
        silent = {name for name, (since, ttl_s) in self._heard.items() if now - since > ttl_s}
        for name in silent:
            del self._heard[name]
        gone = [reservation for reservation in self._reservations.values() if reservation.coordinator in silent]
        for reservation in gone:
            self._leave(reservation)
        return [reservation.session for reservation in gone]

    def drain(self) -> int:
        """Take no new sessions from now on. Returns how many are open."""
        self.draining = True
        return self.sessions

    # -- frames --------------------------------------------------------------------------------------------------------

    def admit(self, frame: Frame, now: float) -> Admission:
        """Decide which rows of a frame are computed. FrameRejected: the frame cannot be meant for this shard."""
        self._check(frame)
        if self.queued >= self.shape.queue_limit:
            return self._refuse(frame, Nack.OVERLOADED)
        counts = frame.counts()
        here = frame.stage_rows[frame.hop].tolist()
        kept: list[int] = []
        refused: dict[Nack, list[tuple[int, int]]] = {}  # why -> (index, where to go on)
        for index, (session, epoch, start) in enumerate(
            zip(frame.sessions.tolist(), frame.epochs.tolist(), frame.positions.tolist(), strict=True)
        ):
            reservation, count = self._reservations.get(session), counts[index]
            why = self._why_not(reservation, frame.coordinator, epoch, start, count, here[index])
            if why is Nack.NONE:
                assert reservation is not None
                kept.append(index)
                reservation.fill(frame.kind, start, count)
            else:
                if here[index] >> _ROW_BITS != self.shape.tag:
                    self.gaps["other_instance"] += 1
                    continue
                go_on = start
                if why is Nack.HOLE and reservation is not None:
                    reservation.keep(start)
                    go_on = reservation.filled
                refused.setdefault(why, []).append((index, go_on))
        if kept:
            self._hear(frame.coordinator, now)
            self.queued += 1
            key = (frame.coordinator, frame.step)
            self._pending[key] = self._pending.get(key, 0) + 1
        nacks = []
        for why, rows in refused.items():
            self.gaps[why.name.lower()] += len(rows)
            nacks.append(frame.nack(why, [index for index, _ in rows], np.array([position for _, position in rows], np.uint32)))
        return Admission(None if len(kept) == frame.rows else np.array(kept, np.intp), tuple(nacks))

    def follow(self, frame: Frame) -> Frame | None:
        """The part of another replica's frame that a mirror computes too, with the rows that its sessions have here; None if there is
        nothing to compute."""
        self._check(frame, mine=False)
        kept: list[int] = []
        rows: list[int] = []
        counts = frame.counts()
        room = self.queued < self.shape.queue_limit
        for index, (session, epoch, start) in enumerate(
            zip(frame.sessions.tolist(), frame.epochs.tolist(), frame.positions.tolist(), strict=True)
        ):
            reservation, count = self._reservations.get(session), counts[index]
            if (
                reservation is None
                or self._why_not(reservation, frame.coordinator, epoch, start, count, reservation.slot) is not Nack.NONE
                or not room
            ):
                self.missed += reservation is not None
                continue
            kept.append(index)
            rows.append(reservation.slot)
            reservation.fill(frame.kind, start, count)
        if not kept:
            return None
        self.queued += 1
        self.followed += len(kept)
        mine = frame.only(np.array(kept, np.intp))
        table = mine.stage_rows.copy()
        table[frame.hop] = rows
        return replace(mine, stage_rows=table)

    def done(self) -> None:
        """An admitted or followed frame has been computed."""
        assert self.queued > 0
        self.queued -= 1

    def gone_on(self, frame: Frame) -> None:
        """The result of an admitted frame has been sent, or never will be."""
        key = (frame.coordinator, frame.step)
        self._pending[key] -= 1
        if self._pending[key] <= 0:
            del self._pending[key]

    def pending(self, coordinator: str) -> tuple[int, ...]:
        """The steps of a coordinator that have arrived and whose results have not been sent yet."""
        return tuple(step for name, step in self._pending if name == coordinator)

    def check(self) -> None:
        """Assert the invariants: every row is free or has exactly one session, and so on. For tests."""
        taken = [reservation.row for reservation in self._reservations.values()]
        kept = [each.row for each in self._kept.values()]
        assert sorted(taken + self._free + kept) == list(range(self.shape.rows)), (taken, self._free, kept)
        assert all(0 < each.positions <= self.shape.context for each in self._kept.values())
        assert all(session == reservation.session for session, reservation in self._reservations.items())
        assert all(0 <= reservation.filled <= self.shape.context for reservation in self._reservations.values())
        assert all(reservation.coordinator in self._heard for reservation in self._reservations.values())
        assert self.queued >= 0
        assert all(count > 0 for count in self._pending.values())

    # -- inside --------------------------------------------------------------------------------------------------------

    def _why_not(self, reservation: Reservation | None, coordinator: str, epoch: int, start: int, count: int, slot: int) -> Nack:
        if reservation is None or epoch > reservation.epoch:
            return Nack.UNKNOWN_SESSION
        if epoch < reservation.epoch:
            return Nack.STALE_EPOCH
        if reservation.coordinator != coordinator or reservation.slot != slot:
            return Nack.UNKNOWN_SESSION
        if start + count > self.shape.context:
            return Nack.BAD_INPUT
        begins = reservation.begins
        return Nack.HOLE if start > reservation.filled or (begins is not None and start not in begins) else Nack.NONE

    def _refuse(self, frame: Frame, why: Nack) -> Admission:
        self.gaps[why.name.lower()] += frame.rows
        return Admission(np.zeros(0, np.intp), (frame.nack(why, range(frame.rows)),))

    def _check(self, frame: Frame, *, mine: bool = True) -> None:
        """FrameRejected if the frame is for another shard (unless `mine` is false: for another range), or does not fit the model."""
        shape = self.shape

        def refuse(reason: str, message: str) -> None:
            raise FrameRejected(f"frame rejected: {message}", reason=reason)

        if frame.model_hash != shape.model_hash:
            refuse("model", f"it is of model {frame.model_hash}, and here is {shape.model_hash}")
        if frame.kind not in STEPS:
            refuse("kind", f"a shard computes nothing for {frame.kind.name}")
        hop = frame.route[frame.hop]
        if hop.layers != shape.layers or (hop.shard != shape.shard) is mine:
            refuse("route", f"it is for {hop.shard} and layers {hop.layers}")
        if frame.route[0].layers.start != 0 or frame.route[-1].layers.stop != shape.total_layers:
            refuse("route", f"its route does not go through all {shape.total_layers} layers")
        if frame.rows > 1 and len(set(frame.sessions.tolist())) != frame.rows:
            refuse("rows", "a session is in it twice")
        tokens = frame.tokens.tolist()
        if min(tokens) < 0 or max(tokens) >= shape.vocab_size:
            refuse("input", f"a token is not in the vocabulary of {shape.vocab_size}")
        if frame.hop:
            hidden = frame.tensors[0]
            if hidden.shape != (len(tokens), shape.hidden_size) or hidden.dtype != shape.hidden_dtype:
                want = f"{shape.hidden_dtype} {(len(tokens), shape.hidden_size)}"
                refuse("input", f"a hidden state of {hidden.dtype} {hidden.shape} where {want} belongs")

    def _hear(self, coordinator: str, now: float) -> None:
        _, ttl_s = self._heard.get(coordinator, (now, DEFAULT_TTL_S))
        self._heard[coordinator] = (now, ttl_s)

    def _reserve(self, message: Open) -> Reservation:
        """A row for a session that has none."""
        reuse = None if self.shape.carries else message.reuse
        kept = None if reuse is None else self._kept.get(reuse.digest)
        source, positions = None, 0
        if reuse is None:
            row = self._free_row()
        elif kept is not None and self._should_take(kept, reuse.positions):
            del self._kept[reuse.digest]
            row, positions = kept.row, min(reuse.positions, kept.positions)
            self.reused["taken"] += 1
        elif kept is not None:
            self._kept.move_to_end(reuse.digest)
            row, source, positions = self._free_row(), kept.row, min(reuse.positions, kept.positions)
            self.reused["copied"] += 1
        else:
            source, positions = self._taken_by(reuse)
            row = self._free_row()
            self.reused["missed" if source is None else "copied"] += 1
        holds = [] if reuse is None or not positions else [Prefix(digest=reuse.digest, positions=positions)]
        holds += [] if message.prompt is None else [message.prompt]
        slot = self.shape.tag << _ROW_BITS | row
        states = RowStates() if self.shape.carries else None
        return Reservation(message.session, message.epoch, message.coordinator, row, slot, positions, source, tuple(holds), states)

    def _should_take(self, kept: KeptRow, positions: int) -> bool:
        """Whether a session that begins with `positions` of what a row keeps gets the row itself: no other one is free, or not much is lost
        that another session may still want."""
        return 2 * positions >= kept.positions or self.free_rows == 1

    def _taken_by(self, reuse: Prefix) -> tuple[int | None, int]:
        """(row, positions) of a session whose row holds most of what `reuse` names."""
        best = max(self._reservations.values(), key=lambda each: each.found(reuse.digest), default=None)
        positions = 0 if best is None else min(best.found(reuse.digest), reuse.positions)
        return (best.row, positions) if best is not None and positions else (None, 0)

    def _free_row(self) -> int:
        """The lowest row that keeps nothing, or else the one to be given up first. One is free."""
        return heapq.heappop(self._free) if self._free else self._kept.popitem(last=False)[1].row

    def _leave(self, reservation: Reservation, kept: Prefix | None = None) -> None:
        del self._reservations[reservation.session]
        positions = 0 if kept is None or self.shape.carries else min(kept.positions, reservation.filled)
        if kept is None or not positions:
            heapq.heappush(self._free, reservation.row)
            return
        before = self._kept.pop(kept.digest, None)
        if before is not None:
            heapq.heappush(self._free, before.row)
        self._kept[kept.digest] = KeptRow(reservation.row, positions)
