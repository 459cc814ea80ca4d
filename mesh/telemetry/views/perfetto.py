"""A trace as Chrome's trace event JSON, which ui.perfetto.dev and chrome://tracing open.

A process of the mesh is a process there. Its spans are slices of threads; spans that overlap without one being the parent of the other,
such as chunks that are in the stages at once, are put on threads of their own. Arrows go from a parent to a child in another process,
and from a span to a linked one that is in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mesh.protocol.spans import Span
from mesh.telemetry.views.tree import SpanNode, process_of, tree, walk

__all__ = ["perfetto"]

_Track = tuple[int, int]


def perfetto(spans: Sequence[Span]) -> dict[str, Any]:
    """The trace, to be written as JSON. Times are microseconds since the first span; `otherData` says when that was."""
    began = min((span.start_ns for span in spans), default=0)
    roots = tree(spans)
    nodes = [(node, parent) for _, node, parent in walk(roots)]
    processes = {process: number for number, process in enumerate(dict.fromkeys(process_of(node.span) for node, _ in nodes), 1)}
    tracks = _tracks(nodes, processes)
    events: list[dict[str, Any]] = []
    for (service, instance), pid in processes.items():
        events.append(_named("process_name", pid, 0, f"{service} {instance}".rstrip()))
        events.append({"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}})
        for tid in sorted({tid for of, tid in tracks.values() if of == pid}):
            events.append(_named("thread_name", pid, tid, "spans" if tid == 1 else f"spans at the same time, {tid}"))
    for node, _ in nodes:
        events.append(_slice(node.span, tracks[node.span.trace, node.span.span], began))
        events += [_moment(node.span, at, tracks[node.span.trace, node.span.span], began) for at in range(len(node.span.events))]
    events += _arrows(nodes, tracks, began)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"began_unix_ns": str(began), "trace": spans[0].trace if spans else ""},
    }


def _tracks(nodes: Sequence[tuple[SpanNode, SpanNode | None]], processes: dict[tuple[str, str], int]) -> dict[tuple[str, str], _Track]:
    """(process, thread) of each span. Slices of one thread are one inside the other, or one after the other."""
    open_slices: dict[_Track, list[int]] = {}  # the ends of the slices that are open on it, the outermost first
    found: dict[tuple[str, str], _Track] = {}
    spans = sorted((node.span for node, _ in nodes), key=lambda span: (span.start_ns, -span.end_ns))
    for span in spans:
        pid, tid = processes[process_of(span)], 1
        while not _fits(open_slices.setdefault((pid, tid), []), span):
            tid += 1
        open_slices[pid, tid].append(span.end_ns)
        found[span.trace, span.span] = pid, tid
    return found


def _fits(ends: list[int], span: Span) -> bool:
    while ends and ends[-1] <= span.start_ns:
        ends.pop()
    return not ends or span.end_ns <= ends[-1]


def _slice(span: Span, track: _Track, began: int) -> dict[str, Any]:
    has = {name: list(value) if isinstance(value, tuple) else value for name, value in span.attributes.items()}
    args: dict[str, Any] = {**has, "span": span.span, "parent": span.parent or ""}
    if span.error:
        args["error"] = span.error
    if span.links:
        args["links"] = [f"{link.trace}/{link.span}" for link in span.links]
    return {
        "ph": "X",
        "name": span.name,
        "cat": str(span.attributes.get("mesh.phase", span.kind)),
        "ts": (span.start_ns - began) / 1e3,
        "dur": max(span.duration_ns, 0) / 1e3,
        "pid": track[0],
        "tid": track[1],
        "args": args,
    }


def _moment(span: Span, number: int, track: _Track, began: int) -> dict[str, Any]:
    event = span.events[number]
    has = {name: list(value) if isinstance(value, tuple) else value for name, value in event.attributes.items()}
    at = {"ts": max(event.at_ns - began, 0) / 1e3, "pid": track[0], "tid": track[1]}
    return {"ph": "i", "s": "t", "name": event.name, "cat": "event", **at, "args": has}


def _arrows(nodes: Sequence[tuple[SpanNode, SpanNode | None]], tracks: dict[tuple[str, str], _Track], began: int) -> list[dict[str, Any]]:
    pairs = [("child", parent.span, node.span) for node, parent in nodes if parent and process_of(parent.span) != process_of(node.span)]
    known = {(node.span.trace, node.span.span): node.span for node, _ in nodes}
    for node, _ in nodes:
        pairs += [("link", node.span, known[link.trace, link.span]) for link in node.span.links if (link.trace, link.span) in known]
    events: list[dict[str, Any]] = []
    for number, (name, source, target) in enumerate(pairs, 1):
        for ph, span, at in (("s", source, min(max(target.start_ns, source.start_ns), source.end_ns)), ("f", target, target.start_ns)):
            pid, tid = tracks[span.trace, span.span]
            event: dict[str, Any] = {"ph": ph, "id": number, "name": name, "cat": name, "ts": (at - began) / 1e3, "pid": pid, "tid": tid}
            events.append(event | ({"bp": "e"} if ph == "f" else {}))
    return events


def _named(what: str, pid: int, tid: int, name: str) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}
