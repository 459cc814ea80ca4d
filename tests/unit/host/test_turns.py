"""Large pieces of work take turns on the event loop."""

from __future__ import annotations

import asyncio
import time
from itertools import pairwise

import pytest

from mesh.host.turns import Turns

LARGE = 1_000_000


def busy(seconds: float = 0.01) -> float:
    """Occupies the loop; returns when it ended."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pass
    return time.monotonic()


def test_after_a_large_piece_the_loop_is_the_others_for_longer_than_it_took() -> None:
    async def work() -> None:
        turns = Turns()
        ends = sorted(await asyncio.gather(*(turns.run(LARGE, busy) for _ in range(4))))
        assert all(later - earlier >= 0.03 for earlier, later in pairwise(ends))  # 0.02 of rest and 0.01 of work

    asyncio.run(work())


def test_small_work_does_not_wait_for_large_work() -> None:
    async def work() -> None:
        turns, order = Turns(), list[str]()

        def large_piece() -> None:
            order.append("large")
            busy()

        large = [asyncio.create_task(turns.run(LARGE, large_piece)) for _ in range(3)]
        await asyncio.sleep(0)
        await turns.run(100, lambda: order.append("small"))
        assert order == ["large", "small"]
        await asyncio.gather(*large)

    asyncio.run(work())


def test_a_piece_that_fails_or_is_given_up_leaves_the_turn_to_the_next() -> None:
    async def work() -> None:
        turns = Turns()
        with pytest.raises(ZeroDivisionError):
            await turns.run(LARGE, lambda: 1 // 0)
        waiting = asyncio.create_task(turns.run(LARGE, busy))
        await turns.run(LARGE, busy)
        waiting.cancel()
        assert await turns.run(LARGE, lambda: "done") == "done"

    asyncio.run(work())
