"""The price of a million tokens, from prices and speeds that are given."""

from __future__ import annotations

import argparse

import pytest
from cost import Hosts, per_million, traffic_price


def test_a_million_tokens_cost_the_hours_that_they_take() -> None:
    hosts = [Hosts.parse("2x0.5"), Hosts.parse("1")]  # 2 an hour
    assert per_million(hosts, 1e6 / 3600, 1.0) == pytest.approx(2.0)
    assert per_million(hosts, 1e6 / 3600, 0.25) == pytest.approx(8.0)  # idle hosts are paid as well


def test_traffic_is_paid_by_hop() -> None:
    assert traffic_price(2, 8192, 0.02) == pytest.approx(2 * 8.192 * 0.02)
    assert per_million([Hosts(1, 0.0)], 10, 1.0, traffic=0.5) == 0.5


@pytest.mark.parametrize("text", ["ax1", "0x1", "3x-1", "x", ""])
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        Hosts.parse(text)


@pytest.mark.parametrize(("speed", "busy"), [(0.0, 1.0), (10.0, 0.0), (10.0, 1.5)])
def test_a_speed_or_a_share_that_cannot_be(speed: float, busy: float) -> None:
    with pytest.raises(ValueError, match="more than 0"):
        per_million([Hosts(1, 1.0)], speed, busy)
