"""Describe what a graph computes from positions and sizes alone, so that a block can compute it from `position_ids` [B, T].

A source numbers its positions in many ways: an input, arange(past, past + T), cumsum(attention_mask) - 1, with a leading
axis or without. It derives sizes from the shape of any value, the past included. A block knows only the positions of its rows,
which differ from row to row. Each value that the data path takes from this part of the graph is therefore described as one of

    Constant    the same at all sizes
    Sizes       a few integers, each a + b*B + c*T + d*B*T
    Positions   the positions themselves, in some shape and type, plus an offset (OPT: 2)
    Computed    the source's own nodes over the three above
    Table       a function of the position that its nodes cannot give row by row: one row for each position up to the context

The description comes from evaluating the value at several sizes. A Computed is also checked with rows at different positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.graph.decoder import DecoderGraph, Dependence, attribute, input_of
from mesh.importer.graph.evaluate import NotConcrete
from mesh.importer.graph.probe import GraphProbe

__all__ = ["Computed", "Constant", "Description", "InputParts", "Positions", "Sizes", "Table", "context_limit"]

Array = npt.NDArray[Any]

LARGEST_TABLE = 64 << 20  # bytes
POSITION_READERS = ("Gather", "GatherElements", "GatherND", "Slice", "RotaryEmbedding")
MOST_SIZES = 64  # elements of an integer vector that is looked at as sizes


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    array: Array


@dataclass(frozen=True, slots=True)
class Sizes:
    """Integers: for each element the factors of 1, B, T and B*T. rank 0 or 1."""

    factors: tuple[tuple[int, int, int, int], ...]
    rank: int


@dataclass(frozen=True, slots=True)
class Positions:
    """position_ids + offset as `dtype`, its two axes at `batch` and `token` among `rank`; batch -1: before all others, as one more."""

    rank: int
    token: int
    batch: int
    offset: int
    dtype: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class Computed:
    """Recompute by the source's nodes. `extra`: a leading batch axis that the source's value does not have."""

    extra: bool


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Row p of `rows` [context, ...] for position p; batch and token axes go to `batch` and `token` (batch -1: a new leading axis)."""

    rows: Array
    token: int
    batch: int


Description = Constant | Sizes | Positions | Computed | Table


class InputParts:
    """Describes the values of one graph that depend on shapes and positions only (Dependence.SHAPE)."""

    def __init__(self, graph: DecoderGraph, context_length: int) -> None:
        self.graph, self.context_length = graph, context_length
        past = [4, 7, 9, 4, 2, 11] if graph.has_past else [0] * 6
        sizes = [(2, 3), (3, 5), (1, 4), (2, 6), (4, 3), (3, 2)]
        self.probes = [GraphProbe(graph, b, t, p) for (b, t), p in zip(sizes, past, strict=True) if p + t <= context_length]
        if graph.has_past and context_length > 16:
            self.probes.append(GraphProbe(graph, 1, 2, context_length - 2))
        self._leaves: dict[ir.Value, Constant | Sizes | Positions | None] = {}
        self._described: dict[ir.Value, Description] = {}

    # --- leaves -----------------------------------------------------------------------------------------------------

    def leaf(self, value: ir.Value) -> Constant | Sizes | Positions | None:
        """`value` as a Constant, Sizes or Positions, which need no nodes of the source; None if it is none of them."""
        if value not in self._leaves:
            self._leaves[value] = self._leaf(value)
        return self._leaves[value]

    def _leaf(self, value: ir.Value) -> Constant | Sizes | Positions | None:
        try:
            shapes = [probe.shape(value) for probe in self.probes]
        except NotConcrete:
            return None
        if len(set(shapes)) > 1 and not self._positional(shapes):
            return None
        try:
            arrays = [probe.value(value) for probe in self.probes]
        except NotConcrete:
            return None
        if len(set(shapes)) == 1:
            if all(np.array_equal(array, arrays[0]) for array in arrays[1:]):
                return Constant(np.array(arrays[0]))
            if arrays[0].dtype.kind in "iu" and arrays[0].ndim <= 1 and arrays[0].size <= MOST_SIZES:
                return self._sizes(arrays)
            return None
        return self._positions(arrays)

    def _sizes(self, arrays: list[Array]) -> Sizes | None:
        basis = np.array([[1, p.batch, p.chunk, p.batch * p.chunk] for p in self.probes], np.float64)
        seen = np.stack([array.reshape(-1) for array in arrays]).astype(np.float64)
        factors = np.rint(np.linalg.lstsq(basis, seen, rcond=None)[0])
        if not np.array_equal(basis @ factors, seen):
            return None
        return Sizes(tuple(tuple(int(f) for f in column) for column in factors.T), arrays[0].ndim)  # type: ignore[misc]

    def _positional(self, shapes: list[tuple[int, ...]]) -> bool:
        return len({len(shape) for shape in shapes}) == 1 and self._token_axis(shapes) is not None

    def _token_axis(self, shapes: list[tuple[int, ...]]) -> int | None:
        axes = [a for a in range(len(shapes[0])) if all(shape[a] == p.chunk for shape, p in zip(shapes, self.probes, strict=True))]
        return axes[0] if len(axes) == 1 else None

    def _batch_axis(self, shapes: list[tuple[int, ...]], token: int) -> int:
        """The axis that is the batch or can become it; -1 if there is none."""
        others = [a for a in range(len(shapes[0])) if a != token]
        for a in others:
            if all(shape[a] == p.batch for shape, p in zip(shapes, self.probes, strict=True)):
                return a
        return next((a for a in others if a < token and all(shape[a] == 1 for shape in shapes)), -1)

    def _positions(self, arrays: list[Array]) -> Positions | None:
        shapes = [array.shape for array in arrays]
        token = self._token_axis(shapes)
        if token is None or arrays[0].dtype.kind not in "iuf" or any(array.size == 0 for array in arrays):
            return None
        for shape, probe in zip(shapes, self.probes, strict=True):
            if any(size not in (1, probe.batch) for a, size in enumerate(shape) if a != token):
                return None
        offset = int(arrays[0].reshape(-1)[0]) - self.probes[0].past
        for array, probe in zip(arrays, self.probes, strict=True):
            line = np.arange(probe.past, probe.total) + offset
            if not np.array_equal(np.moveaxis(array, token, -1), np.broadcast_to(line, np.moveaxis(array, token, -1).shape)):
                return None
        return Positions(arrays[0].ndim, token, self._batch_axis(shapes, token), offset, arrays[0].dtype)

    # --- descriptions -----------------------------------------------------------------------------------------------

    def describe(self, value: ir.Value, widened: bool) -> Description:
        """What a block computes in place of `value`, which the data path takes.

        widened: whether a batch axis before all others of `value` does no harm to the node that takes it.
        UnsupportedModel if it depends on the length of the whole sequence or on what a block does not have.
        """
        if value not in self._described:
            self._described[value] = self._describe(value, widened)
        return self._described[value]

    def _describe(self, value: ir.Value, widened: bool) -> Description:
        leaf = self.leaf(value)
        if leaf is not None and not (isinstance(leaf, Positions) and leaf.batch < 0 and not widened):
            return leaf
        try:
            shapes = [probe.shape(value) for probe in self.probes]
        except NotConcrete as error:
            raise UnsupportedModel(f"the shape of {value.name} depends on the tokens ({error}): such a graph cannot be cut") from None
        token = self._token_axis(shapes) if len({len(shape) for shape in shapes}) == 1 else None
        leaves, unknown = self._collect(value)
        if unknown is None and token is None and not any(isinstance(leaf, Positions) for leaf in leaves.values()):
            return Computed(extra=False)
        if token is None:
            what = f"it needs {unknown.name}" if unknown is not None else "it is computed from positions"
            raise UnsupportedModel(
                f"{value.name} of shape {list(shapes[0])} is not one value a position ({what}): such a graph cannot be cut"
            )
        batch = self._batch_axis(shapes, token)
        if unknown is None and (found := self._check(value, leaves, token, batch)) is not None and (widened or not found.extra):
            return found
        return self._table(value, shapes, token, batch, unknown)

    def _collect(self, value: ir.Value) -> tuple[dict[ir.Value, Constant | Sizes | Positions], ir.Value | None]:
        """The leaves that the nodes of `value` start from, and the first input that is none."""
        leaves: dict[ir.Value, Constant | Sizes | Positions] = {}
        stack, seen = [value], {value}
        while stack:
            current = stack.pop()
            leaf = self.leaf(current) if self.graph.dependence(current) is Dependence.SHAPE else None
            if leaf is not None:
                leaves[current] = leaf
                continue
            node = current.producer()
            if self.graph.dependence(current) is Dependence.CONSTANT:
                continue
            if node is None or node.op_type in ("Shape", "Size"):
                return leaves, current
            for source in node.inputs:
                if source is not None and source not in seen:
                    seen.add(source)
                    stack.append(source)
        return leaves, None

    def _at(self, value: ir.Value, start: int, chunk: int, token: int) -> Array:
        """`value` for one row of `chunk` tokens from position `start` on."""
        if self.graph.has_past:
            return GraphProbe(self.graph, 1, chunk, start).value(value)
        return np.take(GraphProbe(self.graph, 1, start + chunk, 0).value(value), np.arange(start, start + chunk), axis=token)

    def _check(self, value: ir.Value, leaves: dict[ir.Value, Constant | Sizes | Positions], token: int, batch: int) -> Computed | None:
        """Run two rows, one early and one late in the context, through the source's nodes. Each must equal what the source has there."""
        chunk, starts = 3, (1, max(self.context_length - 3, 1))
        if not self.graph.has_past:
            starts = (1, min(max(self.context_length - 3, 1), 4000))
        try:
            expected = [self._at(value, start, chunk, token) for start in starts]
            rows = np.stack([np.arange(start, start + chunk) for start in starts])
            given = {v: self._stand_in(v, leaf, rows) for v, leaf in leaves.items()}
            probe = GraphProbe(self.graph, 2, chunk, 4 if self.graph.has_past else 0, given)
            got = probe.value(value)
        except NotConcrete:
            return None
        extra = got.ndim == expected[0].ndim + 1
        axis = 0 if extra else batch
        if axis < 0 or got.shape[axis] != 2 or (not extra and got.ndim != expected[0].ndim):
            return None
        for row, wanted in enumerate(expected):
            mine = np.take(got, row, axis=axis) if extra else np.take(got, [row], axis=axis)
            if mine.shape != wanted.shape or not np.allclose(mine, wanted, rtol=1e-5, atol=1e-6):
                return None
        return Computed(extra)

    def _stand_in(self, value: ir.Value, leaf: Constant | Sizes | Positions, rows: Array) -> Array:
        """What a block has in place of `value` for positions `rows` [B, T]."""
        if isinstance(leaf, Constant):
            return leaf.array
        if isinstance(leaf, Positions):
            return shape_positions(rows, leaf)
        batch, chunk = rows.shape
        numbers = [a + b * batch + c * chunk + d * batch * chunk for a, b, c, d in leaf.factors]
        return np.asarray(numbers, self.probes[0].dtype(value)).reshape([-1] if leaf.rank else [])

    def _table(self, value: ir.Value, shapes: list[tuple[int, ...]], token: int, batch: int, unknown: ir.Value | None) -> Table:
        context = self.context_length
        row = int(np.prod([size for a, size in enumerate(shapes[0]) if a not in (token, batch)]))
        seen = f" (it needs {unknown.name})" if unknown is not None else ""
        problem = f"{value.name} depends on the positions in a way that cannot be given row by row{seen}"
        if row * context * 4 > LARGEST_TABLE:
            raise UnsupportedModel(f"{problem}, and a table of it for {context:,} positions is too large")
        try:
            whole = self._at(value, 0, context, token)
            late = self._at(value, max(context - 3, 0), min(3, context), token)
            early = self._at(value, 1, 2, token)
        except NotConcrete as error:
            raise UnsupportedModel(f"{problem}: {error}") from None
        for part, start in ((late, max(context - 3, 0)), (early, 1)):
            wanted = np.take(whole, np.arange(start, start + part.shape[token]), axis=token)
            if part.shape != wanted.shape or not np.allclose(part, wanted, rtol=1e-5, atol=1e-6):
                apart = np.abs(part - wanted).max() if part.shape == wanted.shape else np.inf
                raise UnsupportedModel(
                    f"{value.name} depends on the length of the whole sequence, not on each position alone (such as rotary "
                    f"frequencies that change with the length: at position {start} they differ by {apart:.3g}): not supported"
                )
        rows = np.moveaxis(whole, token, 0)
        if batch >= 0:
            rows = rows.squeeze(batch + 1 if batch < token else batch)
        return Table(np.ascontiguousarray(rows), token, batch)


def shape_positions(rows: Array, positions: Positions) -> Array:
    """`rows` [B, T] in the shape and type that `positions` says."""
    result = (rows + positions.offset).astype(positions.dtype)
    if positions.batch < 0:
        axes = [a + 1 for a in range(positions.rank) if a != positions.token]
        return np.expand_dims(result, tuple(axes))
    if positions.batch > positions.token:
        result = result.T
    return np.expand_dims(result, tuple(a for a in range(positions.rank) if a not in (positions.batch, positions.token)))


def context_limit(graph: DecoderGraph) -> int | None:
    """The number of positions that the graph's own tables have, None if it has no table of positions."""
    limit: int | None = None
    past = 4 if graph.has_past else 0
    near, far = GraphProbe(graph, 1, 3, past), GraphProbe(graph, 1, 5, past)
    for node in graph.nodes:
        if node.op_type not in POSITION_READERS:
            continue
        try:
            rows = _table_rows(graph, node, near, far)
        except (NotConcrete, ValueError, IndexError):
            continue
        if rows is not None:
            limit = rows if limit is None else min(limit, rows)
    return limit


def _table_rows(graph: DecoderGraph, node: ir.Node, near: GraphProbe, far: GraphProbe) -> int | None:
    """How many positions the table has that `node` reads by position; None if it reads no such table.

    A table is read by position if one more token in the sequence makes the node read one row further.
    """
    if node.op_type == "RotaryEmbedding":
        constant = len(node.inputs) > 3 and graph.dependence(input_of(node, 1)) is Dependence.CONSTANT
        return near.shape(input_of(node, 1))[0] if constant else None
    if graph.dependence(node.outputs[0]) is not Dependence.SHAPE:
        return None
    table, axis = input_of(node, 0), attribute(node, "axis", 0)
    if node.op_type == "Slice":
        axes = near.value(input_of(node, 3)) if len(node.inputs) > 3 and node.inputs[3] is not None else np.zeros(1, np.int64)
        axis = int(axes.reshape(-1)[0])
    if node.op_type == "GatherND" and near.shape(input_of(node, 1))[-1] != 1:
        return None
    size = near.shape(table)[axis]
    if far.shape(table)[axis] != size:
        return None
    if node.op_type != "Slice":
        last = [int(probe.value(input_of(node, 1)).max()) for probe in (near, far)]
    else:
        starts = [int(probe.value(input_of(node, 1)).reshape(-1)[0]) for probe in (near, far)]
        if starts[0] - starts[1] == far.total - near.total:  # the last rows of the table
            return near.total + (starts[0] if starts[0] >= 0 else size + starts[0])
        last = [int(probe.value(input_of(node, 2)).reshape(-1)[0]) - 1 for probe in (near, far)]
    if last[1] - last[0] != far.total - near.total or last[0] < near.total - 1:
        return None
    return size - (last[0] - (near.total - 1))
