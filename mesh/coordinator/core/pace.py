"""How many tokens of prompts a step may carry beside the sessions that decode. Pure.

A step takes `fixed + each * tokens`: a part that does not depend on the tokens (reading the weights, messages), and a part for each token.
Both are measured, for each route. A step that carries prompts takes longer than the same step without, and so do the gaps between the
tokens of the sessions in it. The budget is what makes it `slowdown` times as long:

    fixed + each * (decoding + budget) = slowdown * (fixed + each * decoding)
    budget = (slowdown - 1) * (decoding + fixed / each)

If more sessions wait for their first token than decode, they count in place of those that decode: the step may take as long as if they
decoded already. So a crowd is not held back by the few of it that came first.

What is observed is service: the time that a frame was away, without the time that it waited behind other work.
"""

from __future__ import annotations

import statistics
from collections import deque
from typing import Final

__all__ = ["RECOVERY", "SLOWDOWN", "Pace"]

SLOWDOWN: Final = 2.5
"""How many times as long a step may take because of prompts."""
RECOVERY: Final = 4.0
"""So many times longer yet while sessions that lost a shard compute their history again: they had tokens, and wait for the next one."""
LEAST: Final = 16
"""Tokens of prompts that a step carries at least: with fewer, a stage would spend more on its weights than on the prompts."""
PARTS: Final = 4
"""Where stages pad each chunk to a compiled size, no part is smaller than a chunk divided by this: their sizes are that far apart."""
_FIXED_TOKENS: Final = 8.0
"""While steps of one size only have been seen: the fixed part is taken to be worth so many tokens."""
_KEPT: Final = 15
_SIZES: Final = 14


class Pace:
    """The pace of one route."""

    def __init__(self, slowdown: float = SLOWDOWN) -> None:
        self._slowdown = slowdown
        # by the power of two above the number of tokens: (tokens, seconds) of the last steps
        self._seen: tuple[deque[tuple[int, float]], ...] = tuple(deque(maxlen=_KEPT) for _ in range(_SIZES))
        self._fixed_tokens = _FIXED_TOKENS
        self._stale = False

    def step(self, tokens: int, seconds: float) -> None:
        """The service of a frame with so many tokens."""
        if seconds > 0:
            self._seen[min(tokens.bit_length(), _SIZES - 1)].append((tokens, seconds))
            self._stale = True

    @property
    def fixed_tokens(self) -> float:
        """How many tokens take as long as the part of a step that does not depend on them."""
        if self._stale:
            self._stale = False
            self._fixed_tokens = self._fit()
        return self._fixed_tokens

    def budget(self, decoding: int, waiting: int, most: int, *, recovering: bool = False) -> int:
        """Tokens of prompts in a step where `decoding` sessions decode and `waiting` wait for their first token; at most `most`.
        recovering: some of those that wait had tokens before."""
        if not decoding:
            return most
        slowdown = self._slowdown * (RECOVERY if recovering else 1.0)
        budget = (slowdown - 1) * (max(decoding, waiting) + self.fixed_tokens)
        return max(min(int(budget), most), min(LEAST, most))

    def part(self, decoding: int, waiting: int, most: int, *, recovering: bool = False) -> int:
        """The same where stages pad a chunk: a whole one or a part that is a compiled size."""
        part = max(most // PARTS, 1)
        return most if self.budget(decoding, waiting, most, recovering=recovering) >= most else part

    def _fit(self) -> float:
        """A straight line through the medians of the sizes, by least squares."""
        points = [
            (statistics.median(tokens for tokens, _ in seen), statistics.median(seconds for _, seconds in seen))
            for seen in self._seen
            if len(seen) >= 3
        ]
        if len(points) < 2:
            return _FIXED_TOKENS
        # Relative errors count: otherwise the longest steps alone would decide.
        weights = [1 / seconds**2 for _, seconds in points]
        total = sum(weights)
        x0 = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
        y0 = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
        spread = sum(w * (x - x0) ** 2 for w, (x, _) in zip(weights, points, strict=True))
        slope = sum(w * (x - x0) * (y - y0) for w, (x, y) in zip(weights, points, strict=True)) / spread
        if slope <= 0:  # tokens cost nothing that can be seen
            return float(1 << _SIZES)
        return max(y0 / slope - x0, 0.0)
