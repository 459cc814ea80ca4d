"""Where a row's states stand: a step finds those that its tokens follow, and a replay a checkpoint."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.model.memory import STATE_PLACES
from mesh.runtime.row_states import EVERY, RowStates


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_step_reads_the_states_of_the_tokens_before_it_and_of_no_others(data: st.DataObject) -> None:
    """Each place holds the tokens that its states are made of. A replay may bring other tokens than there were."""
    states, places = RowStates(), [tuple[int, ...]()] * STATE_PLACES
    row: list[int] = []
    for step in range(data.draw(st.integers(1, 25))):
        start = data.draw(st.sampled_from(states.begins(len(row))))
        count = data.draw(st.one_of(st.integers(1, 3), st.integers(1, 3 * EVERY)))
        row = row[:start] + [step] * count
        for move in states.advance(start, count):
            before = () if move.source is None else places[move.source]
            assert before == tuple(row[: move.start]) and move.source != move.target
            places[move.target] = tuple(row[: move.stop])
            states.check()
        assert states.begins(10**9)[-1] == start + count
        assert all(place == tuple(row[:at]) for place, at in zip(places, states.stands, strict=True) if at is not None)


@settings(max_examples=100, deadline=None)
@given(counts=st.lists(st.integers(1, 2 * EVERY), min_size=1, max_size=12), ones=st.integers(2, 2 * EVERY))
def test_a_row_that_grows_keeps_its_last_two_checkpoints_and_where_it_stood_before(counts: list[int], ones: int) -> None:
    states, at = RowStates(), 0
    for count in [*counts, *[1] * ones]:
        states.advance(at, count)
        at += count
        wanted = {at // EVERY * EVERY, (at // EVERY - 1) * EVERY, at}
        assert {position for position in wanted if position > 0} <= set(states.begins(at))
    assert at - 1 in states.begins(at)


def test_a_repeated_step_changes_nothing() -> None:
    states = RowStates()
    states.advance(0, 5)
    (first,) = states.advance(5, 1)
    stands = list(states.stands)
    assert states.advance(5, 1) == [first] and states.stands == stands
