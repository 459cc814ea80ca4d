"""The records of requests: right sums, bounded whatever happens; and their spans, every child inside its parent."""

from __future__ import annotations

from collections.abc import Iterable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.coordinator.clocks import Clocks
from mesh.coordinator.core.events import Ended, FrameKind, FrameOut, FrameRow
from mesh.coordinator.core.session import SessionView
from mesh.coordinator.span_store import MOST_OF_A_TRACE, MOST_SPANS, SpanStore
from mesh.coordinator.trace import KEPT_LEGS, KEPT_ODD, KEPT_REQUESTS, OpenTry, ServerHop, Trace, Traces
from mesh.coordinator.trace_spans import spans_of
from mesh.coordinator.trace_steps import FIRST, LAST, RUNS, SLOWEST, Step, Steps
from mesh.errors import Unavailable
from mesh.protocol.frame import Hop, StageTiming
from mesh.protocol.spans import Span
from mesh.telemetry.context import TraceContext, TraceSampling
from mesh.telemetry.conventions import ATTRIBUTES, PHASES, SPANS
from mesh.types import LayerRange

ROUTE = (Hop(LayerRange(0, 1), "a"), Hop(LayerRange(1, 3), "b"))
OTHER = (Hop(LayerRange(0, 1), "a"), Hop(LayerRange(1, 3), "c"))
TIMINGS = (StageTiming(1000, 2000, 500, 1, 100, 8, 200), StageTiming(0, 4000, 500, 1, 300, 8, 100, 1000))  # 8 ms in the stages
WAYS = (500.0, 700.0, 800.0)


def frame(kind: FrameKind, epoch: int = 1, route: tuple[Hop, ...] = ROUTE, tokens: int = 1) -> FrameOut:
    return FrameOut(7, kind, route, (FrameRow(1, epoch, (0, 0), 3, (5,) * tokens),))


def step(at: float, wall_s: float = 0.010, *sessions: str, number: int = 7) -> Step:
    return Step(at, wall_s, 1, TIMINGS, WAYS, sessions or ("s",), number, 3)


def begun(id: str = "s", *, sampled: bool = False, began: float = 10.0) -> Trace:
    context = TraceContext("ab" * 16, "cd" * 8 if sampled else None, sampled)
    return Trace(id, context, "12" * 8, began, 1000.0, began + 0.1, 3, 1000, {"gen_ai.operation.name": "chat"})


def ended(id: str, reason: str = "length", total_s: float = 2.0, restarts: int = 0) -> Ended:
    return Ended(id, reason, 5, 0.1, 0.5, total_s, restarts, Unavailable("no shard") if reason == "error" else None)  # type: ignore[arg-type]


def session(id: str) -> SessionView:
    return SessionView(id, "decoding", ("a", "b"), 2, 3, 0.1, 0.5, 1.0, 0)


def spans(traces: Traces, name: str) -> list[Span]:
    trace = traces.of(name)
    assert trace is not None
    return spans_of(trace, coordinator="c", model="tiny", now=99.0, clocks=Clocks(), context_of=traces.context_of)


def require_inside(found: Iterable[Span]) -> None:
    by_id = {span.span: span for span in found}
    for span in by_id.values():
        parent = by_id.get(span.parent or "")
        if parent is not None:
            assert parent.start_ns <= span.start_ns <= span.end_ns <= parent.end_ns, (span.name, parent.name)


def test_the_sums_are_those_of_all_steps() -> None:
    traces = Traces()
    traces.begin(begun())
    traces.step(frame("prefill", tokens=3), step(10.5, 0.02))
    for index in range(500):
        traces.step(frame("decode"), step(11 + index / 50))
    trace = traces.of("s")
    assert trace is not None
    (leg,) = trace.as_dict()["legs"]
    assert leg["prefill"]["steps"] == 1 and leg["decode"]["steps"] == 500
    assert leg["decode"]["wall_s"] == pytest.approx(5.0) and leg["decode"]["hops_s"] == pytest.approx(1.0)
    assert leg["decode"]["hops"] == pytest.approx([0.25, 0.35, 0.4])
    assert leg["decode"]["stages"][1] == pytest.approx({"queue_s": 0.0, "compute_s": 2.0, "codec_s": 0.25})
    traces.check()


@given(st.integers(0, 700), st.integers(1, 40), st.randoms(use_true_random=False))
def test_steps_are_bounded_and_none_is_lost(count: int, every: int, random: Random) -> None:
    steps = Steps()
    slow = 0.0
    for index in range(count):
        wall_s = random.random()
        slow = max(slow, wall_s)
        steps.decode(index // every, step(float(index), wall_s))
    steps.check()
    assert len(steps.first) <= FIRST and len(steps.last) <= LAST and len(steps.runs) <= RUNS and len(steps.slowest) <= SLOWEST
    if count:
        assert max(entry.step.wall_s for entry in (*steps.kept(), *steps.slowest)) == slow, "the slowest step is kept"
    if not steps.forgotten:
        numbers = sorted([entry.place for entry in steps.kept()] + [run.first + at for run in steps.runs for at in range(run.sum.steps)])
        assert numbers == list(range(count))


def test_a_request_of_4000_tokens_stays_readable() -> None:
    traces = Traces()
    traces.begin(begun())
    for index in range(4000):
        traces.step(frame("decode"), step(11 + index / 50))
    traces.end(ended("s", total_s=81.0), 10 + 81.2)
    found = spans(traces, "s")
    assert len(found) < 600
    require_inside(found)
    runs = [span for span in found if span.name == "decode steps"]
    assert sum(span.attributes["mesh.steps"] for span in runs) + FIRST + LAST == 4000  # type: ignore[misc]


def test_a_request_that_is_refused_after_all_leaves_nothing() -> None:
    traces = Traces()
    traces.begin(begun(sampled=True))
    assert traces.sampled == 1
    traces.forget("s")
    traces.forget("s")
    assert traces.sampled == 0 and traces.of("s") is None
    traces.check()


def test_the_spans_of_a_step_make_up_its_time() -> None:
    traces = Traces()
    traces.begin(begun())
    traces.step(frame("decode"), step(11.0))
    found = spans(traces, "s")
    require_inside(found)
    whole = next(span for span in found if span.name == "decode step")
    children = [span for span in found if span.parent == whole.span]
    assert [span.name for span in children] == ["frame", "stage", "frame", "stage", "frame"]
    assert sum(span.duration_ns for span in children) == pytest.approx(10e6, rel=0.01) and whole.duration_ns == pytest.approx(
        10e6, rel=0.01
    )
    stage = children[3]
    parts = [span for span in found if span.parent == stage.span]
    assert [span.name for span in parts] == ["read frame", "wait", "compute", "sampling", "write frame"]
    assert [span.duration_ns for span in parts] == pytest.approx([0.1e6, 0, 3e6, 1e6, 0.4e6], abs=2000)
    assert stage.instance == "b" and stage.service == "shard" and stage.attributes["mesh.bucket"] == 8


def test_a_step_is_linked_to_the_other_sessions_of_its_batch() -> None:
    traces = Traces()
    traces.begin(begun("s"))
    other = begun("t")
    other.span = "34" * 8
    traces.begin(other)
    out = FrameOut(7, "decode", ROUTE, (FrameRow(1, 1, (0, 0), 3, (5,)), FrameRow(2, 1, (1, 1), 3, (5,))))
    traces.step(out, step(11.0, 0.01, "s", "t"))
    (mine,) = [span for span in spans(traces, "s") if span.name == "decode step"]
    assert [(link.trace, link.span) for link in mine.links] == [("ab" * 16, "34" * 8)]


@pytest.mark.parametrize(
    ("replayed", "route", "how"), [(True, OTHER, "replay"), (False, OTHER, "mirror"), (True, ROUTE, "replay"), (False, ROUTE, "resend")]
)
def test_a_lost_route_is_a_failover(replayed: bool, route: tuple[Hop, ...], how: str) -> None:
    traces = Traces()
    traces.begin(begun())
    traces.opened("s", OpenTry(10.2, 10.3, 1, LayerRange(0, 1), "a", ""))
    traces.step(frame("decode"), step(11.0))
    traces.opened("s", OpenTry(12.0, 12.1, 2, LayerRange(1, 3), "c", ""))
    if replayed:
        traces.step(frame("prefill", 2, route), step(12.2))
    traces.step(frame("decode", 2, route), step(12.3))
    traces.end(ended("s", restarts=1), 13.0)
    found = spans(traces, "s")
    require_inside(found)
    (failover,) = [span for span in found if span.name == "failover"]
    assert failover.attributes["mesh.replay"] == how and failover.attributes.get("mesh.to") == ("c" if route is OTHER else None)
    assert failover.duration_ns == pytest.approx((12.2 if replayed else 12.3) * 1e9 - 11.01e9, abs=1e4)
    chunks = [span for span in found if span.name == "prefill chunk"]
    assert [span.attributes["mesh.replay"] for span in chunks] == (["replay"] if replayed else [])
    rows = [span for span in found if span.name == "open rows"]
    assert [span.parent for span in rows] == [found[0].span, failover.span]


def test_a_server_hop_lies_in_its_frame_whatever_the_servers_clock_says() -> None:
    traces = Traces()
    traces.begin(begun())
    for number, ahead_s in ((7, 0.0), (8, 5.0)):
        traces.step(frame("decode"), step(11.0 + number, number=number))
        came = int((1000.0 + 1.0 + number + 0.0001 + ahead_s) * 1e9)
        traces.server_hop(["s", "unknown"], number, 0, ServerHop("n1", came, came + 20_000))
    found = spans(traces, "s")
    require_inside(found)
    first, second = [span for span in found if span.service == "nats-server"]
    assert first.duration_ns == pytest.approx(20_000, abs=300) and "mesh.clock_offset_s" not in first.attributes
    assert second.attributes["mesh.clock_offset_s"] == pytest.approx(5.0, abs=0.001)


def test_every_name_is_one_of_the_conventions() -> None:
    traces = Traces(TraceSampling(ratio=1.0))
    traces.begin(begun(sampled=True))
    traces.opened("s", OpenTry(10.2, 10.3, 1, LayerRange(0, 1), None, "full"))
    traces.step(frame("prefill", tokens=3), step(10.5))
    for index in range(80):
        traces.step(frame("decode"), step(11.0 + index / 50))
    traces.step(frame("decode", 2, OTHER), step(14.0))
    trace = traces.of("s")
    assert trace is not None
    trace.text(11.011, 0.0001)
    traces.server_hop(["s"], 7, 0, ServerHop("n1", 0, 20_000))
    traces.end(ended("s", "error"), 15.0)
    found = spans(traces, "s")
    names = {span.name for span in SPANS}
    assert {span.name for span in found[1:]} <= names
    assert found[0].name == "chat tiny" and found[0].parent == "cd" * 8 and found[0].error == "no shard"
    assert {name for span in found for name in span.attributes} <= {attribute.name for attribute in ATTRIBUTES}
    assert {span.attributes["mesh.phase"] for span in found if "mesh.phase" in span.attributes} <= set(PHASES)
    for span in found:
        Span.model_validate(span.model_dump())
    assert len({span.span for span in found}) == len(found)


def test_what_runs_is_shown_up_to_now() -> None:
    traces = Traces()
    traces.begin(begun())
    found = spans(traces, "s")
    assert found[0].attributes["mesh.unfinished"] is True and found[0].end_ns == pytest.approx((1000.0 + 89.0) * 1e9, abs=1000)
    assert traces.report(begun(), session("s")) is not None


@pytest.mark.parametrize(
    ("sampled", "end", "because"),
    [
        (True, ended("s"), "parent"),
        (False, ended("s"), None),
        (False, ended("s", "error"), "error"),
        (False, ended("s", restarts=1), "failover"),
        (False, ended("s", total_s=61.0), "slow"),
    ],
)
def test_a_trace_is_kept_for_others_for_a_reason(sampled: bool, end: Ended, because: str | None) -> None:
    sent: list[Trace] = []
    traces = Traces(send=sent.append)
    traces.begin(begun(sampled=sampled))
    traces.end(end, 12.0)
    assert [trace.kept for trace in sent] == ([] if because is None else [because])
    assert traces.sampled == 0


def test_what_is_kept_is_bounded_and_the_odd_ones_stay_longer() -> None:
    traces = Traces()
    for number in range(3 * KEPT_REQUESTS):
        trace = begun(f"s{number}")
        traces.begin(trace)
        for epoch in range(2 * KEPT_LEGS if number == 5 else 1):
            traces.step(frame("decode", epoch, ROUTE), step(11.0 + epoch, 0.01, trace.id))
        reason = "error" if number < 3 * KEPT_ODD else "length"
        traces.end(ended(trace.id, reason, 100.0 if number == 3 * KEPT_ODD else 1.0), 12.0)
    traces.check()
    assert traces.of("s5") is None, "too many failed after it"
    assert traces.of(f"s{3 * KEPT_ODD - 1}") is not None, "the last that failed"
    assert [report.total_s for report in traces.latest("slow", 10)] == [100.0]
    assert len(traces.latest("last", 1000)) == KEPT_REQUESTS and traces.latest("failed", 1)[0].error == "no shard"


def test_the_store_of_spans_is_bounded() -> None:
    store = SpanStore()

    def add(trace: str, count: int) -> None:
        ids = [f"{number + 1:016x}" for number in range(count)]
        store.add([Span(trace=trace, span=id, name="x", service="gateway", start_ns=0, end_ns=1) for id in ids])

    add("f" * 32, 2 * MOST_OF_A_TRACE)
    assert len(store.of("f" * 32)) == MOST_OF_A_TRACE and store.dropped == MOST_OF_A_TRACE
    add("f" * 32, MOST_OF_A_TRACE)
    assert len(store) == MOST_OF_A_TRACE, "a span that comes twice is one"
    for number in range(MOST_SPANS):
        add(f"{number:032x}", 1)
    assert len(store) <= MOST_SPANS and not store.of("f" * 32) and store.of(f"{MOST_SPANS - 1:032x}")
