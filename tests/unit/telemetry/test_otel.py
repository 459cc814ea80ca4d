"""A span of the mesh is the same span in OpenTelemetry's SDK."""

from __future__ import annotations

from opentelemetry.trace import SpanKind
from opentelemetry.trace.status import StatusCode

from mesh.protocol.spans import Link, Span, SpanEvent
from mesh.telemetry.otel import readable

SPAN = Span(
    trace="0af7651916cd43dd8448eb211c80319c",
    span="b7ad6b7169203331",
    parent="00f067aa0ba902b7",
    name="stage",
    kind="consumer",
    service="shard",
    instance="shard-2",
    start_ns=1_700_000_000_000_000_000,
    end_ns=1_700_000_000_004_000_000,
    attributes={"mesh.rows": 4, "mesh.range": "10-20", "gen_ai.response.finish_reasons": ("stop",), "mesh.clock_offset_s": 0.25},
    links=(Link(trace="1" * 32, span="2" * 16),),
    events=(SpanEvent(name="nack", at_ns=1_700_000_000_001_000_000, attributes={"mesh.epoch": 3}),),
    error="the shard is gone",
)


def test_every_field_of_a_span_is_kept() -> None:
    made = readable(SPAN)
    assert made.name == "stage" and made.kind is SpanKind.CONSUMER
    assert f"{made.context.trace_id:032x}" == SPAN.trace and f"{made.context.span_id:016x}" == SPAN.span
    assert made.parent is not None and f"{made.parent.span_id:016x}" == SPAN.parent
    assert (made.start_time, made.end_time) == (SPAN.start_ns, SPAN.end_ns)
    assert dict(made.attributes or {}) == SPAN.attributes
    assert [(f"{link.context.trace_id:032x}", f"{link.context.span_id:016x}") for link in made.links] == [("1" * 32, "2" * 16)]
    assert [(event.name, event.timestamp, dict(event.attributes or {})) for event in made.events] == [
        ("nack", SPAN.events[0].at_ns, {"mesh.epoch": 3})
    ]
    assert made.status.status_code is StatusCode.ERROR and made.status.description == SPAN.error


def test_the_resource_is_the_process_of_the_span() -> None:
    attributes = readable(SPAN).resource.attributes
    assert attributes["service.name"] == "mesh-shard" and attributes["service.instance.id"] == "shard-2"
    assert readable(SPAN.model_copy(update={"instance": ""})).resource.attributes["service.instance.id"] == "shard"


def test_a_root_without_an_error_has_neither_parent_nor_status() -> None:
    made = readable(SPAN.model_copy(update={"parent": None, "error": ""}))
    assert made.parent is None and made.status.status_code is StatusCode.UNSET
