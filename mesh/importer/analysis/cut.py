"""Where a decoder may be cut: values that every path from the token ids to the logits crosses.

In the data path each attention pattern counts as one step from its queries, keys and values to its output. What a layer keeps marks its
place: the output of its attention, and the first values that its states and its tokens make together. Between the marks of two layers the
cut is the last such value of shape [B, T, D]. After the last mark it is the value at which the last layer has done what the earlier
layers do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.analysis.attention import AttentionPattern
from mesh.importer.analysis.layers import DecoderLayer
from mesh.importer.graph.decoder import DecoderGraph, Dependence, Role, producer
from mesh.importer.graph.evaluate import NotConcrete
from mesh.importer.graph.probe import GraphProbe

__all__ = ["Crossing", "Cut", "DataPath", "find_cuts", "find_marks"]

PRIME = (1 << 61) - 1


@dataclass(frozen=True, slots=True)
class Crossing:
    """One value that crosses a cut. `perm` brings its axes into the order batch, tokens, all others, which are `rest`."""

    value: ir.Value
    perm: tuple[int, ...]
    rest: tuple[int, ...]

    @property
    def width(self) -> int:
        return prod(self.rest)


@dataclass(frozen=True, slots=True)
class Cut:
    """`crossings[0]` leave embed, `crossings[i + 1]` leave layer i: together at most `size` numbers for each token."""

    crossings: tuple[tuple[Crossing, ...], ...]
    size: int

    @property
    def values(self) -> tuple[ir.Value, ...]:
        """The first value of each, which is all where the hidden state alone crosses."""
        return tuple(each[0].value for each in self.crossings)


class DataPath:
    """The graph as blocks will have it: patterns are single steps, shapes and masks are not part of it."""

    def __init__(self, graph: DecoderGraph, patterns: Sequence[AttentionPattern]) -> None:
        self.graph = graph
        self.patterns: Mapping[ir.Value, AttentionPattern] = {pattern.output: pattern for pattern in patterns}

    def inputs(self, value: ir.Value) -> tuple[ir.Value, ...]:
        """The data values that `value` is made from directly."""
        pattern = self.patterns.get(value)
        if pattern is not None:
            return pattern.reads
        node = value.producer()
        if node is None or node.op_type in ("Shape", "Size"):
            return ()
        return tuple(v for v in dict.fromkeys(node.inputs) if v is not None and self.graph.dependence(v) is Dependence.TOKENS)

    def place(self, value: ir.Value) -> int:
        """Its place in the graph's order; inputs come first."""
        node = value.producer()
        return self.graph.index[node] if node is not None else -1

    def between(self, ends: Sequence[ir.Value], starts: Sequence[ir.Value]) -> list[ir.Value]:
        """The values needed for `ends` back to `starts` (none: the token ids), in order, `starts` themselves left out.

        UnsupportedModel if one of them needs the token ids past `starts`.
        """
        needed: set[ir.Value] = set()
        stack = list(ends)
        while stack:
            current = stack.pop()
            if current in needed or current in starts:
                continue
            if starts and self.graph.roles.get(current) is Role.TOKENS:
                raise UnsupportedModel(
                    f"{ends[0].name} needs the token ids again after the embedding (embeddings for each layer): not supported"
                )
            needed.add(current)
            stack.extend(self.inputs(current))
        return sorted(needed, key=self.place)


def find_cuts(path: DataPath, layers: Sequence[DecoderLayer], probe: GraphProbe) -> Cut:
    """Cuts for every layer. UnsupportedModel where two layers share more than the hidden state."""
    graph = path.graph
    order = path.between([graph.logits], [])
    crossings = [v for v in _articulations(path, order) if _is_hidden(probe, v)]
    marks = find_marks(path, order, layers)
    values: list[ir.Value] = []
    for number, (end, _) in enumerate(marks):
        start = marks[number - 1][1] if number else -1
        inside = [v for v in crossings if start < path.place(v) < end]
        if not inside:
            if number == 0:
                raise UnsupportedModel(
                    "the first layer takes more than the embedded tokens [batch, tokens, width]: such a graph cannot be cut"
                )
            raise UnsupportedModel(
                f"layers {number - 1} and {number} share more than the hidden state: such a graph cannot be cut between them"
            )
        values.append(inside[-1])
    after = [v for v in crossings if path.place(v) > marks[-1][1] and v is not graph.logits]
    if not after:
        raise UnsupportedModel("nothing crosses from the last layer to the logits alone: such a graph cannot be cut")
    values.append(_last_layer_end(path, values, after))
    sizes = {probe.shape(v)[-1] for v in values}
    if len(sizes) > 1:
        raise UnsupportedModel(f"the hidden state has different widths in different layers ({sorted(sizes)}): not supported")
    size = sizes.pop()
    return Cut(tuple((Crossing(value, (0, 1, 2), (size,)),) for value in values), size)


def find_marks(path: DataPath, order: Sequence[ir.Value], layers: Sequence[DecoderLayer]) -> list[tuple[int, int]]:
    """The places of the first and the last mark of each layer."""
    source = path.graph.input(Role.TOKENS)
    live: set[ir.Value] = set()  # what depends on the tokens
    made_of: dict[ir.Value, set[ir.Value]] = {}  # the states alone that a value is made of
    met: dict[ir.Value, int] = {}  # the place at which a state meets the tokens
    for value in order:
        given = path.inputs(value)
        states = {value} if path.graph.roles.get(value) is Role.STATE else set().union(*(made_of.get(v, ()) for v in given))
        if value is source or any(v in live for v in given):
            live.add(value)
            for state in states:
                met.setdefault(state, path.place(value))
        elif states:
            made_of[value] = states
    marks = []
    for layer in layers:
        places = [met[state.before] for state in layer.states if state.before in met]
        places += [] if layer.pattern is None else [path.place(layer.pattern.output)]
        if not places:
            raise UnsupportedModel(f"{path.graph.path}: the states of a layer are not read: such a graph cannot be cut")
        marks.append((min(places), max(places)))
    return marks


def _articulations(path: DataPath, order: Sequence[ir.Value]) -> Iterator[ir.Value]:
    """Values on every path, found by counting paths modulo a prime from either end."""
    graph = path.graph
    source = graph.input(Role.TOKENS)
    from_source: dict[ir.Value, int] = {}
    to_logits: dict[ir.Value, int] = dict.fromkeys(order, 0)
    for value in order:
        from_source[value] = 1 if value is source else sum(from_source[v] for v in path.inputs(value)) % PRIME
    to_logits[graph.logits] = 1
    for value in reversed(order):
        for v in path.inputs(value):
            to_logits[v] = (to_logits[v] + to_logits[value]) % PRIME
    if source is None:
        return
    whole = to_logits[source]
    for value in order:
        if from_source[value] * to_logits[value] % PRIME == whole:
            yield value


def _is_hidden(probe: GraphProbe, value: ir.Value) -> bool:
    try:
        shape = probe.shape(value)
    except NotConcrete:
        return False
    return len(shape) == 3 and shape[:2] == (probe.batch, probe.chunk)


def _last_layer_end(path: DataPath, values: Sequence[ir.Value], after: Sequence[ir.Value]) -> ir.Value:
    """The crossing after the last pattern at which the last layer has done what an earlier one does, else its last residual sum."""
    earlier = [_signature(path, values[i], values[i - 1]) for i in range(1, len(values))]
    for value in after:
        if _signature(path, value, values[-1]) in earlier:
            return value
    sums = [v for v in after if (node := v.producer()) is not None and node.op_type == "Add" and len(path.inputs(v)) == 2]
    return sums[-1] if sums else after[0]


def _signature(path: DataPath, value: ir.Value, start: ir.Value) -> Counter[str]:
    def kind(v: ir.Value) -> str:
        if v in path.patterns:
            return "pattern"
        return "state" if path.graph.roles.get(v) is Role.STATE else producer(v).op_type

    return Counter(map(kind, path.between([value], [start])))
