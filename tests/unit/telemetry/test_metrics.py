"""The declarations of metrics, and how their values are read and written."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from mesh.telemetry.metrics import METRICS, Metric
from mesh.telemetry.registry import Histogram, Reading, Registry

BOUNDED = {
    "coordinator", "model", "shard", "range", "state", "phase", "part", "place", "result", "reason", "what", "stream", "kind", "direction",
    "device", "role", "version", "connection", "error_type", "gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model",
    "http_request_method", "http_route", "http_response_status_code",
}  # fmt: skip
"""What a label may be. Never what clients choose: a session, a request, a user, a path, an address."""


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_a_metric_is_declared_by_the_conventions(metric: Metric) -> None:
    assert metric.help.endswith(".") and not metric.help[0].islower()
    assert set(metric.labels) <= BOUNDED
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert bool(metric.buckets) == (metric.kind == "histogram") and list(metric.buckets) == sorted(set(metric.buckets))
    assert re.fullmatch(r"(mesh|gen_ai|http)_[a-z0-9_]*[a-z0-9]", metric.name)
    times = re.search(r"(seconds|bytes)", metric.name)
    assert times is None or metric.unit == times[1], "the unit is the last word before _total"
    assert not re.search(r"_(ms|us|s|kb|mb|gb|millis\w*|minutes)(_|$)", metric.name), "base units"


def test_names_are_unique() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS) == len({metric.otel_name for metric in METRICS})


def _registry() -> tuple[Registry, Histogram]:
    registry, steps = Registry("shard"), Histogram("mesh_shard_step_seconds")

    def source() -> Iterator[Reading]:
        yield "mesh_shard_rows", 4
        yield "mesh_shard_frames_total", 7, "in"
        yield steps

    registry.add(source, shard="shard-1", model="m")
    return registry, steps


def _values(families: Iterator[object]) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples  # type: ignore[attr-defined]
    }


@pytest.mark.parametrize("parse, accept", [(parse_text, "*/*"), (parse_openmetrics, "application/openmetrics-text;version=1.0.0")])
def test_readings_are_written_with_the_labels_of_the_process(parse: object, accept: str) -> None:
    registry, steps = _registry()
    steps.observe(0.003, "decode")
    steps.observe(99.0, "decode")
    body, content_type = registry.render(accept)
    assert content_type.startswith("application/openmetrics-text" if "openmetrics" in accept else "text/plain")
    values = _values(parse(body.decode()))  # type: ignore[operator]
    mine = {("shard", "shard-1"), ("model", "m")}
    assert values["mesh_shard_rows", frozenset(mine)] == 4
    assert values["mesh_shard_frames_total", frozenset(mine | {("direction", "in")})] == 7
    decode = mine | {("phase", "decode")}
    assert values["mesh_shard_step_seconds_bucket", frozenset(decode | {("le", "0.0025")})] == 0
    assert values["mesh_shard_step_seconds_bucket", frozenset(decode | {("le", "0.005")})] == 1
    assert values["mesh_shard_step_seconds_bucket", frozenset(decode | {("le", "+Inf")})] == 2
    assert values["mesh_shard_step_seconds_count", frozenset(decode)] == 2
    assert values["mesh_shard_step_seconds_sum", frozenset(decode)] == pytest.approx(99.003)


def test_a_source_that_fails_leaves_the_others() -> None:
    registry, _ = _registry()

    def broken() -> Iterator[Reading]:
        yield "mesh_shard_ready", 1
        raise RuntimeError("no")

    registry.add(broken, shard="shard-1", model="m")
    registry.add(lambda: [("mesh_nobody_declared_this", 1)])
    registry.add(lambda: [("mesh_shard_frames_total", 1)], shard="shard-1", model="m")  # without its label
    body, _ = registry.render()
    assert b"mesh_shard_rows{" in body and b"mesh_shard_ready{" not in body and b"nobody" not in body


def test_what_was_written_is_sent_again_for_a_moment() -> None:
    registry = Registry("shard")
    asked = 0

    def source() -> Iterator[Reading]:
        nonlocal asked
        asked += 1
        yield "mesh_spans_dropped_total", 0

    registry.add(source)
    for _ in range(100):
        registry.render()
    assert asked == 1


def test_a_histogram_has_a_bounded_number_of_series() -> None:
    durations = Histogram("http_server_request_duration_seconds")
    for number in range(3000):
        durations.observe(0.1, "GET", f"/{number}", "200")
    assert len(durations.series) <= 1001
    assert sum(sum(counts) for counts, _ in durations.series.values()) == 3000


def test_a_histogram_refuses_labels_that_are_not_its_own() -> None:
    with pytest.raises(ValueError, match="phase"):
        Histogram("mesh_shard_step_seconds").observe(1.0)


def test_spans_that_were_dropped_are_counted_by_whoever_makes_them() -> None:
    registry = Registry("coordinator")
    registry.spans_dropped += [lambda: 5, lambda: 7]
    assert b"mesh_spans_dropped_total 12.0" in registry.render()[0]
