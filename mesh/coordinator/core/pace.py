"""How much of a prompt goes out at a time while other sessions decode. Pure.

A decode step behind a prefill chunk waits for it at every stage. So the time between two tokens is that of a chunk and a step. On an
accelerator a whole chunk takes about as long as a step, because both read every weight once; on a CPU it takes twenty times as long. So a
whole chunk is sent where it has been seen to take at most WHOLE_STEPS steps, and a part of it otherwise. The gaps between tokens then stay
under 5 steps. Parts are no smaller than that, because a stage would then spend more on its weights than on the prompt.

What is observed is service: the time that a frame was away, without the time that it waited behind other work.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Final

__all__ = ["REVIEW_AFTER", "Pace"]

WHOLE_STEPS: Final = 3.0
PART: Final = 4
"""A part is a chunk divided by this. The runtime's chunk sizes are that far apart (mesh/runtime/buckets.py)."""
REVIEW_AFTER: Final = 512
"""After so many parts a whole chunk is tried again: the last one may have been a first run, or the machine may have been busy."""


class Pace:
    """The pace of one route."""

    def __init__(self) -> None:
        self._steps: deque[float] = deque(maxlen=16)
        self._whole: deque[float] = deque(maxlen=5)
        self._part: deque[float] = deque(maxlen=5)
        self._parts = 0

    def step(self, seconds: float) -> None:
        """The service of a decode frame."""
        if seconds > 0:
            self._steps.append(seconds)

    def chunk(self, tokens: int, most: int, seconds: float) -> None:
        """The service of a prefill frame that was sent while others decoded, with `tokens` of the `most` that a chunk has. Sizes other than
        a whole chunk and a part say nothing, because stages round up."""
        if seconds <= 0:
            return
        if tokens == most:
            self._whole.append(seconds)
            self._parts = 0
        elif tokens == _part(most):
            self._part.append(seconds)
            self._parts += 1
            if self._parts >= REVIEW_AFTER:
                self._whole.clear()

    def size(self, most: int) -> int:
        """Tokens of the next chunk while others decode; `most` while nothing has been observed."""
        return most if self._whole_fits() else _part(most)

    def _whole_fits(self) -> bool:
        if not self._steps or not self._whole:
            return True
        limit_s = WHOLE_STEPS * statistics.median(self._steps)
        if self._part and PART * statistics.median(self._part) <= limit_s:
            return True
        return statistics.median(self._whole) <= limit_s


def _part(most: int) -> int:
    return max(most // PART, 1)
