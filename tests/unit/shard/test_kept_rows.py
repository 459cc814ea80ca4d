"""Rows that keep what they hold: whatever is opened and closed, a session's row holds its own tokens as far as it is said to be filled."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from mesh.protocol.control import Close, HeldPrefix, Open, Prefix
from mesh.protocol.frame_codec import Flags, Frame, Hop, Kind
from mesh.protocol.status import Heartbeat
from mesh.shard.state import Reservation, ShardShape, ShardState
from mesh.types import LayerRange

HASH = "0" * 16
ROWS, CONTEXT = 3, 32
LAYERS = LayerRange(0, 4)
SHAPE = ShardShape("a", HASH, LAYERS, 4, ROWS, CONTEXT, 100, 8, np.dtype(np.float32), 100)
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=8)


def name_of(tokens: Sequence[int]) -> str:
    return hashlib.sha256(repr(list(tokens)).encode()).hexdigest()[:32]


def holding(tokens: Sequence[int], positions: int | None = None) -> Prefix:
    return Prefix(digest=name_of(tokens), positions=positions or len(tokens))


def opening(session: int, reuse: Prefix | None = None, prompt: Prefix | None = None, epoch: int = 1, keep: int = 0) -> Open:
    return Open(session=session, epoch=epoch, coordinator="c", model_hash=HASH, prompt_length=1, keep=keep, reuse=reuse, prompt=prompt)


class Rows:
    """A state, and what its rows hold in truth."""

    def __init__(self, rows: int = ROWS) -> None:
        self.state = ShardState(SHAPE if rows == ROWS else ShardShape(**{**{f: getattr(SHAPE, f) for f in SHAPE.__slots__}, "rows": rows}))
        self.content: dict[int, list[int]] = {row: [] for row in range(rows)}
        self.history: dict[int, list[int]] = {}
        self.epoch: dict[int, int] = {}

    def open(self, session: int, history: Sequence[int], reuse: Prefix | None = None, prompt: Prefix | None = None) -> Reservation:
        reservation = self.state.open(opening(session, reuse, prompt), 0.0)
        source, reservation.copy_of = reservation.copy_of, None
        if source is not None:
            self.content[reservation.row] = self.content[source][: reservation.filled]
        self.history[session], self.epoch[session] = list(history), 1
        self.check(session)
        return reservation

    def compute(self, session: int, count: int) -> None:
        reservation = self.state.reservation(session)
        assert reservation is not None
        start = reservation.filled
        tokens = self.history[session][start : start + count]
        if not tokens:
            return
        frame = Frame(
            Kind.PREFILL,
            HASH,
            "c",
            (Hop(LAYERS, "a"),),
            np.array([session], np.uint64),
            np.array([self.epoch[session]], np.uint32),
            np.array([start], np.uint32),
            np.array([[reservation.slot]], np.uint32),
            np.array(tokens, np.int32),
            flags=Flags(0),
        )
        assert self.state.admit(frame, 0.0).rows is None
        self.state.done()
        self.content[reservation.row][start:] = tokens
        self.check(session)

    def close(self, session: int, kept: Prefix | None = None) -> None:
        held = () if kept is None else (HeldPrefix(session=session, digest=kept.digest, positions=kept.positions),)
        assert self.state.close(Close(coordinator="c", sessions=(session,), kept=held), 0.0) == 1
        del self.history[session]

    def check(self, session: int) -> None:
        reservation = self.state.reservation(session)
        assert reservation is not None
        filled = reservation.filled
        assert self.content[reservation.row][:filled] == self.history[session][:filled], "a row holds another session's tokens"


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.rows = Rows()
        self.names: list[list[int]] = [[0, 1, 2]]
        self.count = 0

    @precondition(lambda self: self.rows.state.free_rows)
    @rule(data=st.data(), rest=TOKENS, reuses=st.booleans(), running=st.booleans())
    def opens(self, data: st.DataObject, rest: list[int], reuses: bool, running: bool) -> None:
        self.count += 1
        begins = data.draw(st.sampled_from(self.names))
        positions = data.draw(st.integers(1, len(begins)))
        history = [*(begins[:positions] if reuses else ()), *rest][: CONTEXT - 4]
        reuse = holding(begins, positions) if reuses and len(history) >= positions else None
        self.rows.open(self.count, history, reuse, holding(history) if running else None)
        if running:
            self.names.append(history)

    @precondition(lambda self: self.rows.history)
    @rule(data=st.data(), count=st.integers(1, 6))
    def computes(self, data: st.DataObject, count: int) -> None:
        self.rows.compute(data.draw(st.sampled_from(sorted(self.rows.history))), count)

    @precondition(lambda self: self.rows.history)
    @rule(data=st.data(), rest=TOKENS)
    def goes_on(self, data: st.DataObject, rest: list[int]) -> None:
        """The answer makes the history longer."""
        session = data.draw(st.sampled_from(sorted(self.rows.history)))
        self.rows.history[session] = [*self.rows.history[session], *rest][:CONTEXT]

    @precondition(lambda self: self.rows.history)
    @rule(data=st.data(), keeps=st.booleans(), claims=st.integers(0, 3))
    def closes(self, data: st.DataObject, keeps: bool, claims: int) -> None:
        """A coordinator may say that more is computed than is: the shard knows better."""
        session = data.draw(st.sampled_from(sorted(self.rows.history)))
        history = self.rows.history[session]
        reservation = self.rows.state.reservation(session)
        assert reservation is not None
        held = history[: reservation.filled + claims]
        if keeps and held:
            self.names.append(held)
            self.rows.close(session, holding(held))
        else:
            self.rows.close(session)

    @precondition(lambda self: self.rows.history)
    @rule(data=st.data(), keep=st.integers(0, CONTEXT))
    def fails_over(self, data: st.DataObject, keep: int) -> None:
        session = data.draw(st.sampled_from(sorted(self.rows.history)))
        self.rows.epoch[session] += 1
        self.rows.state.open(opening(session, holding(self.names[0]), epoch=self.rows.epoch[session], keep=keep), 0.0)
        self.rows.check(session)

    @invariant()
    def agrees(self) -> None:
        self.rows.state.check()
        assert self.rows.state.free_rows == ROWS - len(self.rows.history)


Machine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestAnyOrder = Machine.TestCase

CHAT = list(range(20))


def kept(rows: Rows, session: int, history: Sequence[int]) -> Reservation:
    """A session that computed its history and left it."""
    reservation = rows.open(session, history)
    rows.compute(session, len(history))
    rows.close(session, holding(history))
    return reservation


def test_the_next_turn_gets_the_row_itself() -> None:
    rows = Rows()
    before = kept(rows, 1, CHAT)
    after = rows.open(2, [*CHAT, 1, 2], holding(CHAT, 18))
    assert (after.row, after.filled, rows.state.reused) == (before.row, 18, {"taken": 1})


def test_a_short_beginning_is_copied_so_that_the_long_history_stays() -> None:
    rows = Rows()
    before = kept(rows, 1, CHAT)
    after = rows.open(2, [*CHAT[:6], 9, 9], holding(CHAT, 6))
    assert after.row != before.row and after.filled == 6 and rows.state.kept_rows == 1
    assert rows.open(3, [*CHAT, 1], holding(CHAT, 20)).row == before.row


def test_without_another_row_a_short_beginning_takes_the_row() -> None:
    rows = Rows(1)
    kept(rows, 1, CHAT)
    assert rows.open(2, [*CHAT[:6], 9, 9], holding(CHAT, 6)).filled == 6


def test_a_running_session_is_copied_from_as_far_as_it_is_computed() -> None:
    rows = Rows()
    first = rows.open(1, CHAT, prompt=holding(CHAT))
    rows.compute(1, 7)
    second = rows.open(2, [*CHAT[:10], 5], holding(CHAT, 10))
    assert second.row != first.row and second.filled == 7


def test_a_row_that_was_taken_is_copied_from_under_the_name_by_which_it_was_kept() -> None:
    rows = Rows()
    kept(rows, 1, CHAT)
    rows.open(2, [*CHAT, 1], holding(CHAT, 20))
    assert rows.open(3, [*CHAT, 2], holding(CHAT, 20)).filled == 20


def test_free_rows_are_taken_before_kept_ones_and_those_oldest_first() -> None:
    rows = Rows()
    oldest, middle = kept(rows, 1, [1] * 8).row, kept(rows, 2, [2] * 8).row
    assert rows.open(3, [3]).row not in (oldest, middle)
    assert rows.open(4, [4]).row == oldest
    assert rows.open(5, [1] * 9, holding([1] * 8)).filled == 0
    assert rows.state.reused == {"missed": 1}


def test_several_rows_are_closed_at_once_and_each_keeps_what_is_its_own() -> None:
    rows = Rows()
    for session, history in ((1, CHAT), (2, CHAT), (3, [7] * 8)):
        rows.open(session, history)
        rows.compute(session, len(history))
    held = tuple(HeldPrefix(session=session, **holding(CHAT).model_dump()) for session in (1, 2))
    assert rows.state.close(Close(coordinator="c", sessions=(1, 2, 3), kept=held), 0.0) == 3
    assert rows.state.kept_rows == 1 and rows.state.free_rows == ROWS, "equal rows are kept once, and what has no name is not kept"
    assert rows.open(4, [*CHAT, 1], holding(CHAT, 20)).filled == 20


def test_an_unknown_digest_is_a_whole_prompt() -> None:
    rows = Rows()
    kept(rows, 1, CHAT)
    assert rows.open(2, [1, 2, 3], holding([1, 2, 3])).filled == 0


def test_rows_of_a_coordinator_that_is_gone_are_free() -> None:
    rows = Rows()
    rows.open(1, CHAT, prompt=holding(CHAT))
    rows.state.heartbeat(Heartbeat(coordinator="c", ttl_s=1.0), 0.0)
    assert rows.state.expire(5.0) == [1] and rows.state.free_rows == ROWS
