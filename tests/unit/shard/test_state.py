"""ShardState against a plain model of it, through any order of events."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mesh.errors import Busy, FrameRejected, MessageRejected, PromptTooLong, Unavailable
from mesh.protocol.control import Close, HeldPrefix, Open, Prefix
from mesh.protocol.frame_codec import Flags, Frame, Hop, Kind, Nack
from mesh.protocol.status import Heartbeat
from mesh.runtime.row_states import EVERY
from mesh.shard.state import ShardShape, ShardState
from mesh.types import LayerRange

HASH = "0" * 16
ROWS, CONTEXT, QUEUE = 3, 32, 6
LAYERS = LayerRange(0, 4)
SHAPE = ShardShape("a", HASH, LAYERS, 4, ROWS, CONTEXT, 100, 8, np.dtype(np.float32), QUEUE)

sessions = st.integers(1, 6)
epochs = st.integers(0, 3)
names = st.sampled_from(["c", "d"])


def opening(session: int, epoch: int = 1, coordinator: str = "c", keep: int = 0, prompt_length: int = 1) -> Open:
    return Open(session=session, epoch=epoch, coordinator=coordinator, model_hash=HASH, prompt_length=prompt_length, keep=keep)


def frame(kind: Kind, rows: list[tuple[int, int, int, int]], tokens: list[int], coordinator: str = "c") -> Frame:
    """rows: (session, epoch, position, slot)"""
    columns = np.array(rows).T
    return Frame(
        kind,
        HASH,
        coordinator,
        (Hop(LAYERS, "a"),),
        columns[0].astype(np.uint64),
        columns[1].astype(np.uint32),
        columns[2].astype(np.uint32),
        columns[3:4].astype(np.uint32),
        np.array(tokens, np.int32),
        flags=Flags(0),
    )


class Machine(RuleBasedStateMachine):
    """The model: session -> [epoch, coordinator, row, filled]; `missing`: those the last heartbeat of their coordinator did not name."""

    def __init__(self) -> None:
        super().__init__()
        self.state = ShardState(SHAPE)
        self.open: dict[int, list[Any]] = {}
        self.heard: dict[str, float] = {}
        self.ttl: dict[str, float] = {}
        self.now = 0.0
        self.queued = 0
        self.missing: set[int] = set()

    def hear(self, name: str) -> None:
        self.heard[name] = self.now
        self.ttl.setdefault(name, 10.0)

    @rule(session=sessions, epoch=epochs, coordinator=names, keep=st.integers(0, 8))
    def opens(self, session: int, epoch: int, coordinator: str, keep: int) -> None:
        message = opening(session, epoch, coordinator, keep)
        there = self.open.get(session)
        if there is not None and epoch < there[0]:
            with pytest.raises(MessageRejected):
                self.state.open(message, self.now)
            return
        if there is None and self.state.draining:
            with pytest.raises(Unavailable):
                self.state.open(message, self.now)
            return
        if there is None and len(self.open) == ROWS:
            with pytest.raises(Busy):
                self.state.open(message, self.now)
            return
        reservation = self.state.open(message, self.now)
        if there is None:
            taken = {reservation[2] for reservation in self.open.values()}
            there = self.open[session] = [epoch, coordinator, min(set(range(ROWS)) - taken), 0]
        elif epoch > there[0]:
            there[:] = [epoch, coordinator, there[2], min(there[3], keep)]
        assert [reservation.epoch, reservation.coordinator, reservation.row, reservation.filled] == there
        self.hear(coordinator)
        self.missing.discard(session)

    @precondition(lambda self: self.open)
    @rule(data=st.data(), count=st.integers(1, 8), shift=st.integers(-3, 1), stale=st.booleans())
    def prefills(self, data: st.DataObject, count: int, shift: int, stale: bool) -> None:
        session = data.draw(st.sampled_from(sorted(self.open)))
        epoch, coordinator, row, filled = self.open[session]
        start = max(0, filled + shift)
        sent = frame(Kind.PREFILL, [(session, epoch - stale if epoch else epoch, start, row)], [1] * count, coordinator)
        admission = self.state.admit(sent, self.now)
        if self.queued >= QUEUE:
            assert admission.nothing and admission.nacks[0].reason is Nack.OVERLOADED
        elif stale and epoch:
            assert admission.nothing and admission.nacks[0].reason is Nack.STALE_EPOCH
        elif start + count > CONTEXT:
            assert admission.nothing and admission.nacks[0].reason is Nack.BAD_INPUT
        elif start > filled:
            assert admission.nothing and admission.nacks[0].reason is Nack.HOLE
            assert admission.nacks[0].positions.tolist() == [filled]
        else:
            assert admission.rows is None and not admission.nacks
            self.open[session][3] = start + count
            self.queued += 1
            self.hear(coordinator)

    @rule(chosen=st.sets(sessions, min_size=1), counts=st.lists(st.integers(1, 5), min_size=8, max_size=8), coordinator=names)
    def packs(self, chosen: set[int], counts: list[int], coordinator: str) -> None:
        """Segments of open and of unknown sessions. Several tokens fill a row as a prefill does, a single one as a decode does."""
        rows, good = [], []
        for index, (session, count) in enumerate(zip(sorted(chosen), counts, strict=False)):
            there = self.open.get(session)
            rows.append((session, 0, 0, 0) if there is None else (session, there[0], max(there[3] - 1, 0), there[2]))
            if there is not None and there[1] == coordinator and max(there[3] - 1, 0) + count <= CONTEXT:
                good.append(index)
        lengths = np.array(counts[: len(rows)], np.uint32)
        sent = replace(frame(Kind.PACKED, rows, [1] * int(lengths.sum()), coordinator), lengths=lengths)
        admission = self.state.admit(sent, self.now)
        if self.queued >= QUEUE:
            assert admission.nothing
            return
        computed = list(range(len(rows))) if admission.rows is None else admission.rows.tolist()
        assert computed == good
        for index in good:
            there = self.open[rows[index][0]]
            stop = rows[index][2] + counts[index]
            there[3] = stop if counts[index] > 1 else max(there[3], stop)
        if good:
            self.queued += 1
            self.hear(coordinator)

    @rule(chosen=st.sets(sessions, min_size=1), coordinator=names)
    def decodes(self, chosen: set[int], coordinator: str) -> None:
        """Rows of open and of unknown sessions together: just the good ones are computed."""
        rows = []
        good = []
        for index, session in enumerate(sorted(chosen)):
            there = self.open.get(session)
            rows.append((session, 0, 0, 0) if there is None else (session, there[0], there[3], there[2]))
            if there is not None and there[1] == coordinator and there[3] < CONTEXT:
                good.append(index)
        admission = self.state.admit(frame(Kind.DECODE, rows, [1] * len(rows), coordinator), self.now)
        if self.queued >= QUEUE:
            assert admission.nothing
            return
        computed = list(range(len(rows))) if admission.rows is None else admission.rows.tolist()
        assert computed == good
        assert sum(nack.rows for nack in admission.nacks) == len(rows) - len(good)
        for index in good:
            self.open[rows[index][0]][3] += 1
        if good:
            self.queued += 1
            self.hear(coordinator)

    @precondition(lambda self: self.queued)
    @rule()
    def computes(self) -> None:
        self.state.done()
        self.queued -= 1

    @precondition(lambda self: self.open)
    @rule(chosen=st.sets(sessions, min_size=1), coordinator=names)
    def follows(self, chosen: set[int], coordinator: str) -> None:
        """A frame to another replica: sessions that are open here too are computed in their own rows, and the others are passed over."""
        rows = []
        good = []
        for index, session in enumerate(sorted(chosen)):
            there = self.open.get(session)
            rows.append((session, 0, 0, 2) if there is None else (session, there[0], there[3], 2))
            if there is not None and there[1] == coordinator and there[3] < CONTEXT:
                good.append(index)
        sent = replace(frame(Kind.DECODE, rows, [1] * len(rows), coordinator), route=(Hop(LAYERS, "b"),))
        mine = self.state.follow(sent)
        if self.queued >= QUEUE or not good:
            assert mine is None
            return
        assert mine is not None
        assert mine.stage_rows[0].tolist() == [self.open[rows[index][0]][2] for index in good]
        for index in good:
            self.open[rows[index][0]][3] += 1
        self.queued += 1

    @rule(chosen=st.sets(sessions), coordinator=names, everything=st.booleans(), epoch=epochs)
    def closes(self, chosen: set[int], coordinator: str, everything: bool, epoch: int) -> None:
        message = Close(coordinator=coordinator, sessions=tuple(chosen), all=everything, epoch=epoch)
        gone = [
            s
            for s, reservation in self.open.items()
            if reservation[1] == coordinator and (everything or s in chosen) and reservation[0] <= epoch
        ]
        assert self.state.close(message, self.now) == len(gone)
        for session in gone:
            self.forget(session)
        self.hear(coordinator)

    def forget(self, session: int) -> None:
        del self.open[session]
        self.missing.discard(session)

    @rule(coordinator=names, ttl_s=st.sampled_from([1.0, 20.0]), named=st.none() | st.sets(sessions))
    def heartbeats(self, coordinator: str, ttl_s: float, named: set[int] | None) -> None:
        message = Heartbeat(coordinator=coordinator, ttl_s=ttl_s, sessions=None if named is None else tuple(named))
        closed = self.state.heartbeat(message, self.now)
        self.hear(coordinator)
        self.ttl[coordinator] = ttl_s
        mine = {session for session, reservation in self.open.items() if reservation[1] == coordinator}
        if named is None:
            assert closed == []
            return
        assert sorted(closed) == sorted((mine - named) & self.missing)
        for session in closed:
            self.forget(session)
        self.missing = (self.missing - mine) | (mine - named - set(closed))

    @rule(seconds=st.sampled_from([0.5, 5.0, 15.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        silent = {name for name, since in self.heard.items() if self.now - since > self.ttl[name]}
        gone = [session for session, reservation in self.open.items() if reservation[1] in silent]
        assert sorted(self.state.expire(self.now)) == sorted(gone)
        for session in gone:
            self.forget(session)
        for name in silent:
            del self.heard[name], self.ttl[name]

    @rule()
    def drains(self) -> None:
        assert self.state.drain() == len(self.open)

    @invariant()
    def agrees(self) -> None:
        self.state.check()
        assert self.state.sessions == len(self.open) and self.state.free_rows == ROWS - len(self.open)
        for session, (epoch, coordinator, row, filled) in self.open.items():
            reservation = self.state.reservation(session)
            assert reservation is not None and (reservation.epoch, reservation.coordinator, reservation.row, reservation.filled) == (
                epoch,
                coordinator,
                row,
                filled,
            )


Machine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestAnyOrderOfEvents = Machine.TestCase


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_hash": "1" * 16}, "model"),
        ({"kind": Kind.ACK, "tokens": np.zeros(0, np.int32)}, "kind"),
        ({"route": (Hop(LAYERS, "b"),)}, "route"),
        ({"route": (Hop(LayerRange(0, 3), "a"),)}, "route"),
        ({"sessions": np.array([1, 1], np.uint64)}, "rows"),
        ({"tokens": np.array([1, 100], np.int32)}, "input"),
        ({"tokens": np.array([1, -1], np.int32)}, "input"),
    ],
)
def test_a_frame_for_another_shard_is_refused_whole(change: dict[str, Any], reason: str) -> None:
    state = ShardState(SHAPE)
    for session in (1, 2):
        state.open(opening(session), 0.0)
    good = frame(Kind.DECODE, [(1, 1, 0, 0), (2, 1, 0, 1)], [1, 2])
    with pytest.raises(FrameRejected) as caught:
        state.admit(replace(good, **change), 0.0)
    assert caught.value.reason == reason
    assert state.queued == 0 and all(reservation.filled == 0 for s in (1, 2) if (reservation := state.reservation(s)) is not None)
    assert state.admit(good, 0.0).rows is None
    state.check()


def test_positions_after_a_prefill_chunk_no_longer_count_as_filled() -> None:
    """The padding of the chunk was written there."""
    state = ShardState(SHAPE)
    state.open(opening(1), 0.0)
    for kind, start, count, filled in (
        (Kind.PREFILL, 0, 6, 6),
        (Kind.DECODE, 3, 1, 6),
        (Kind.PREFILL, 1, 2, 3),
        (Kind.DECODE, 3, 1, 4),
    ):
        assert state.admit(frame(kind, [(1, 1, start, 0)], [1] * count), 0.0).rows is None
        assert (reservation := state.reservation(1)) is not None and reservation.filled == filled
        state.done()
    state.check()


def test_a_prompt_beyond_the_context_is_refused() -> None:
    state = ShardState(SHAPE)
    with pytest.raises(PromptTooLong):
        state.open(opening(1, prompt_length=CONTEXT + 1), 0.0)
    state.check()


def test_a_step_is_pending_until_it_has_gone_on() -> None:
    state = ShardState(SHAPE)
    state.open(opening(1), 0.0)
    sent = replace(frame(Kind.DECODE, [(1, 1, 0, 0)], [1]), step=7)
    assert state.admit(sent, 0.0).rows is None
    assert state.pending("c") == (7,) and state.pending("d") == ()
    state.done()
    assert state.pending("c") == (7,)
    state.gone_on(sent)
    assert state.pending("c") == ()
    state.check()


def test_a_frame_to_another_range_is_not_followed() -> None:
    state = ShardState(SHAPE)
    state.open(opening(1), 0.0)
    with pytest.raises(FrameRejected) as caught:
        state.follow(replace(frame(Kind.DECODE, [(1, 1, 0, 0)], [1]), route=(Hop(LayerRange(0, 3), "b"),)))
    assert caught.value.reason == "route"


def test_where_states_are_carried_a_step_begins_only_where_some_stand() -> None:
    """A replay from another position is answered with the last one before it that has states, and begins there."""
    context = 4 * EVERY
    state = ShardState(replace(SHAPE, context=context, carries=True))

    def admitted(kind: Kind, start: int, count: int, epoch: int) -> tuple[bool, list[int]]:
        admission = state.admit(frame(kind, [(1, epoch, start, 0)], [1] * count), 0.0)
        if not admission.nothing:
            state.done()
        return not admission.nothing, [int(at) for nack in admission.nacks for at in nack.positions]

    reservation = state.open(opening(1, 1), 0.0)
    assert reservation.begins == (0,)
    assert admitted(Kind.PREFILL, 0, EVERY + 20, 1) == (True, [])
    for at in range(EVERY + 20, EVERY + 30):
        assert admitted(Kind.DECODE, at, 1, 1) == (True, [])
    assert reservation.begins is not None and {0, EVERY, EVERY + 29, EVERY + 30} <= set(reservation.begins)
    assert admitted(Kind.DECODE, EVERY + 29, 1, 1) == (True, [])  # the last step again
    assert admitted(Kind.DECODE, EVERY + 40, 1, 1) == (False, [EVERY + 30])
    assert admitted(Kind.PREFILL, EVERY + 5, 9, 1) == (False, [EVERY])
    reopened = state.open(opening(1, 2, keep=EVERY + 31), 0.0)
    assert reopened.filled == EVERY and reopened.begins == (0, EVERY)
    assert admitted(Kind.PREFILL, EVERY, 12, 2) == (True, [])
    kept = state.open(opening(1, 3, keep=EVERY - 1), 0.0)
    assert kept.filled == 0 and kept.begins == (0,)
    state.check()


def test_a_row_with_states_is_neither_kept_nor_copied() -> None:
    state = ShardState(replace(SHAPE, carries=True))
    held = Prefix(digest="d" * 32, positions=16)
    state.open(opening(1).model_copy(update={"prompt": held}), 0.0)
    assert not state.admit(frame(Kind.PREFILL, [(1, 1, 0, 0)], [1] * 20), 0.0).nothing
    state.done()
    running = state.open(opening(2).model_copy(update={"reuse": held}), 0.0)
    assert running.filled == 0 and running.copy_of is None
    state.close(Close(coordinator="c", sessions=(1,), kept=(HeldPrefix(session=1, digest=held.digest, positions=16),)), 0.0)
    later = state.open(opening(3).model_copy(update={"reuse": held}), 0.0)
    assert later.filled == 0 and later.copy_of is None
    state.check()
