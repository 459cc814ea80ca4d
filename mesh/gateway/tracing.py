"""A span for each HTTP request that asks for something, and the trace that the request belongs to.

The trace is that of the caller's `traceparent`, or a new one. It is the current one of OpenTelemetry while the request is handled, so
the client passes it on to the coordinator. The span goes to the coordinators, where `mesh trace` finds it; and to a collector, if the
trace is kept there.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

from opentelemetry import context, trace

from mesh.client import AsyncMeshClient
from mesh.protocol.spans import Span, Value
from mesh.telemetry.context import TraceContext, chosen, new_span_id, remote
from mesh.telemetry.export import SpanExport

__all__ = ["EdgeTracing", "HttpTrace", "keep"]

_current: ContextVar[HttpTrace | None] = ContextVar("mesh_http_trace", default=None)


@dataclass(slots=True)
class HttpTrace:
    """The trace of one HTTP request. span: its own in it. kept: whether its spans go to a collector."""

    context: TraceContext
    span: str = field(default_factory=new_span_id)
    kept: bool = False


def keep(traceparent: str | None) -> None:
    """The answer's coordinator has said, in a trace context, whether it keeps the trace."""
    mine = _current.get()
    if mine is not None and TraceContext.parse(traceparent).sampled:
        mine.kept = True


class EdgeTracing:
    """`ratio`: of the traces that begin here, so many are kept. `export`: where spans go that leave the mesh; None: nowhere."""

    def __init__(self, client: AsyncMeshClient, *, ratio: float = 0.0, export: SpanExport | None = None) -> None:
        self._client = client
        self._ratio = ratio
        self._export = export
        self._name = f"gateway-{secrets.token_hex(4)}"

    @contextmanager
    def of(self, headers: Mapping[str, str]) -> Iterator[HttpTrace]:
        """The trace of a request, as OpenTelemetry's current one."""
        found = TraceContext.parse(headers.get("traceparent"))
        if found.sampled is None:
            found = replace(found, sampled=chosen(found.trace, self._ratio))
        mine = HttpTrace(found, kept=bool(found.sampled))
        above = remote(found.trace, mine.span, sampled=bool(found.sampled))
        token, mark = context.attach(trace.set_span_in_context(above)), _current.set(mine)
        try:
            yield mine
        finally:
            _current.reset(mark)
            context.detach(token)

    def ended(self, mine: HttpTrace, scope: Mapping[str, Any], status: int, began_ns: int, end_ns: int) -> None:
        """A request is over. One that only looks (GET) has no span."""
        if scope["method"] == "GET":
            return
        route = getattr(scope.get("route"), "path", None)
        attributes: dict[str, Value] = {"http.request.method": scope["method"], "http.response.status_code": status}
        if route is not None:
            attributes["http.route"] = route
        failed = status >= 500
        if failed:
            attributes["error.type"] = str(status)
        span = Span(
            trace=mine.context.trace,
            span=mine.span,
            parent=mine.context.span,
            name=f"{scope['method']} {route}" if route is not None else scope["method"],
            kind="server",
            service="gateway",
            instance=self._name,
            start_ns=began_ns,
            end_ns=max(end_ns, began_ns),
            attributes=attributes,
            error=f"HTTP {status}" if failed else "",
        )
        self._client.report_spans(span)
        if self._export is not None and (mine.kept or failed):
            self._export.put(lambda: (span,))
