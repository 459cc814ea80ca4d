"""The spans of a trace as a tree."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mesh.protocol.spans import Span

__all__ = ["SpanNode", "process_of", "tree", "walk"]


@dataclass(slots=True, eq=False)
class SpanNode:
    """A span with its children in the order of their starts. orphan: its parent is not among the spans; another system may have it."""

    span: Span
    children: list[SpanNode] = field(default_factory=list)
    orphan: bool = False


def tree(spans: Iterable[Span]) -> list[SpanNode]:
    """The roots in the order of their starts. A span that is there twice counts once, as it was said last. Of spans that are each
    other's parents one becomes a root, so that every span is in the tree."""
    nodes = {(span.trace, span.span): SpanNode(span) for span in spans}
    parents: dict[int, SpanNode] = {}
    roots = []
    for _, node in sorted(nodes.items(), key=lambda item: item[0]):  # by ids, so that a correction of the times changes no parent
        parent = nodes.get((node.span.trace, node.span.parent or ""))
        if parent is None or _is_above(node, parent, parents):
            node.orphan = node.span.parent is not None
            roots.append(node)
        else:
            parents[id(node)] = parent
            parent.children.append(node)
    for node in nodes.values():
        node.children.sort(key=_when)
    roots.sort(key=_when)
    return roots


def walk(roots: Iterable[SpanNode]) -> Iterator[tuple[int, SpanNode, SpanNode | None]]:
    """(depth, node, parent) of every node; a parent before its children, and a child's descendants before the next child."""
    waiting: list[tuple[int, SpanNode, SpanNode | None]] = []
    waiting.extend((0, root, None) for root in reversed(list(roots)))
    while waiting:
        depth, node, parent = waiting.pop()
        yield depth, node, parent
        waiting.extend((depth + 1, child, node) for child in reversed(node.children))


def process_of(span: Span) -> tuple[str, str]:
    """(service, instance): spans of one process have one clock."""
    return span.service, span.instance


def _when(node: SpanNode) -> tuple[int, int, str]:
    """The order of siblings: by their starts, and then by their ends: a frame comes before the stage that it goes to."""
    return node.span.start_ns, node.span.end_ns, node.span.span


def _is_above(node: SpanNode, other: SpanNode, parents: dict[int, SpanNode]) -> bool:
    """Whether `node` is `other` or one of its ancestors."""
    at: SpanNode | None = other
    while at is not None:
        if at is node:
            return True
        at = parents.get(id(at))
    return False
