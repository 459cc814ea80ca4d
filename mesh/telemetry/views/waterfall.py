"""The waterfall of a trace in a terminal: a row for each span, with its place in time as a bar.

A step is much shorter than its request, so its parts would all be one column wide. The bars below a short span are therefore drawn to
that span's own length, between two marks, and their starts count from its start. Of a series of like spans, such as decode steps, the
first is drawn with its parts, and the rest is one row with a count.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from mesh.protocol.spans import Span
from mesh.settings.units import format_seconds
from mesh.telemetry.views.skew import Aligned
from mesh.telemetry.views.tree import SpanNode, tree

__all__ = ["Row", "clocks", "draw", "headline", "rows"]

STYLES: Final = {
    "compute": "blue",
    "queue": "magenta",
    "network": "yellow",
    "server": "bright_yellow",
    "codec": "cyan",
    "coordinator": "green",
    "open": "green",
    "failover": "red",
}
"""Phase -> the colour of its bars."""
SHORT: Final = 0.25
"""Of the scale: the bars below a shorter span get a scale of their own."""
_SLOW: Final = 1.5
_NARROW: Final = 20
"""The fewest columns of bars that are worth drawing."""
_FEWEST_WORDS, _MOST_WORDS = 28, 46
_START, _LENGTH = 10, 9
_SHOWN_CLOCK_S: Final = 0.001


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the waterfall. scale: (start, end) of the line of bars that it is on, in nanoseconds since 1970. own: whether that is not
    the scale of the whole trace. count: of the spans that it stands for."""

    depth: int
    words: str
    start_ns: int
    end_ns: int
    scale: tuple[int, int]
    phase: str = ""
    own: bool = False
    leaf: bool = True
    count: int = 1
    error: str = ""
    unfinished: bool = False
    estimated: bool = False


def rows(spans: Iterable[Span], *, fold: bool = True) -> list[Row]:
    """The rows of a trace. fold: long series of like spans as one row."""
    roots = tree(spans)
    if not roots:
        return []
    scale = min(root.span.start_ns for root in roots), max(_end(root) for root in roots)
    found: list[Row] = []
    waiting = [(0, series, scale, False) for series in reversed(_series(roots, fold))]
    while waiting:
        depth, series, on, own = waiting.pop()
        found.append(_row(depth, series.nodes, on, own))
        if series.rest:
            continue
        (node,) = series.nodes
        if node.span.duration_ns < SHORT * (on[1] - on[0]) and (not own or any(child.children for child in node.children)):
            on, own = (node.span.start_ns, node.span.end_ns), True
        waiting.extend((depth + 1, below, on, own) for below in reversed(_series(node.children, fold)))
    return found


def draw(rows: Sequence[Row], *, width: int) -> list[Text]:
    """One line for each row, at most `width` columns wide: what it is, when it began, how long it took, and a bar. Without colours each
    kind of bar still has a mark of its own."""
    if not rows:
        return []
    began = min(row.scale[0] for row in rows if not row.own)
    room = width - _START - _LENGTH - 2
    words = min(max(cell_len(_indented(row)) for row in rows), _MOST_WORDS, max(room, 8))
    if room - words - 1 < _NARROW <= room - _FEWEST_WORDS - 1:
        words = room - _NARROW - 1
    bars = room - words - 1
    return [_line(row, began, words, bars) for row in rows]


def headline(document: Mapping[str, Any]) -> str:
    """One line about the request of a trace document."""
    state = {"stop": "done", "length": "done, as long as was asked for", "error": "failed"}.get(document["state"], document["state"])
    first = document["first_token_s"]
    parts = [
        f"request {document['request']} of {document.get('model', 'a model')}: {state}",
        f"{document['prompt_tokens']:,} prompt tokens",
        f"{document['tokens']:,} tokens in {format_seconds(document['total_s'])}",
        f"first token after {format_seconds(first)}" if first is not None else "no token yet",
    ]
    if document["restarts"]:
        parts.append("moved once" if document["restarts"] == 1 else f"moved {document['restarts']} times")
    return ", ".join(parts)


def clocks(spans: Iterable[Span], found: Aligned) -> list[str]:
    """Which clocks were corrected by a millisecond or more: by the coordinator, or here."""
    said = {}
    for span in spans:
        offset, error = span.attributes.get("mesh.clock_offset_s"), span.attributes.get("mesh.clock_error_s")
        if isinstance(offset, float | int) and abs(offset) >= _SHOWN_CLOCK_S:
            within = f" ± {format_seconds(error)}" if isinstance(error, float | int) else ""
            said[span.instance] = f"The clock of {span.instance} is {_ahead(offset)}{within}: its times are corrected."
    lines = [said[name] for name in sorted(said)]
    moved: dict[int, list[str]] = {}
    for (service, instance), shift_ns in found.shifts_ns.items():
        if abs(shift_ns) >= _SHOWN_CLOCK_S * 1e9:
            moved.setdefault(shift_ns, []).append(instance or service)
    for shift_ns, names in sorted(moved.items()):
        which = f"The clock of {names[0]} is" if len(names) == 1 else f"The clocks of {', '.join(sorted(names))} are"
        lines.append(f"{which} about {_ahead(-shift_ns / 1e9)}: spans are moved into their parents.")
    return lines


# -- rows --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Series:
    """Siblings that become one row: one span, whose parts follow, or the rest of a series (`rest`), whose parts are not shown."""

    nodes: Sequence[SpanNode]
    rest: bool = False


def _series(nodes: Sequence[SpanNode], fold: bool) -> list[_Series]:
    """Like spans that follow each other are a series, and so are like spans without parts wherever they are: what the coordinator does
    between two steps does not end the series of the steps."""
    if not fold:
        return [_Series([node]) for node in nodes]
    small: dict[tuple[object, ...], list[SpanNode]] = {}
    runs: list[list[SpanNode]] = []
    latest: list[SpanNode] = []
    for node in nodes:
        if not node.children:
            like = small.setdefault(_kind(node), [])
            like.append(node)
            if len(like) == 1:
                runs.append(like)
            continue
        if latest and _kind(latest[0]) == _kind(node):
            latest.append(node)
        else:
            latest = [node]
            runs.append(latest)
    found = []
    for run in runs:
        if run[0].children or len(run) == 1:
            found.append(_Series(run[:1]))
            run = run[1:]
        if run:
            found.append(_Series(run, rest=True))
    return found


def _kind(node: SpanNode) -> tuple[object, ...]:
    """What like siblings share. Spans with an error are shown one by one."""
    span = node.span
    return span.name, span.service, span.instance, *map(span.attributes.get, ("mesh.shard", "mesh.to")), span.span if span.error else ""


def _row(depth: int, nodes: Sequence[SpanNode], scale: tuple[int, int], own: bool) -> Row:
    span = nodes[0].span
    return Row(
        depth,
        _words(span) if len(nodes) == 1 else _words_of_many([node.span for node in nodes]),
        span.start_ns,
        max(node.span.end_ns for node in nodes),
        scale,
        phase=str(span.attributes.get("mesh.phase", "")),
        own=own,
        leaf=not any(node.children for node in nodes),
        count=len(nodes),
        error=span.error,
        unfinished=any(node.span.attributes.get("mesh.unfinished") is True for node in nodes),
        estimated=span.attributes.get("mesh.estimated") is True,
    )


def _words_of_many(spans: Sequence[Span]) -> str:
    """Spans that stand for several steps count as so many."""
    steps = [max(int(str(span.attributes.get("mesh.steps", 1))), 1) for span in spans]
    lengths = [span.duration_ns / count / 1e9 for span, count in zip(spans, steps, strict=True)]
    middle, worst = median(lengths), max(lengths)
    slowest = f", slowest {format_seconds(worst)}" if worst > _SLOW * middle else ""
    return f"{spans[0].name} × {sum(steps)}, median {format_seconds(middle)}{slowest}"


def _end(root: SpanNode) -> int:
    """Of a root or of a descendant that lasts longer."""
    waiting, last = [root], root.span.end_ns
    while waiting:
        node = waiting.pop()
        last = max(last, node.span.end_ns)
        waiting += node.children
    return last


def _words(span: Span) -> str:
    """What a span is, with the attribute that tells it from its siblings."""
    has = span.attributes
    sender, receiver = has.get("mesh.from"), has.get("mesh.to")
    if span.name == "decode step":
        return span.name + (f" {has['mesh.step']}" if "mesh.step" in has else "") + _rows(has)
    if span.name == "decode steps" and "mesh.steps" in has:
        return f"{span.name} × {has['mesh.steps']}" + (f" from {has['mesh.step']} on" if "mesh.step" in has else "")
    if span.name == "prefill chunk" and "mesh.tokens" in has:
        return f"{span.name}, {has['mesh.tokens']} tokens" + (", replay" if "mesh.replay" in has else "")
    if span.name == "failover":
        way = f" {sender} → {receiver}" if sender and receiver else ""
        return f"{span.name}{way}" + (f", {has['mesh.replay']}" if "mesh.replay" in has else "")
    if span.name == "frame" and receiver:
        return f"{span.name} → {receiver}"
    if span.name in ("stage", "open row"):
        return f"{span.name} {has.get('mesh.shard', span.instance)}" + (f" {has['mesh.range']}" if "mesh.range" in has else "")
    if span.service == "coordinator" and "gen_ai.request.model" in has:
        return f"{span.name} ({span.service} {span.instance})"
    if span.service == "gateway":
        return f"{span.name} ({span.service})"
    return span.name


def _rows(has: Mapping[str, Any]) -> str:
    rows = has.get("mesh.rows", 1)
    return f", {rows} rows" if rows != 1 else ""


# -- lines -------------------------------------------------------------------------------------------------------------


def _line(row: Row, began_ns: int, words: int, bars: int) -> Text:
    line = Text(no_wrap=True)
    text = _indented(row)
    line.append(_cut(text, words), style="" if row.leaf else "bold")
    start = format_seconds((row.start_ns - (row.scale[0] if row.own else began_ns)) / 1e9)
    start = ("~" if row.estimated else "") + ("+ " if row.own else "") + start
    length = format_seconds((row.end_ns - row.start_ns) / 1e9) + ("…" if row.unfinished else "")
    line.append(f" {start:>{_START}} {length:>{_LENGTH}}", style="dim")
    if bars >= _NARROW:
        line.append(" ").append(_bar(row, bars))
    if row.error:
        line.append(f"\n{'  ' * (row.depth + 1)}{row.error}", style="red")
    line.rstrip()
    return line


def _indented(row: Row) -> str:
    return "  " * row.depth + row.words


def _cut(text: str, width: int) -> str:
    return set_cell_size(text, width) if cell_len(text) <= width else set_cell_size(text, width - 1) + "…"


def _bar(row: Row, width: int) -> Text:
    inner = width - 2 if row.own else width
    first, last = row.scale
    length = max(last - first, 1)
    start = min(max(int((row.start_ns - first) / length * inner), 0), inner - 1)
    stop = min(max(int((row.end_ns - first) / length * inner + 0.5), start + 1), inner)
    mark = "━" if not row.leaf and row.count == 1 else "▒" if row.count > 1 else "░" if row.phase in ("queue", "failover") else "█"
    bar = Text(" " * start).append(mark * (stop - start), style=STYLES.get(row.phase, "" if row.leaf else "dim"))
    if row.own:
        bar = Text.assemble(("┊", "dim"), bar, " " * (inner - stop), ("┊", "dim"))
    return bar


def _ahead(offset_s: float) -> str:
    return f"{format_seconds(abs(offset_s))} {'ahead' if offset_s > 0 else 'behind'}"
