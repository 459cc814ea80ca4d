"""Spans become a tree, whatever is missing or wrong in them."""

from __future__ import annotations

import random

import example_trace
from hypothesis import given
from hypothesis import strategies as st

from mesh.protocol.spans import Span
from mesh.telemetry.views.tree import tree, walk


def span(id: int, parent: int | None, start: int = 0) -> Span:
    return Span(
        trace="1" * 32,
        span=f"{id:016x}",
        parent=None if parent is None else f"{parent:016x}",
        name=f"span {id}",
        service="shard",
        start_ns=start,
        end_ns=start + 1,
    )


def test_a_trace_of_several_processes_is_one_tree_whatever_the_order_of_its_spans() -> None:
    spans = example_trace.spans()
    mixed = list(spans)
    random.Random(1).shuffle(mixed)
    (root,) = tree(mixed)
    assert root.span.service == "gateway" and root.orphan, "the parent of the gateway's span is the client's"
    (generation,) = root.children
    names = [child.span.name for child in generation.children if child.children or child.span.name in ("queue", "prepare prompt")]
    assert names == [
        "prepare prompt", "queue", "open rows", "prefill chunk", "prefill chunk", "decode step", "decode step", "decode step",
        "failover", "prefill chunk", "decode step", "decode step", "decode step",
    ]  # fmt: skip
    assert [node.span.span for _, node, _ in walk(tree(mixed))] == [node.span.span for _, node, _ in walk(tree(spans))]


def test_orphans_are_roots_and_a_span_said_twice_counts_as_it_was_said_last() -> None:
    roots = tree([span(1, None), span(2, 9, start=5), span(3, 1), span(3, 1, start=7)])
    assert [(node.span.name, node.orphan) for node in roots] == [("span 1", False), ("span 2", True)]
    assert [child.span.start_ns for child in roots[0].children] == [7]


@given(st.lists(st.tuples(st.integers(1, 8), st.none() | st.integers(1, 8)), max_size=12))
def test_every_span_is_in_the_tree_once_even_where_spans_are_their_own_ancestors(pairs: list[tuple[int, int | None]]) -> None:
    spans = [span(id, parent) for id, parent in pairs]
    found = [node.span.span for _, node, _ in walk(tree(spans))]
    assert sorted(found) == sorted({each.span for each in spans})


def test_a_long_chain_of_children_is_no_problem() -> None:
    assert max(depth for depth, _, _ in walk(tree([span(id, id - 1 or None) for id in range(1, 3000)]))) == 2998
