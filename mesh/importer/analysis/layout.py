"""How the queries, keys and values of an attention are laid out, learned by numbering elements.

Elements are numbered in a value and sent through the source's own nodes to the attention's operand. Where the numbers arrive
says how the value was transposed, merged with the batch, repeated for grouped queries or joined to a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.graph.decoder import DecoderGraph, Dependence, producer, scalar
from mesh.importer.graph.evaluate import NotConcrete
from mesh.importer.graph.probe import GraphProbe

__all__ = ["Layout", "Operand", "find_operand"]

Array = npt.NDArray[Any]

# operators that only move, repeat or select elements
LAYOUT_OPS = frozenset(
    ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Tile", "Flatten", "Identity", "Cast", "Slice", "Split", "Gather")
)


@dataclass(frozen=True, slots=True)
class Layout:
    """How a value becomes [batch, heads, tokens, width]: reshape to `split`, transpose by `perm`, reshape to the four.

    Entries of `split` are numbers, or "B" and "T".
    """

    split: tuple[int | str, ...]
    perm: tuple[int, ...]
    heads: int
    width: int
    cost: int  # how many of the three steps do something


@dataclass(frozen=True, slots=True)
class Operand:
    """The new tokens' queries, keys or values: `value` in its `layout`, times `scale`."""

    value: ir.Value
    layout: Layout
    scale: float


def find_operand(
    graph: DecoderGraph,
    probe: GraphProbe,
    operand: ir.Value,
    leading: tuple[int, ...] | None,
    heads: int,
    transposed: bool,
    what: str,
    cached: bool | None = None,
    *,
    own_cache: bool = False,
    scores: bool = True,
    as_many: int | None = None,
) -> Operand:
    """The best value to take new tokens' q, k or v from, and its layout.

    leading: the axes before the last two of the product the operand takes part in; None for an operand of Attention. scores: whether the
    operand is of queries or keys. as_many: the heads that it has to have; None: as few as it can.
    """
    cached = transposed if cached is None else cached
    best: tuple[tuple[int, int, int, int, int], Operand] | None = None
    seen_cache = not (cached and graph.has_past) or own_cache
    for depth, (value, scale, past) in enumerate(_walk(graph, probe, operand)):
        if past is not None:
            seen_cache, best = True, None  # only what is on the near side of the cache counts
        if not seen_cache:
            continue
        layout = _layout(probe, operand, value, scale, past, leading, heads, transposed)
        if layout is None or as_many not in (None, layout.heads):
            continue
        scaled = int(scale != 1.0)  # a scale of queries and keys becomes that of the scores; one of values is better left where it is
        rank = (0 if scores else scaled, layout.heads, layout.cost, -scaled, depth)
        if best is None or rank < best[0]:
            best = rank, Operand(value, layout, scale)
    if best is None:
        detail = "" if seen_cache else ": they are not the past key or value followed by the new ones"
        raise UnsupportedModel(f"the {what} are not laid out in a way that is known{detail}")
    return best[1]


def _walk(graph: DecoderGraph, probe: GraphProbe, value: ir.Value) -> Iterator[tuple[ir.Value, float, ir.Value | None]]:
    """`value`, and the values that it only rearranges or scales, nearest first.

    Each comes with the factor between it and `value`, and with the cache that it was joined to in this step (None: not joined).
    """
    scale = 1.0
    past: ir.Value | None = None
    yield value, scale, None
    while (node := value.producer()) is not None and node.domain == "":
        data = _data_inputs(graph, node)
        past = None
        if node.op_type in LAYOUT_OPS and len(data) == 1 and data[0] is node.inputs[0]:
            value = data[0]
        elif node.op_type in ("Mul", "Div") and len(data) == 1:
            other = node.inputs[1] if node.inputs[0] is data[0] else node.inputs[0]
            factor = _scalar(probe, other) if other is not None else None
            if factor is None or (node.op_type == "Div" and data[0] is not node.inputs[0]):
                return
            scale *= factor if node.op_type == "Mul" else 1.0 / factor
            value = data[0]
        elif (
            node.op_type == "Concat"
            and len(data) == 2
            and graph.dependence(data[0]) is Dependence.PAST
            and graph.dependence(data[1]) is Dependence.TOKENS
        ):
            past, value = data[0], data[1]
        else:
            return
        if graph.dependence(value) is not Dependence.TOKENS:
            return
        yield value, scale, past


def _scalar(probe: GraphProbe, value: ir.Value) -> float | None:
    number = scalar(value)
    if number is None and probe.graph.dependence(value) is Dependence.SHAPE:
        try:
            array = probe.value(value)
        except NotConcrete:
            return None
        number = float(array.reshape(())) if array.size == 1 else None
    return number or None


def _layout(
    probe: GraphProbe,
    operand: ir.Value,
    value: ir.Value,
    scale: float,
    past: ir.Value | None,
    leading: tuple[int, ...] | None,
    heads: int,
    transposed: bool,
) -> Layout | None:
    """How `value` is laid out, learned by numbering its elements and looking where they are in `operand`."""
    shape = probe.shape(value)
    numbers = np.arange(prod(shape), dtype=np.float64).reshape(shape)
    overrides = {value: numbers}
    if past is None:
        for cache in _caches(probe.graph, operand, value):
            overrides[cache] = np.full(probe.shape(cache), -1.0)
    else:
        overrides[past] = np.full(probe.shape(past), -1.0)
    try:
        seen = np.asarray(probe.derive(overrides).value(operand), np.float64) / scale
    except NotConcrete:
        return None
    if transposed:
        seen = np.swapaxes(seen, -1, -2)
    if leading is not None:
        seen = np.broadcast_to(seen, (*leading, *seen.shape[-2:]))
        seen = seen.reshape(probe.batch, heads, *seen.shape[-2:])
    elif seen.ndim == 3:
        seen = seen.reshape(*seen.shape[:2], heads, -1).swapaxes(1, 2)
    seen = np.rint(seen).astype(np.int64)
    tokens = seen.shape[2]
    if tokens not in (probe.chunk, probe.total) or (seen[:, :, : tokens - probe.chunk] >= 0).any():
        return None
    seen = seen[:, :, tokens - probe.chunk :]
    if (seen < 0).any():
        return None
    distinct = seen.size
    count = np.unique(seen).size
    if count != prod(shape) or distinct % count:
        return None
    repeat = distinct // count
    if heads % repeat or not np.array_equal(seen, np.repeat(seen[:, ::repeat], repeat, axis=1)):
        return None
    return _match(probe, numbers, seen[:, ::repeat])


def _caches(graph: DecoderGraph, operand: ir.Value, value: ir.Value) -> Iterator[ir.Value]:
    """The past values joined in between `value` and `operand`."""
    current = operand
    while current is not value:
        data = _data_inputs(graph, producer(current))
        yield from (v for v in data if graph.dependence(v) is Dependence.PAST)
        current = next(v for v in data if graph.dependence(v) is Dependence.TOKENS)


def _match(probe: GraphProbe, numbers: Array, wanted: Array) -> Layout | None:
    """The cheapest split and transposition that take `numbers` to `wanted` [B, H, T, D]."""
    best: Layout | None = None
    for split in _splits(numbers.shape, wanted.shape):
        reshaped = numbers.reshape(split)
        for perm in permutations(range(len(split))):
            moved = reshaped.transpose(perm)
            if not np.array_equal(moved.reshape(-1), wanted.reshape(-1)):
                continue
            symbols = _symbols(split, perm, wanted.shape)
            if symbols is None:
                continue
            cost = (split != numbers.shape) + (perm != tuple(range(len(split)))) + (moved.shape != wanted.shape)
            if best is None or cost < best.cost:
                best = Layout(symbols, perm, wanted.shape[1], wanted.shape[3], cost)
    return best


def _splits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """`shape` itself, or for three axes every way to divide one of them in two."""
    if 4 <= len(shape) <= 5:
        yield shape
    elif len(shape) == 3:
        for axis, size in enumerate(shape):
            for first in dict.fromkeys(wanted):
                if size % first == 0:
                    yield (*shape[:axis], first, size // first, *shape[axis + 1 :])


def _symbols(split: tuple[int, ...], perm: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int | str, ...] | None:
    """`split` with its batch and token axes named; None if an axis mixes them with another."""
    symbols: list[int | str] = list(split)
    axes = iter(perm)
    for name, size in zip("BHTD", wanted, strict=True):
        covered = 1
        while covered < size:
            axis = next(axes, None)
            if axis is None or size % (covered * split[axis]):
                return None
            covered *= split[axis]
            if name in "BT" and split[axis] > 1:
                if split[axis] != size:
                    return None
                symbols[axis] = name
    return tuple(symbols)


def _data_inputs(graph: DecoderGraph, node: ir.Node) -> list[ir.Value]:
    return [v for v in node.inputs if v is not None and graph.dependence(v) >= Dependence.PAST]
