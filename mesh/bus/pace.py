"""How fast bytes may come, and when the rest will be there. Pure: the time is passed in."""

from __future__ import annotations

from collections import deque
from typing import Final

from mesh.settings.units import format_bytes, format_seconds

__all__ = ["Estimate", "RateLimit"]

_WINDOW_S: Final = 10.0
_SHORTEST_S: Final = 0.2


class RateLimit:
    """At most `bytes_per_s` on average."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_at = 0.0

    def delay_s(self, count: int, now: float) -> float:
        """How long to wait before the next `count` bytes are asked for. They count as asked for from then on."""
        begin = max(self._free_at, now)
        self._free_at = begin + count / self.bytes_per_s
        return begin - now


class Estimate:
    """The speed of the last ten seconds, and how long the rest takes at that speed."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self._seen: deque[tuple[float, int]] = deque()

    def note(self, done: int, now: float) -> None:
        """`done` bytes are there at `now`."""
        self.done = done
        self._seen.append((now, done))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _WINDOW_S:
            self._seen.popleft()

    @property
    def bytes_per_s(self) -> float:
        """0 as long as it is not known."""
        if len(self._seen) < 2:
            return 0.0
        (began, before), (ended, after) = self._seen[0], self._seen[-1]
        return max(0, after - before) / (ended - began) if ended - began >= _SHORTEST_S else 0.0

    def __str__(self) -> str:
        rate = self.bytes_per_s
        text = f"{format_bytes(self.done)} of {format_bytes(self.total)}"
        return f"{text}, {format_bytes(rate)}/s, {format_seconds((self.total - self.done) / rate, 2)} left" if rate else text
