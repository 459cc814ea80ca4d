"""After the correction every child lies in its parent, and a clock that is right is left alone."""

from __future__ import annotations

import example_trace
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.protocol.spans import Span
from mesh.telemetry.views.skew import aligned
from mesh.telemetry.views.tree import tree, walk

SECOND = 10**9
RIGHT = example_trace.spans()


def outside(spans: tuple[Span, ...]) -> list[str]:
    """The spans that are not inside their parents."""
    return [
        node.span.name
        for _, node, parent in walk(tree(spans))
        if parent is not None and not parent.span.start_ns <= node.span.start_ns <= node.span.end_ns <= parent.span.end_ns
    ]


def test_clocks_that_agree_are_left_alone() -> None:
    spans = example_trace.spans()
    found = aligned(spans)
    assert list(found.spans) == spans and not found.shifts_ns and not found.fitted


@pytest.mark.parametrize("ahead_s", [2.0, -2.0, 0.02])
def test_a_shard_whose_clock_is_off_is_brought_back_into_its_steps(ahead_s: float) -> None:
    spans = example_trace.spans(skew_ns={"shard-2": round(ahead_s * SECOND)})
    assert outside(tuple(spans))
    found = aligned(spans)
    assert outside(found.spans) == [] and found.fitted == 0
    assert found.shifts_ns.keys() == {("shard", "shard-2")}
    assert abs(found.shifts_ns["shard", "shard-2"] + ahead_s * SECOND) < 1_000_000, "the ways of the example take equally long"
    assert [span.duration_ns for span in found.spans] == [span.duration_ns for span in spans]
    for moved, true in zip(found.spans, example_trace.spans(), strict=True):
        assert abs(moved.start_ns - true.start_ns) < 1_000_000


def test_several_clocks_may_be_off_at_once_also_that_of_the_coordinator() -> None:
    skew = {"c1": 5 * SECOND, "shard-1": -3 * SECOND, "shard-3": SECOND // 2, "n1": -SECOND}
    found = aligned(example_trace.spans(skew_ns=skew))
    assert outside(found.spans) == []
    gateway = next(span for span in found.spans if span.service == "gateway")
    assert gateway.start_ns == example_trace.BEGAN_NS, "the root's clock is the one that counts"


SPANS = st.lists(
    st.tuples(st.integers(0, 12), st.integers(0, 100), st.integers(0, 100), st.sampled_from(["coordinator", "shard", "nats-server"])),
    min_size=1,
    max_size=12,
)


@given(SPANS, st.booleans())
def test_every_child_is_inside_its_parent_whatever_the_spans(parts: list[tuple[int, int, int, str]], stages: bool) -> None:
    spans = [
        Span(
            trace="1" * 32,
            span=f"{index + 1:016x}",
            parent=None if parent == 0 else f"{parent:016x}",
            name="stage" if stages else "span",
            service=service,
            start_ns=start,
            end_ns=start + length,
        )
        for index, (parent, start, length, service) in enumerate(parts)
    ]
    found = aligned(spans)
    assert outside(found.spans) == []
    assert [span.span for span in found.spans] == [span.span for span in spans]
    assert all(after.duration_ns <= before.duration_ns for after, before in zip(found.spans, spans, strict=True))
    again = aligned(found.spans)
    assert again.spans == found.spans and not again.fitted


@given(st.dictionaries(st.sampled_from(["shard-1", "shard-2", "shard-2b", "shard-3", "n1"]), st.integers(-3600 * SECOND, 3600 * SECOND)))
def test_constant_shifts_of_any_processes_are_undone_without_cutting_a_span(skew: dict[str, int]) -> None:
    spans = [
        span.model_copy(update={"start_ns": span.start_ns + by, "end_ns": span.end_ns + by})
        for span, by in ((span, skew.get(span.instance, 0)) for span in RIGHT)
    ]
    found = aligned(spans)
    assert outside(found.spans) == [] and found.fitted == 0
    assert [span.duration_ns for span in found.spans] == [span.duration_ns for span in spans]
