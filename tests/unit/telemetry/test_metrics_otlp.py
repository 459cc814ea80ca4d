"""The same metrics as OpenTelemetry's data."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mesh.telemetry.metrics_otlp import metrics_data
from mesh.telemetry.otel_environment import wants_otlp
from mesh.telemetry.registry import Histogram, Reading, Registry


@pytest.mark.parametrize(
    "environment, answer",
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:4318/v1/metrics"}, True),
        ({"OTEL_METRICS_EXPORTER": "otlp"}, True),
        ({"OTEL_METRICS_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, False),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318"}, False),
        ({"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}, False),
    ],
)
def test_the_standard_variables_decide(environment: dict[str, str], answer: bool) -> None:
    assert wants_otlp("METRICS", environment) is answer


def test_names_units_attributes_and_buckets_are_those_of_the_conventions() -> None:
    registry, first = Registry("coordinator"), Histogram("gen_ai_server_time_to_first_token_seconds")
    for seconds in (0.0005, 0.05, 0.05, 60.0):
        first.observe(seconds, "chat", "mesh", "m")

    def source() -> Iterator[Reading]:
        yield first
        yield "mesh_coordinator_tokens_total", 5
        yield "mesh_coordinator_sessions", 2, "queued"

    registry.add(source, coordinator="c", model="m")
    (resource,) = metrics_data(registry.prometheus.collect(), "coordinator", 1, 2).resource_metrics
    assert resource.resource.attributes["service.name"] == "mesh-coordinator"
    found = {metric.name: metric for metric in resource.scope_metrics[0].metrics}
    assert not any("process" in name for name in found)
    histogram = found["gen_ai.server.time_to_first_token"]
    (point,) = histogram.data.data_points
    assert histogram.unit == "s" and point.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "mesh",
        "gen_ai.request.model": "m",
    }
    assert (point.count, list(point.bucket_counts[:1]), point.bucket_counts[-1]) == (4, [1], 1)  # type: ignore[union-attr]
    assert sum(point.bucket_counts) == 4 and len(point.bucket_counts) == len(point.explicit_bounds) + 1  # type: ignore[union-attr]
    assert point.sum == pytest.approx(60.1005)  # type: ignore[union-attr]
    tokens = found["mesh.coordinator.tokens"].data
    assert tokens.is_monotonic and tokens.data_points[0].value == 5  # type: ignore[union-attr]
    assert found["mesh.coordinator.sessions"].data.data_points[0].attributes == {
        "mesh.coordinator": "c",
        "mesh.model": "m",
        "mesh.state": "queued",
    }
