"""Traces through real processes: from an HTTP request to a collector, and what a collector that is ill costs."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from waiting import until

from mesh.client import AsyncMeshClient
from mesh.local.mesh import LocalMesh, LocalOptions

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SENT = "spans are sent when they are ready"


class Collector:
    """An OTLP/HTTP receiver: the messages are those of OpenTelemetry's own protobuf classes. status: what it answers."""

    def __init__(self) -> None:
        self.status = 200
        self.spans: list[tuple[str, Any]] = []  # (service.instance.id, span)
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if collector.status == 200:
                    request = ExportTraceServiceRequest.FromString(body)
                    for resource in request.resource_spans:
                        names = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
                        for scope in resource.scope_spans:
                            collector.spans += [(f"{names['service.name']}/{names['service.instance.id']}", span) for span in scope.spans]
                self.send_response(collector.status)
                self.end_headers()
                self.wfile.write(ExportTraceServiceResponse().SerializeToString())

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.stop()


@contextmanager
def mesh(model: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str, ratio: str = "0") -> Iterator[LocalMesh]:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "2")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", ratio)
    with LocalMesh(LocalOptions(model, shards=2, rows=4, context=64, http_port=0)) as running:
        yield running


def ask(running: LocalMesh, **headers: str) -> httpx.Response:
    body = {"tokens": [5, 17, 33], "max_tokens": 20, "temperature": 0}
    return httpx.post(f"{running.http_urls[0]}/api/v1/inference", json=body, headers=headers, timeout=60)


def test_a_request_of_a_sampled_caller_reaches_the_collector_whole(
    model: Path, monkeypatch: pytest.MonkeyPatch, collector: Collector
) -> None:
    with mesh(model, monkeypatch, collector.url) as running:
        unsampled = ask(running, traceparent=f"00-{'ee' * 16}-{PARENT}-00")
        answer = ask(running, traceparent=f"00-{TRACE}-{PARENT}-01")
        assert answer.status_code == unsampled.status_code == 200 and answer.headers["x-trace-id"] == TRACE

        def mine() -> list[tuple[str, Any]]:
            return [(name, span) for name, span in collector.spans if span.trace_id.hex() == TRACE]

        async def come() -> None:
            await until(lambda: len(mine()) > 50 and any("gateway" in name for name, _ in mine()), because=SENT)

        asyncio.run(come())
        spans = {span.span_id: span for _, span in mine()}
        (root,) = [span for span in spans.values() if span.parent_span_id not in spans]
        assert root.name == "POST /api/v1/inference" and root.parent_span_id.hex() == PARENT
        (generation,) = [span for span in spans.values() if span.parent_span_id == root.span_id]
        assert generation.name.startswith("text_completion ")
        for span in spans.values():
            parent = spans.get(span.parent_span_id)
            if parent is not None:
                assert parent.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano <= parent.end_time_unix_nano
        assert {name.partition("/")[0] for name, _ in mine()} >= {"mesh-gateway", "mesh-coordinator", "mesh-shard"}
        assert not [span for _, span in collector.spans if span.trace_id.hex() == "ee" * 16], "its caller did not want it kept"
        starts = [span for _, span in collector.spans if span.name == "start shard"]
        assert len(starts) == 2


@pytest.mark.parametrize("illness", ["hangs", "refuses", "is gone"])
def test_an_ill_collector_costs_spans_alone(model: Path, monkeypatch: pytest.MonkeyPatch, collector: Collector, illness: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hanging = f"http://127.0.0.1:{silent.getsockname()[1]}"
        endpoint = {"hangs": hanging, "refuses": collector.url, "is gone": "http://127.0.0.1:9"}[illness]
        collector.status = 503
        with mesh(model, monkeypatch, endpoint, ratio="1") as running:
            with futures.ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda _: ask(running), range(12)))
            assert [answer.status_code for answer in answers] == [200] * 12
            assert len({str(answer.json()["tokens"]) for answer in answers}) == 1
            asyncio.run(require_counted(running, answers[0].headers["x-trace-id"]))


async def require_counted(running: LocalMesh, trace: str) -> None:
    """The mesh still keeps the last traces itself, nothing of it has failed, and the spans that were lost are counted."""
    async with AsyncMeshClient(options=running.bus) as client:
        listed = await client.inspect(trace)
        assert listed is not None and len(listed["spans"]) > 50

        async def lost() -> int:
            (coordinator,) = await client.coordinators()
            assert not any(coordinator.stats.errors.values())
            return coordinator.stats.spans.get("failed", 0)

        await until(lost, because=SENT)
