"""Spans leave in a thread: nothing waits for a collector, and what it does not take is counted."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from running import Run

from mesh.errors import ConfigError
from mesh.protocol.spans import Span
from mesh.settings.schema import TracingSection
from mesh.telemetry.export import SpanExport, exporters
from mesh.telemetry.from_config import export_of
from mesh.telemetry.metrics_http import reporting
from mesh.telemetry.otel_environment import wants_otlp
from mesh.telemetry.registry import Registry

SPAN = Span(trace="ab" * 16, span="cd" * 8, name="x", service="gateway", start_ns=0, end_ns=1)


class Slow(SpanExporter):
    """Takes a batch when it is let."""

    def __init__(self) -> None:
        self.began, self.go = threading.Event(), threading.Event()
        self.taken: list[ReadableSpan] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.began.set()
        self.go.wait(60)
        self.taken += spans
        return SpanExportResult.SUCCESS


def test_a_full_store_drops_and_counts() -> None:
    slow = Slow()
    export = SpanExport([slow], most_waiting=8)
    export.put(lambda: [SPAN])
    assert slow.began.wait(60)
    for _ in range(20):
        export.put(lambda: [SPAN])
    assert export.counters["full"] == export.dropped == 12
    slow.go.set()
    export.stop()
    assert len(slow.taken) == 9 and export.counters["sent"] == 9


def test_a_process_that_ends_sends_the_last_spans(run: Run) -> None:
    slow = Slow()
    export = SpanExport([slow])

    async def serve() -> None:
        async with reporting(Registry("gateway"), None, export):
            export.put(lambda: [SPAN])
            assert await asyncio.to_thread(slow.began.wait, 60)
            asyncio.get_running_loop().call_soon(slow.go.set)  # the loop runs while the collector takes them

    run(serve())
    assert len(slow.taken) == export.counters["sent"] == 1


def test_spans_that_cannot_be_made_do_not_end_the_thread() -> None:
    slow = Slow()
    slow.go.set()
    export = SpanExport([slow])
    export.put(lambda: [][0])
    export.put(lambda: [SPAN])
    export.stop()
    assert len(slow.taken) == 1 and export.counters["failed"] == 1


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_the_environment_names_a_collector(environment: dict[str, str], wanted: bool) -> None:
    assert wants_otlp("TRACES", environment) is wanted


def test_a_protocol_that_is_not_known_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="grpc"):
        exporters("http://127.0.0.1:4318", "http/json")
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert export_of(TracingSection()) is None
    assert export_of(TracingSection(enabled=False, otlp_endpoint="http://127.0.0.1:4318")) is None


def test_spans_go_by_grpc() -> None:
    grpc = pytest.importorskip("grpc")
    from concurrent.futures import ThreadPoolExecutor

    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

    got: list[str] = []

    class Servicer(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request: trace_service_pb2.ExportTraceServiceRequest, context: object) -> object:
            got.extend(span.name for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(ThreadPoolExecutor(1))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Servicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        export = SpanExport(exporters(f"http://127.0.0.1:{port}", "grpc"))
        export.put(lambda: [SPAN])
        export.stop()
        assert got == ["x"]
    finally:
        server.stop(None)
