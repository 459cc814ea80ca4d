"""Files for other tools: OTLP/JSON as opentelemetry.proto reads it, and Chrome's trace events."""

from __future__ import annotations

import base64
import json
import sys
from collections import defaultdict
from itertools import pairwise
from typing import Any

import example_trace
import pytest
from google.protobuf.json_format import ParseDict
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtoSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from mesh.errors import ConfigError
from mesh.protocol.spans import Link, Span, SpanEvent
from mesh.telemetry.views.otlp_json import otlp_json
from mesh.telemetry.views.perfetto import perfetto

SPANS = example_trace.spans()


def with_base64(document: Any) -> Any:
    """Protobuf's own JSON of an OTLP/JSON document."""
    if isinstance(document, list):
        return [with_base64(each) for each in document]
    if not isinstance(document, dict):
        return document
    return {
        key: base64.b64encode(bytes.fromhex(value)).decode() if key in ("traceId", "spanId", "parentSpanId") else with_base64(value)
        for key, value in document.items()
    }


def parsed(document: Any) -> dict[bytes, tuple[dict[str, str], ProtoSpan]]:
    """Span id -> (the string attributes of its resource, the span)."""
    request = ParseDict(with_base64(json.loads(json.dumps(document))), ExportTraceServiceRequest())
    return {
        span.span_id: ({each.key: each.value.string_value for each in of.resource.attributes}, span)
        for of in request.resource_spans
        for scope in of.scope_spans
        for span in scope.spans
    }


def test_otlp_json_is_what_the_protocols_own_classes_read() -> None:
    found = parsed(otlp_json(SPANS))
    assert len(found) == len(SPANS)
    for span in SPANS:
        resource, made = found[bytes.fromhex(span.span)]
        assert made.trace_id.hex() == span.trace and made.parent_span_id.hex() == (span.parent or "") and made.name == span.name
        assert (made.start_time_unix_nano, made.end_time_unix_nano) == (span.start_ns, span.end_ns)
        assert resource["service.name"] == f"mesh-{span.service}" and resource["service.instance.id"] == span.instance
        assert {each.key for each in made.attributes} == span.attributes.keys()
        assert [link.span_id.hex() for link in made.links] == [link.span for link in span.links]
    kinds = {made.name: made.kind for _, made in found.values()}
    assert kinds["stage"] == ProtoSpan.SPAN_KIND_CONSUMER and kinds["compute"] == ProtoSpan.SPAN_KIND_INTERNAL


def test_otlp_json_has_ids_in_hex_and_kinds_as_numbers() -> None:
    document = otlp_json(SPANS)
    first = document["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    assert first["traceId"] == example_trace.TRACE and len(first["spanId"]) == 16 and isinstance(first["kind"], int)


def test_errors_and_events_are_in_otlp_json() -> None:
    event = SpanEvent(name="nack", at_ns=7, attributes={"mesh.epoch": 2})
    span = Span(
        trace="1" * 32, span="2" * 16, name="stage", service="shard", start_ns=5, end_ns=9, error="the shard is gone", events=(event,)
    )
    ((_, made),) = parsed(otlp_json([span])).values()
    assert made.status.code == Status.STATUS_CODE_ERROR and made.status.message == "the shard is gone"
    assert [(each.name, each.time_unix_nano) for each in made.events] == [("nack", 7)]


def test_without_the_extra_an_otlp_file_is_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.common.trace_encoder", None)
    with pytest.raises(ConfigError, match=r"stagemesh\[otlp\]"):
        otlp_json(SPANS)


def test_perfetto_names_processes_and_threads_and_its_slices_nest() -> None:
    document = json.loads(json.dumps(perfetto(SPANS)))
    events = document["traceEvents"]
    processes = {each["pid"]: each["args"]["name"] for each in events if each["name"] == "process_name"}
    assert set(processes.values()) == {
        "gateway g1", "coordinator c1", "nats-server n1", "shard shard-1", "shard shard-2", "shard shard-2b", "shard shard-3",
    }  # fmt: skip
    threads = {(each["pid"], each["tid"]) for each in events if each["name"] == "thread_name"}
    slices = [each for each in events if each["ph"] == "X"]
    assert len(slices) == len(SPANS) and min(each["ts"] for each in slices) == 0
    by_thread = defaultdict(list)
    for each in slices:
        assert each["dur"] >= 0 and (each["pid"], each["tid"]) in threads and each["cat"]
        by_thread[each["pid"], each["tid"]].append((round(each["ts"] * 1e3), round((each["ts"] + each["dur"]) * 1e3)))
    for times in by_thread.values():
        assert all(later[0] >= first[1] or later[1] <= first[1] for first, later in pairwise(sorted(times, key=lambda t: (t[0], -t[1]))))
    assert int(document["otherData"]["began_unix_ns"]) == example_trace.BEGAN_NS


def test_perfetto_draws_arrows_between_processes_and_along_links() -> None:
    one = Span(trace="1" * 32, span="1" * 16, name="decode step", service="coordinator", start_ns=0, end_ns=10)
    other = one.model_copy(update={"span": "2" * 16, "links": (Link(trace="1" * 32, span="1" * 16), Link(trace="9" * 32, span="9" * 16))})
    stage = one.model_copy(update={"span": "3" * 16, "parent": "1" * 16, "service": "shard", "start_ns": 2, "end_ns": 8})
    events = perfetto([one, other, stage])["traceEvents"]
    starts, ends = ({each["id"]: each for each in events if each["ph"] == ph} for ph in "sf")
    assert starts.keys() == ends.keys() and sorted(each["name"] for each in starts.values()) == ["child", "link"]
    assert all(starts[id]["ts"] <= ends[id]["ts"] for id in starts)


def test_spans_at_the_same_time_have_threads_of_their_own() -> None:
    chunk = Span(trace="1" * 32, span="1" * 16, name="prefill chunk", service="coordinator", start_ns=0, end_ns=10)
    spans = [chunk, chunk.model_copy(update={"span": "2" * 16, "start_ns": 5, "end_ns": 15})]
    slices = [each for each in perfetto(spans)["traceEvents"] if each["ph"] == "X"]
    assert sorted(each["tid"] for each in slices) == [1, 2]
    assert perfetto([])["traceEvents"] == []
