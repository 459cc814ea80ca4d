"""Clocks that differ between processes.

A span and its child in another process are a request and its reply: the request was sent after the parent began, and the reply came back
before it ended. So each such pair bounds the difference of the two clocks, and all pairs of a process bound it together. A process moves
with that of its parents. Where its spans lie outside their parents nevertheless, it is moved by a shift of its own within the bounds: the
one that best divides the time that is left equally over the ways, before, between and after the stages of a step.

Coordinators write the spans of stages by their own clock (`mesh.clock_offset_s`), so these move with the coordinator's. What is found
here are the clocks of gateways and coordinators on several hosts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from mesh.protocol.spans import Span
from mesh.telemetry.views.tree import SpanNode, process_of, tree, walk

__all__ = ["Aligned", "aligned"]

Process = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Aligned:
    """spans: as given, in order, with every child inside its parent. shifts_ns: (service, instance) -> how far its spans were moved.
    fitted: the number of spans that had to be moved or cut alone, because one shift did not bring them into their parents."""

    spans: tuple[Span, ...]
    shifts_ns: Mapping[Process, int]
    fitted: int


def aligned(spans: Sequence[Span]) -> Aligned:
    """The spans on the clock of the root's process."""
    roots = tree(spans)
    shifts = _shifts(roots)
    times: dict[tuple[str, str], tuple[int, int]] = {}
    fitted = 0
    for _, node, parent in walk(roots):
        span = node.span
        shift = shifts.get(process_of(span), 0)
        start, end = span.start_ns + shift, max(span.end_ns, span.start_ns) + shift
        if parent is not None:
            inside = _into(start, end, *times[parent.span.trace, parent.span.span])
            fitted += inside != (start, end)
            start, end = inside
        times[span.trace, span.span] = max(start, 0), max(end, 0)
    return Aligned(tuple(_at(span, *times[span.trace, span.span]) for span in spans), {k: v for k, v in shifts.items() if v}, fitted)


def _shifts(roots: Iterable[SpanNode]) -> dict[Process, int]:
    """The shift of each process, decided from the root down: the clock of a parent's process is known before that of its child's."""
    shifts: dict[Process, int] = {}
    pairs: dict[Process, list[tuple[SpanNode, SpanNode]]] = defaultdict(list)
    for _, node, parent in walk(roots):
        process = process_of(node.span)
        if parent is None:
            shifts.setdefault(process, 0)
        elif process_of(parent.span) != process:
            pairs[process].append((parent, node))
    waiting = [process for process in pairs if process not in shifts]
    while waiting:
        ready = [each for each in waiting if any(process_of(parent.span) in shifts for parent, _ in pairs[each])] or waiting[:1]
        for process in ready:
            shifts[process] = _shift([(p, c) for p, c in pairs[process] if process_of(p.span) in shifts], shifts)
        waiting = [each for each in waiting if each not in shifts]
    return shifts


def _shift(pairs: Sequence[tuple[SpanNode, SpanNode]], shifts: Mapping[Process, int]) -> int:
    """Nanoseconds to add to the times of a process, from its pairs of (parent in a process with a known shift, child)."""
    lows, highs, guesses = [], [], []
    exact = any(child.span.name == "stage" for _, child in pairs)
    for parent, child in pairs:
        offset = shifts[process_of(parent.span)]
        start, end = parent.span.start_ns + offset, parent.span.end_ns + offset
        if child.span.duration_ns > end - start:
            continue  # no shift brings it inside
        lows.append(start - child.span.start_ns)
        highs.append(end - child.span.end_ns)
        if child.span.name == "stage" or not exact:
            guesses.append(start + _place(parent, child) - child.span.start_ns)
    with_parent = shifts[process_of(pairs[0][0].span)] if pairs else 0
    if not guesses or all(low <= with_parent <= high for low, high in zip(lows, highs, strict=True)):
        return with_parent
    guess = round(median(guesses))
    low, high = max(lows), min(highs)
    return min(max(guess, low), high) if low <= high else guess


def _place(parent: SpanNode, child: SpanNode) -> int:
    """Nanoseconds from the parent's start to the child's, if every way takes the same time. The stages of a step follow each other in the
    order of their layers; any other child is alone between the request and the reply."""
    chain = [child]
    if child.span.name == "stage":
        chain = sorted((each for each in parent.children if each.span.name == "stage"), key=_first_layer)
        if sum(each.span.duration_ns for each in chain) > parent.span.duration_ns:
            chain = [child]
    way = (parent.span.duration_ns - sum(each.span.duration_ns for each in chain)) // (len(chain) + 1)
    at = next(index for index, each in enumerate(chain) if each is child)
    return (at + 1) * way + sum(each.span.duration_ns for each in chain[:at])


def _first_layer(node: SpanNode) -> int:
    first = str(node.span.attributes.get("mesh.range", "")).partition("-")[0]
    return int(first) if first.isdecimal() else 0


def _into(start: int, end: int, first: int, last: int) -> tuple[int, int]:
    """The nearest place of [start, end] inside [first, last]; shortened where it is too long."""
    if end - start >= last - first:
        return first, last
    if start < first:
        return first, first + end - start
    return (last - (end - start), last) if end > last else (start, end)


def _at(span: Span, start_ns: int, end_ns: int) -> Span:
    if (start_ns, end_ns) == (span.start_ns, span.end_ns):
        return span
    shift = start_ns - span.start_ns
    events = tuple(event.model_copy(update={"at_ns": max(event.at_ns + shift, 0)}) for event in span.events)
    return span.model_copy(update={"start_ns": start_ns, "end_ns": end_ns, "events": events})
