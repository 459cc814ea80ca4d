"""Trace contexts are read as the standard wants it, and chosen as OpenTelemetry chooses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry import trace as otel
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from mesh.errors import ConfigError
from mesh.settings.schema import TracingSection
from mesh.telemetry.context import TraceContext, chosen, current, remote
from mesh.telemetry.from_config import sampling_of

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    "header",
    [
        f"00-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-00",
        f"00-{TRACE}-{SPAN}-03",
        f"01-{TRACE}-{SPAN}-01-later",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-01-" + "x" * 1000,
        "nonsense",
        "",
    ],
)
def test_a_header_is_read_as_opentelemetry_reads_it(header: str) -> None:
    theirs = otel.get_current_span(TraceContextTextMapPropagator().extract({"traceparent": header})).get_span_context()
    mine = TraceContext.parse(header)
    if theirs.is_valid and len(header) < 128:
        assert (mine.trace, mine.span, mine.sampled) == (f"{theirs.trace_id:032x}", f"{theirs.span_id:016x}", theirs.trace_flags.sampled)
    else:
        assert mine.span is None and mine.sampled is None and mine.trace != TRACE


@given(st.integers(1, 2**128 - 1), st.floats(0, 1))
def test_the_ratio_chooses_as_opentelemetry_does(trace: int, ratio: float) -> None:
    theirs = TraceIdRatioBased(ratio).should_sample(None, trace, "x").decision is Decision.RECORD_AND_SAMPLE
    assert chosen(f"{trace:032x}", ratio) == theirs


def test_the_callers_span_is_passed_on() -> None:
    assert current() is None
    with otel.use_span(remote(TRACE, SPAN, sampled=True)):
        assert current() == f"00-{TRACE}-{SPAN}-01"
    assert TraceContext.new().header(SPAN, sampled=False).endswith(f"-{SPAN}-00")


def test_a_generation_without_a_callers_trace_has_one_trace_wherever_it_goes_on() -> None:
    first, second, other = (TraceContext.of(header, session) for header, session in ((None, "a"), ("nonsense", "a"), (None, "b")))
    assert first == second and first.trace != other.trace and first.span is None and first.sampled is None
    assert TraceContext.parse(first.header(SPAN, sampled=True)).trace == first.trace, "its id is a valid one"
    assert TraceContext.of(f"00-{TRACE}-{SPAN}-01", "a").trace == TRACE


@pytest.mark.parametrize(
    ("environment", "ratio"),
    [
        ({}, 0.05),
        ({"OTEL_TRACES_SAMPLER_ARG": "0.5"}, 0.5),
        ({"OTEL_TRACES_SAMPLER": "always_on"}, 1.0),
        ({"OTEL_TRACES_SAMPLER": "parentbased_always_off"}, 0.0),
        ({"OTEL_TRACES_SAMPLER": "traceidratio"}, 1.0),
        ({"OTEL_TRACES_SAMPLER": "parentbased_traceidratio", "OTEL_TRACES_SAMPLER_ARG": "0.25"}, 0.25),
    ],
)
def test_the_environment_says_the_ratio(environment: dict[str, str], ratio: float) -> None:
    assert sampling_of(TracingSection(), environment).ratio == ratio
    assert sampling_of(TracingSection(sample_ratio=0.75), environment).ratio == 0.75, "the file comes first"


@pytest.mark.parametrize(
    "environment", [{"OTEL_TRACES_SAMPLER": "jaeger_remote"}, {"OTEL_TRACES_SAMPLER_ARG": "2"}, {"OTEL_TRACES_SAMPLER_ARG": "x"}]
)
def test_a_wrong_environment_is_an_error(environment: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="OTEL_TRACES_SAMPLER"):
        sampling_of(TracingSection(), environment)
