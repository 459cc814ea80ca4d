"""The spans that other processes have sent: of gateways, and of shards that start. The last ones, bounded; of an older trace first gone."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from mesh.protocol.spans import Span

__all__ = ["SpanStore"]

MOST_SPANS = 4096
MOST_OF_A_TRACE = 256


class SpanStore:
    """`dropped`: spans that were not kept, because their trace had too many."""

    def __init__(self) -> None:
        self.dropped = 0
        self._traces: OrderedDict[str, dict[str, Span]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, spans: Iterable[Span]) -> None:
        for span in spans:
            of_trace = self._traces.setdefault(span.trace, {})
            self._traces.move_to_end(span.trace)
            if span.span not in of_trace and len(of_trace) >= MOST_OF_A_TRACE:
                self.dropped += 1
                continue
            self._count += span.span not in of_trace
            of_trace[span.span] = span
        while self._count > MOST_SPANS:
            _, oldest = self._traces.popitem(last=False)
            self._count -= len(oldest)

    def of(self, trace: str) -> list[Span]:
        return list(self._traces.get(trace, {}).values())
