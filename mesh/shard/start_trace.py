"""The spans of a shard's start: from the beginning of its process until it is ready. `mesh trace` shows them by their trace's id, which
the log names."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from mesh.protocol.spans import Span, Value
from mesh.telemetry.context import TraceContext, new_span_id
from mesh.types import LayerRange

__all__ = ["StartTrace"]


class StartTrace:
    """Times the parts of a start: `with start.part("load model"): ...`. `spans` are all of them, once the shard is ready."""

    def __init__(self) -> None:
        self.trace = TraceContext.new().trace
        self._began_ns = time.time_ns()
        self._parts: list[tuple[str, int, int]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began_ns = time.time_ns()
        yield
        self._parts.append((name, began_ns, max(time.time_ns(), began_ns)))

    def spans(self, shard: str, layers: LayerRange) -> list[Span]:
        root, now = new_span_id(), max(time.time_ns(), self._began_ns)
        attributes: dict[str, Value] = {"mesh.shard": shard, "mesh.range": str(layers)}

        def made(name: str, start_ns: int, end_ns: int, span: str, parent: str | None = None) -> Span:
            return Span(
                trace=self.trace,
                span=span,
                parent=parent,
                name=name,
                service="shard",
                instance=shard,
                start_ns=start_ns,
                end_ns=end_ns,
                attributes=attributes,
            )

        whole = made("start shard", self._began_ns, now, root)
        return [whole, *(made(name, start, end, new_span_id(), root) for name, start, end in self._parts)]
