"""How fast bytes may come, and when the rest will be there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.bus.pace import Estimate, RateLimit


@given(st.lists(st.tuples(st.integers(1, 10_000), st.floats(0, 5)), min_size=1, max_size=50))
def test_no_more_than_the_rate_is_ever_asked_for(requests: list[tuple[int, float]]) -> None:
    limit, now, asked = RateLimit(1000.0), 0.0, 0
    for count, idle_s in requests:
        now += idle_s
        now += limit.delay_s(count, now)
        assert asked <= 1000.0 * now + 1e-6  # what came before has had its time
        asked += count


def test_time_in_which_nothing_was_asked_for_is_not_made_up() -> None:
    limit = RateLimit(100.0)
    assert limit.delay_s(100, now=50.0) == 0.0
    assert limit.delay_s(100, now=50.0) == pytest.approx(1.0)
    assert limit.delay_s(1, now=60.0) == 0.0


def test_an_estimate_is_of_the_last_ten_seconds() -> None:
    estimate = Estimate(1_000_000)
    assert str(estimate) == "0 B of 1 MB"
    estimate.note(0, now=0.0)
    for second in range(1, 31):
        estimate.note(second * 1000 if second <= 10 else 10_000 + (second - 10) * 2000, now=float(second))
    assert estimate.bytes_per_s == pytest.approx(2000.0)
    assert str(estimate) == "50 kB of 1 MB, 2 kB/s, 7 min 55 s left"


def test_an_estimate_says_no_speed_that_it_does_not_know() -> None:
    estimate = Estimate(10)
    estimate.note(5, now=1.0)
    assert estimate.bytes_per_s == 0.0
    estimate.note(5, now=1.01)
    assert str(estimate) == "5 B of 10 B"
