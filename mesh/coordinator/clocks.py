"""The clocks of the shards, measured from the steps themselves.

A step is a request and its answer: it leaves the coordinator, passes every stage, and comes back. Each stage says when the frame arrived,
by its own clock, and how long it had it. So the frame cannot have arrived before the earlier stages were done with it, nor so late that
the later ones could not have been. That gives a lowest and a highest value of how far the shard's clock is ahead of the coordinator's. The
narrowest of these intervals is kept. It widens by what clocks drift, and begins anew where a later step contradicts it, after a clock was
set or a shard came to another machine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from mesh.protocol.frame import Hop, StageTiming

__all__ = ["Clock", "Clocks"]

_DRIFT: Final = 1e-4
"""Seconds that two clocks may come apart in a second. Quartz clocks drift a tenth of it."""
_MOST_SHARDS: Final = 4096


@dataclass(slots=True)
class Clock:
    """A shard's clock is ahead of the coordinator's by `low_us` to `high_us` microseconds; `at_us`: when that was measured."""

    low_us: float
    high_us: float
    at_us: float

    @property
    def offset_us(self) -> float:
        return (self.low_us + self.high_us) / 2

    @property
    def error_us(self) -> float:
        return (self.high_us - self.low_us) / 2

    def narrow(self, low_us: float, high_us: float, at_us: float) -> None:
        """Take in one more measurement."""
        drift = max(at_us - self.at_us, 0.0) * _DRIFT
        low, high = max(self.low_us - drift, low_us), min(self.high_us + drift, high_us)
        self.low_us, self.high_us = (low, high) if low <= high else (low_us, high_us)
        self.at_us = at_us


class Clocks:
    def __init__(self) -> None:
        self._clocks: OrderedDict[str, Clock] = OrderedDict()

    def __getitem__(self, shard: str) -> Clock | None:
        return self._clocks.get(shard)

    def ways(self, route: Sequence[Hop], timings: Sequence[StageTiming], sent_us: float, back_us: float) -> tuple[float, ...]:
        """Microseconds on each of the n + 1 ways of a step through n stages. `sent_us`, `back_us`: when it left and came back, in
        microseconds since 1970 by the coordinator's clock. With the stages' own times the ways make up the whole step. They are equal
        where a stage did not say when the frame arrived."""
        own = [timing.queue_us + timing.compute_us + timing.codec_us for timing in timings]
        left = max(back_us - sent_us - sum(own), 0.0)
        if len(timings) != len(route) or not all(timing.arrived_us for timing in timings):
            return (left / (len(timings) + 1),) * (len(timings) + 1)
        ways = []
        earliest, at = sent_us, sent_us  # when the frame can have left the process before, and when it is taken to have left it
        for hop, timing, own_us in zip(route, timings, own, strict=True):
            latest = earliest + left
            clock = self._seen(hop.shard, timing.arrived_us - latest, timing.arrived_us - earliest, back_us)
            arrived = min(max(timing.arrived_us - clock.offset_us, at), latest)
            ways.append(arrived - at)
            at = arrived + own_us
            earliest += own_us
        ways.append(max(earliest + left - at, 0.0))
        return tuple(ways)

    def _seen(self, shard: str, low_us: float, high_us: float, at_us: float) -> Clock:
        clock = self._clocks.get(shard)
        if clock is None:
            clock = self._clocks[shard] = Clock(low_us, high_us, at_us)
            if len(self._clocks) > _MOST_SHARDS:
                self._clocks.popitem(last=False)
        else:
            clock.narrow(low_us, high_us, at_us)
        return clock
