"""Spans of this process on their way to the coordinators, which keep them: in batches, dropped rather than waited for."""

from __future__ import annotations

import asyncio
from collections import deque

from mesh.bus.connection import Bus
from mesh.errors import MeshError
from mesh.protocol import topics
from mesh.protocol.spans import MAX_SPANS, Span, SpanBatch

__all__ = ["SpanPublisher"]

_MOST_WAITING = 512
_GATHER_S = 0.2
"""So long the first span of a batch waits for others."""


class SpanPublisher:
    """`put` never waits. `dropped`: spans that found no place to wait, or could not be sent."""

    def __init__(self, bus: Bus) -> None:
        self.dropped = 0
        self._bus = bus
        self._waiting: deque[Span] = deque()
        self._sending = False

    def put(self, *spans: Span) -> None:
        for span in spans:
            if len(self._waiting) >= _MOST_WAITING:
                self.dropped += 1
            else:
                self._waiting.append(span)
        if self._waiting and not self._sending:
            self._sending = True
            self._bus.spawn(self._send(), "spans")

    async def _send(self) -> None:
        try:
            await asyncio.sleep(_GATHER_S)
            while self._waiting:
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_SPANS))]
                try:
                    await self._bus.send(topics.SPANS.at(), SpanBatch(spans=tuple(batch), dropped=self.dropped))
                except MeshError:
                    self.dropped += len(batch)
        finally:
            self._sending = False
