"""Large pieces of work that must run on the event loop, such as reading a document of some MB.

Several of them in a row would stop everything else for the sum of their times, whoever sent them. So they take turns: one at a time, and
after each the loop is left to the others for longer than the piece took.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, TypeVar

__all__ = ["Turns"]

R = TypeVar("R")

_OTHERS: Final = 2.0
"""Times that a piece took, before the next one begins: large pieces have a third of the loop at most."""
_LONGEST_WAIT_S: Final = 0.5
"""After one piece. The machine may have stood still meanwhile."""


class Turns:
    """`small`: work on no more than so many bytes does not wait."""

    def __init__(self, *, small: int = 64 * 1024) -> None:
        self._small = small
        self._turn = asyncio.Lock()
        self._next_at = 0.0

    async def run(self, size: int, work: Callable[[], R]) -> R:
        """What `work` returns or raises. `size`: bytes that it works on."""
        if size <= self._small:
            return work()
        async with self._turn:
            if (wait := self._next_at - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            began = time.monotonic()
            try:
                return work()
            finally:
                ended = time.monotonic()
                self._next_at = ended + min(_OTHERS * (ended - began), _LONGEST_WAIT_S)
