"""The metrics port, with a shard and a coordinator behind it that generate."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import serving
from metric_tools import value, values
from running import Run

from mesh.client import AsyncMeshClient
from mesh.coordinator.metrics import report_coordinator
from mesh.errors import ConfigError
from mesh.local.nats_server import NatsServer
from mesh.settings.schema import MetricsSection
from mesh.shard.metrics import report_shard
from mesh.telemetry.metrics_http import MetricsEndpoint, reporting
from mesh.telemetry.registry import Registry
from mesh.types import LayerRange

FREE = MetricsSection(port=0)


def test_values_move_with_a_generation(server: NatsServer, model: Path, run: Run) -> None:
    async def main() -> None:
        async with (
            serving.shards(server.url, model, [LayerRange(0, 2), LayerRange(2, 3)]) as (first, last),
            serving.coordinator(server.url, model) as coordinator,
            AsyncMeshClient(server.url) as client,
        ):
            registry = Registry("all")
            report_coordinator(registry, coordinator)
            for shard in (first, last):
                report_shard(registry, shard)
            before = values(registry.render()[0])
            completion = await client.generate(tokens=serving.PROMPT, max_tokens=12, ignore_eos=True)
            assert len(completion.tokens) == 12
            registry = Registry("all")
            report_coordinator(registry, coordinator)
            for shard in (first, last):
                report_shard(registry, shard)
            after = values(registry.render()[0])

            def moved(name: str, **labels: str) -> float:
                return value(after, name, **labels) - value(before, name, 0.0, **labels)

            assert moved("mesh_coordinator_tokens_total") == 12
            assert moved("mesh_coordinator_prompt_tokens_total") == len(serving.PROMPT)
            assert moved("mesh_coordinator_requests_total", result="finished") == 1
            assert moved("mesh_coordinator_frames_total", phase="prefill") == 1
            assert (
                moved("mesh_coordinator_step_seconds_count", phase="decode") == moved("mesh_coordinator_frames_total", phase="decode") == 11
            )
            assert moved("mesh_coordinator_decode_batch_rows_sum") == 11
            assert moved("mesh_coordinator_hops_total") == 3 * 11
            for name in ("time_to_first_token", "time_per_output_token", "request_duration"):
                assert moved(f"gen_ai_server_{name}_seconds_count", gen_ai_operation_name="text_completion") == 1
            for shard in (first, last):
                name = shard.options.name
                assert moved("mesh_shard_frames_total", shard=name, direction="in") == 12
                assert moved("mesh_shard_frame_bytes_total", shard=name, direction="out") > 12 * 64
                assert moved("mesh_shard_step_seconds_count", shard=name, phase="decode") == 11
                assert moved("mesh_shard_queue_wait_seconds_count", shard=name) == 12
                assert moved("mesh_shard_tokens_total", shard=name, phase="decode") == 11
                assert moved("mesh_shard_busy_seconds_total", shard=name) > 0
                assert value(after, "mesh_shard_memory_bytes", shard=name, kind="kv") > 0
                assert 0 <= value(after, "mesh_coordinator_lease_age_seconds", shard=name) < 10
            assert value(after, "mesh_coordinator_unserved_layers") == 0 and value(after, "mesh_coordinator_least_replicas") == 1
            assert value(after, "mesh_coordinator_range_shards", range="0-2") == 1

    run(main())


def test_a_lost_shard_leaves_layers_without_one(server: NatsServer, model: Path, run: Run) -> None:
    async def main() -> None:
        async with (
            serving.coordinator(server.url, model, idle=False) as coordinator,
            serving.shards(server.url, model, [LayerRange(0, 2), LayerRange(2, 3)]) as (first, last),
        ):
            name = last.options.name
            while not (coordinator.core.knows(first.options.name) and coordinator.core.knows(name)):
                await asyncio.sleep(0.01)  # the core says nothing of a lease
            last.stop()
            while coordinator.core.knows(name):
                await asyncio.sleep(0.01)  # nor of its end
            registry = Registry("coordinator")
            report_coordinator(registry, coordinator)
            found = values(registry.render()[0])
            assert value(found, "mesh_coordinator_unserved_layers") == 1 and value(found, "mesh_coordinator_serving") == 0
            assert value(found, "mesh_coordinator_shards_gone_total", shard=name) == 1
            assert value(found, "mesh_coordinator_shards_gone_total", shard=first.options.name) == 0

    run(main())


def test_jetstream_is_asked_about_its_storage(server: NatsServer, model: Path, run: Run) -> None:
    async def main() -> None:
        async with serving.coordinator(server.url, model) as coordinator:
            from mesh.bus.storage import StorageWatch

            storage = await StorageWatch(coordinator.bus).look()
            assert storage.reachable and storage.streams["mesh_batch"].limit_bytes == 512 * 1024 * 1024
            assert storage.streams["mesh_events"].limit_bytes is None, "it drops what is old and never refuses"

    run(main())


def test_a_port_that_was_chosen_and_is_taken_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=str(port)):
            MetricsEndpoint.bind(Registry("shard"), MetricsSection(port=port))
        with pytest.raises(ConfigError, match=str(port)):
            MetricsEndpoint.bind(Registry("shard"), MetricsSection(), port=port)
        free = MetricsEndpoint.bind(Registry("shard"), MetricsSection(), port=port, or_free=True)
        assert free is not None and not free.url.endswith(f":{port}/metrics")
        free.close()
    assert MetricsEndpoint.bind(Registry("shard"), MetricsSection(enabled=False)) is None


def test_readers_that_are_slow_or_many_hold_up_no_other(run: Run) -> None:
    """Sixteen connections that never finish their request are all that the port has; the event loop goes on, and they are dropped."""

    async def main() -> None:
        registry = Registry("shard")
        endpoint = MetricsEndpoint.bind(registry, FREE)
        assert endpoint is not None
        port = int(endpoint.url.rpartition(":")[2].partition("/")[0])
        async with reporting(registry, endpoint):
            slow = [await asyncio.open_connection("127.0.0.1", port) for _ in range(16)]
            for _, writer in slow:
                writer.write(b"GET /metrics HTTP/1.1\r\n")
            async with httpx.AsyncClient() as client:
                refused = await client.get(endpoint.url)
                assert refused.status_code == 503
                for _, writer in slow:
                    writer.close()
                    await writer.wait_closed()
                while (answer := await client.get(endpoint.url)).status_code == 503:
                    await asyncio.sleep(0.01)  # the listener notices closed connections in its own time
                assert answer.status_code == 200 and b"mesh_build_info" in answer.content
                openmetrics = await client.get(endpoint.url, headers={"accept": "application/openmetrics-text;version=1.0.0"})
                assert openmetrics.headers["content-type"].startswith("application/openmetrics-text") and openmetrics.text.endswith(
                    "# EOF\n"
                )
                assert (await client.get(endpoint.url.replace("/metrics", "/"))).status_code == 404
                assert (await client.post(endpoint.url)).status_code == 405

    run(main())


class _Collector(BaseHTTPRequestHandler):
    """Takes OTLP over HTTP; what came is in `bodies`. `hangs`: it never answers."""

    bodies: list[bytes]
    came: threading.Event
    hangs = False
    ending: threading.Event

    def do_POST(self) -> None:
        self.bodies.append(self.rfile.read(int(self.headers["content-length"])))
        self.came.set()
        if self.hangs:
            self.ending.wait(30)
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *arguments: object) -> None:
        pass


@pytest.mark.parametrize("hangs", [False, True], ids=["answers", "hangs"])
def test_metrics_go_over_otlp_and_a_collector_that_hangs_costs_nothing(hangs: bool, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    handler: Any = type("Handler", (_Collector,), {"bodies": [], "came": threading.Event(), "ending": threading.Event(), "hangs": hangs})
    collector = HTTPServer(("127.0.0.1", 0), handler)
    answering = threading.Thread(target=collector.serve_forever, daemon=True)
    answering.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")

    async def main() -> None:
        registry = Registry("shard")
        registry.add(lambda: [("mesh_shard_rows", 4)], shard="shard-1", model="m")
        async with reporting(registry, None):
            assert await asyncio.to_thread(handler.came.wait, 20)
            latest = 0.0
            for _ in range(50):
                began = time.perf_counter()
                await asyncio.sleep(0)
                latest = max(latest, time.perf_counter() - began)
            assert latest < 1.0
        assert b"mesh.shard.rows" in handler.bodies[0] and b"shard-1" in handler.bodies[0]

    try:
        run(main())  # it ends at once, whatever the collector does
    finally:
        handler.ending.set()
        collector.shutdown()
        collector.server_close()
        answering.join()
