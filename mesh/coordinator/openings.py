"""Asks shards for rows. What a shard is asked for while it has not answered yet goes out together, in one message.

So a crowd that arrives costs a few messages for each stage, and a session that comes alone waits for nothing.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Generic, NamedTuple, TypeVar

from mesh.bus import Bus
from mesh.errors import DeadlineExceeded, MeshError, Unavailable
from mesh.protocol import topics
from mesh.protocol.control import MOST_OPENS, Open, Opened, OpenMany
from mesh.protocol.failures import ErrorReply

__all__ = ["Openings"]

MOST_BYTES: Final = 512 * 1024
"""Of one message with several sessions. One that is larger goes alone."""

E = TypeVar("E")


class _Asked(NamedTuple, Generic[E]):
    """A session that is to be opened, what it was asked for, and until when an answer counts (seconds of the loop's clock)."""

    what: E
    message: Open
    until: float


class Openings(Generic[E]):
    """`answered(shard, [(what, answer)])` is awaited for each answer of a shard: `Opened`, or why there is none. `timeout_s`: for each
    session, from the time when it was asked for."""

    def __init__(
        self, bus: Bus, answered: Callable[[str, list[tuple[E, Opened | MeshError]]], Awaitable[None]], *, timeout_s: float
    ) -> None:
        self._bus = bus
        self._answered = answered
        self._timeout_s = timeout_s
        self._waiting: dict[str, deque[_Asked[E]]] = {}  # by shard; of those that are being asked

    def ask(self, shard: str, what: E, message: Open) -> None:
        """Ask `shard` for a row. The answer comes to `answered`."""
        asked = _Asked(what, message, asyncio.get_running_loop().time() + self._timeout_s)
        if shard in self._waiting:
            self._waiting[shard].append(asked)
            return
        self._waiting[shard] = deque([asked])
        self._ask_on(shard)

    def _ask_on(self, shard: str) -> None:
        self._bus.spawn(self._run(shard), "opening rows")

    async def _run(self, shard: str) -> None:
        """Ask until nothing waits."""
        waiting = self._waiting[shard]
        try:
            while waiting:
                batch = _next_batch(waiting)
                answers = await self._answers(shard, batch)
                await self._answered(shard, [(asked.what, answer) for asked, answer in zip(batch, answers, strict=True)])
        except Exception:
            self._ask_on(shard)  # a defect in what takes the answers: the others still wait
            raise
        del self._waiting[shard]

    async def _answers(self, shard: str, batch: Sequence[_Asked[E]]) -> list[Opened | MeshError]:
        left_s = max(asked.until for asked in batch) - asyncio.get_running_loop().time()
        if left_s <= 0:
            return [DeadlineExceeded(f"shard {shard} has not answered in time") for _ in batch]
        try:
            if len(batch) == 1:
                return [await self._bus.request(topics.OPEN.at(shard), batch[0].message, timeout_s=left_s)]
            many = OpenMany(opens=tuple(asked.message for asked in batch))
            answers = (await self._bus.request(topics.OPEN_MANY.at(shard), many, timeout_s=left_s)).answers
        except MeshError as error:
            return [error] * len(batch)
        if len(answers) != len(batch):
            return [Unavailable(f"shard {shard} gave {len(answers)} answers for {len(batch)} sessions")] * len(batch)
        return [answer.error() if isinstance(answer, ErrorReply) else answer for answer in answers]


def _next_batch(waiting: deque[_Asked[E]]) -> list[_Asked[E]]:
    """Takes the next ones off the queue: one at least."""
    batch = [waiting.popleft()]
    size = _size(batch[0]) if waiting else 0
    while waiting and len(batch) < MOST_OPENS:
        size += _size(waiting[0])
        if size > MOST_BYTES:
            break
        batch.append(waiting.popleft())
    return batch


def _size(asked: _Asked[E]) -> int:
    return len(asked.message.to_bytes())
