"""Spans of the mesh as OpenTelemetry's SDK has them, for its exporters and its encoder."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from mesh import __version__
from mesh.protocol.spans import Span

__all__ = ["readable"]

_KINDS: Final = {kind.name.lower(): kind for kind in SpanKind}
_SCOPE: Final = InstrumentationScope("mesh", __version__)


def readable(span: Span) -> ReadableSpan:
    """`span` as a span of the SDK that has ended. Its resource is the process that the span was in: `service.name` is `mesh-` and the
    kind of process, `service.instance.id` the process's name."""
    return ReadableSpan(
        name=span.name,
        context=_context(span.trace, span.span),
        parent=None if span.parent is None else _context(span.trace, span.parent),
        resource=_resource(span.service, span.instance),
        attributes=span.attributes,
        events=[Event(event.name, event.attributes, event.at_ns) for event in span.events],
        links=[Link(_context(link.trace, link.span)) for link in span.links],
        kind=_KINDS[span.kind],
        status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
        start_time=span.start_ns,
        end_time=span.end_ns,
        instrumentation_scope=_SCOPE,
    )


@lru_cache(maxsize=1024)
def _resource(service: str, instance: str) -> Resource:
    """OTEL_RESOURCE_ATTRIBUTES of this process are in it too. Without an instance of its own the SDK would set one of this process."""
    return Resource.create({"service.name": f"mesh-{service}", "service.instance.id": instance or service})


def _context(trace: str, span: str) -> SpanContext:
    return SpanContext(int(trace, 16), int(span, 16), is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
