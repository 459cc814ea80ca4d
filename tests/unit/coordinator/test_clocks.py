"""The clocks of the shards are measured from the steps: however wrong they are, the ways of a step make up its time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.coordinator.clocks import Clocks
from mesh.protocol.frame import Hop, StageTiming
from mesh.types import LayerRange

ROUTE = tuple(Hop(LayerRange(index, index + 1), f"shard-{index}") for index in range(3))
SECOND = 1_000_000


def step(clocks: Clocks, sent_us: int, ways: list[int], own: list[int], ahead: list[int]) -> tuple[float, ...]:
    """A step whose ways take `ways` microseconds and whose stages `own`, at shards whose clocks are `ahead`."""
    at, timings = sent_us, []
    for way, own_us, ahead_us in zip(ways, own, ahead, strict=False):
        at += way
        timings.append(StageTiming(compute_us=own_us, arrived_us=at + ahead_us))
        at += own_us
    return clocks.ways(ROUTE, timings, sent_us, at + ways[-1])


us = st.integers(1, 50_000)


def many(each: st.SearchStrategy[int], count: int) -> st.SearchStrategy[list[int]]:
    return st.lists(each, min_size=count, max_size=count)


@given(many(us, 4), many(us, 3), many(st.integers(-9 * SECOND, 9 * SECOND), 3))
def test_the_ways_make_up_the_step_whatever_the_clocks_say(ways: list[int], own: list[int], ahead: list[int]) -> None:
    clocks = Clocks()
    for number in range(3):
        found = step(clocks, 100 * SECOND + number * SECOND, ways, own, ahead)
        assert len(found) == 4 and min(found) >= 0
        assert sum(found) == pytest.approx(sum(ways), abs=1)
    for index in range(3):
        clock = clocks[f"shard-{index}"]
        assert clock is not None and abs(clock.offset_us - ahead[index]) <= clock.error_us + 1


def test_a_clock_two_seconds_ahead_is_seen_and_corrected() -> None:
    clocks = Clocks()
    found = step(clocks, 100 * SECOND, [400, 300, 300, 400], [5000, 7000, 6000], [0, 2 * SECOND, -SECOND])
    clock = clocks["shard-1"]
    assert clock is not None and clock.offset_us == pytest.approx(2 * SECOND, abs=1400) and clock.error_us <= 700
    assert sum(found) == pytest.approx(1400)


def test_quick_steps_narrow_what_slow_ones_leave_open() -> None:
    clocks = Clocks()
    step(clocks, 100 * SECOND, [9000, 9000, 9000, 9000], [100, 100, 100], [0, 5000, 0])
    wide = clocks["shard-1"]
    assert wide is not None
    before = wide.error_us
    step(clocks, 101 * SECOND, [100, 100, 100, 100], [100, 100, 100], [0, 5000, 0])
    after = clocks["shard-1"]
    assert after is not None and after.error_us < before / 20 and after.offset_us == pytest.approx(5000, abs=200)


def test_a_clock_that_was_set_is_measured_anew() -> None:
    clocks = Clocks()
    step(clocks, 100 * SECOND, [100] * 4, [100] * 3, [0, 0, 0])
    step(clocks, 101 * SECOND, [100] * 4, [100] * 3, [0, 3 * SECOND, 0])
    clock = clocks["shard-1"]
    assert clock is not None and clock.offset_us == pytest.approx(3 * SECOND, abs=200)


def test_a_step_without_times_of_arrival_is_shared_equally() -> None:
    assert Clocks().ways(ROUTE, [StageTiming(compute_us=100)] * 3, 0, 700) == (100, 100, 100, 100)
    assert Clocks()["shard-0"] is None
