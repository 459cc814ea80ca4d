"""Find each layer's attention in a graph by its structure: the pattern that becomes cache writes and one Attention.

A pattern is what lies between the queries, keys and values of the new tokens and the weighted sum of the values. Three forms
are found: a Softmax between two MatMuls of data; the ONNX Attention operator; and com.microsoft's, which mesh/importer/passes/contrib.py
has made into the latter. How queries, keys and values are laid out (transposed, merged with the batch, repeated for grouped
queries, concatenated to a cache) is learned by sending numbered elements through the source's own nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.graph.decoder import DecoderGraph, Dependence, attribute, input_of, producer, scalar
from mesh.importer.graph.evaluate import NotConcrete
from mesh.importer.graph.probe import Probe
from mesh.importer.passes.contrib_attention import WINDOW

__all__ = ["AttentionPattern", "Layout", "Operand", "find_attention"]

Array = npt.NDArray[Any]

# operators that only move, repeat or select elements
LAYOUT_OPS = frozenset(
    ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Expand", "Tile", "Flatten", "Identity", "Cast", "Slice", "Split", "Gather")
)
# operators between the scores q @ k.T and the softmax, and between the softmax and @ v
SCORE_OPS = frozenset(
    (
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Where",
        "Cast",
        "Tanh",
        "Max",
        "Min",
        "Clip",
        "Reshape",
        "Transpose",
        "Unsqueeze",
        "Squeeze",
        "Identity",
        "Neg",
        "Flatten",
    )
)
# a chunk of 3 tokens for each of 2 rows after 5 cached ones: all different, and small
BATCH, CHUNK, PAST = 2, 3, 5


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


# (probe, scores [B, H, T, S] before scaling) -> what the softmax sees, same shape; where the heads are an axis of their own,
# scores [B, 1, T, S] may stand for those of every head
Scores = Callable[[Probe, Array], Array]


@dataclass(slots=True)
class AttentionPattern:
    """One attention. `output` is the value it replaces, of shape [B, H, T, Dv] but for leading axes merged or split."""

    number: int
    node: ir.Node  # the Softmax or Attention: names the pattern in errors
    output: ir.Value
    q: Operand
    k: Operand
    v: Operand
    scores: Scores
    mask_values: tuple[ir.Value, ...]  # values that depend on shapes only and enter the scores

    @property
    def heads(self) -> int:
        return self.q.layout.heads

    @property
    def kv_heads(self) -> int:
        return self.k.layout.heads

    @property
    def reads(self) -> tuple[ir.Value, ir.Value, ir.Value]:
        return self.q.value, self.k.value, self.v.value


def find_attention(graph: DecoderGraph) -> list[AttentionPattern]:
    """Every attention in the order of the layers. UnsupportedModel if there is none, or one of a form that is not known."""
    probe = Probe(graph, BATCH, CHUNK, PAST if graph.has_past else 0)
    patterns: list[AttentionPattern] = []
    for node in graph.nodes:
        if node.domain != "" or graph.dependence(node.outputs[0]) is not Dependence.TOKENS:
            continue
        if node.op_type == "Softmax":
            pattern = _softmax_pattern(graph, probe, node, len(patterns))
        elif node.op_type == "Attention":
            pattern = _operator_pattern(graph, probe, node, len(patterns))
        else:
            continue
        if pattern is not None:
            patterns.append(pattern)
    if not patterns:
        raise UnsupportedModel(
            f"{graph.path}: no attention was found: a decoder needs softmax(q @ k.T) @ v, Attention or GroupQueryAttention"
        )
    return patterns


def _data_inputs(graph: DecoderGraph, node: ir.Node) -> list[ir.Value]:
    return [v for v in node.inputs if v is not None and graph.dependence(v) >= Dependence.PAST]


# --- softmax(q @ k.T) @ v -----------------------------------------------------------------------------------------------


def _softmax_pattern(graph: DecoderGraph, probe: Probe, softmax: ir.Node, number: int) -> AttentionPattern | None:
    product = _scores_product(graph, input_of(softmax, 0))
    if product is None:
        return None
    weighted = _weighted_sum(graph, softmax.outputs[0])
    if weighted is None:
        raise UnsupportedModel(
            f"attention {number} ({softmax.name}): the softmax of the scores is not simply multiplied by the values "
            "(attention sinks, or weights used elsewhere): this form is not supported"
        )
    raw = product.outputs[0]
    shape = probe.shape(raw)
    heads = prod(shape[:-2]) // probe.batch
    q = _operand(graph, probe, input_of(product, 0), shape[:-2], heads, False, f"queries of attention {number}")
    k = _operand(graph, probe, input_of(product, 1), shape[:-2], heads, True, f"keys of attention {number}")
    v = _operand(
        graph, probe, input_of(weighted, 1), probe.shape(weighted.outputs[0])[:-2], heads, False, f"values of attention {number}", True
    )
    if v.scale != 1.0:
        raise UnsupportedModel(f"attention {number}: values are scaled by {v.scale} after the cache: this form is not supported")
    rank, into = len(shape), input_of(softmax, 0)

    def scores(at: Probe, values: Array) -> Array:
        rows, _, chunk, total = values.shape
        given = values if rank == 4 else np.broadcast_to(values, (rows, heads, chunk, total)).reshape(at.shape(raw))
        return np.reshape(at.derive({raw: given}).value(into), (rows, -1, chunk, total))

    _check_weights(probe, softmax, weighted, number)
    between = {value for node in _between(graph, into, raw) for value in node.inputs if value is not None}
    masks = tuple(v for v in between if graph.dependence(v) is Dependence.SHAPE)
    return AttentionPattern(number, softmax, weighted.outputs[0], q, k, v, _scaled(scores, q.scale * k.scale), masks)


def _scaled(scores: Scores, scale: float) -> Scores:
    """Scores of operands taken before their scaling."""
    return scores if scale == 1.0 else (lambda probe, values: scores(probe, (values * scale).astype(values.dtype)))


def _scores_product(graph: DecoderGraph, value: ir.Value) -> ir.Node | None:
    """The MatMul of two data values that `value` is computed from by element-wise steps alone."""
    while True:
        node = value.producer()
        if node is None or node.domain != "":
            return None
        data = [v for v in node.inputs if v is not None and graph.dependence(v) is Dependence.TOKENS]
        if node.op_type == "MatMul" and len(data) == 2:
            return node
        if node.op_type not in SCORE_OPS or len(data) != 1:
            return None
        value = data[0]


def _between(graph: DecoderGraph, value: ir.Value, start: ir.Value) -> Iterator[ir.Node]:
    while value is not start:
        node = producer(value)
        yield node
        value = next(v for v in node.inputs if v is not None and graph.dependence(v) is Dependence.TOKENS)


def _weighted_sum(graph: DecoderGraph, weights: ir.Value) -> ir.Node | None:
    """The MatMul by the values, past casts, reshapes and guards against NaN."""
    seen = {weights}
    frontier = [weights]
    found: ir.Node | None = None
    while frontier:
        for node, place in frontier.pop().uses():
            if node.op_type == "MatMul" and place == 0 and graph.dependence(input_of(node, 1)) is Dependence.TOKENS:
                if found is not None and found is not node:
                    return None
                found = node
            elif node.op_type in SCORE_OPS or node.op_type in ("IsNaN", "Not", "Dropout"):
                output = node.outputs[0]
                if output not in seen:
                    seen.add(output)
                    frontier.append(output)
            else:
                return None
    return found


def _check_weights(probe: Probe, softmax: ir.Node, weighted: ir.Node, number: int) -> None:
    """What the values are multiplied by is the softmax itself."""
    shape = probe.shape(softmax.outputs[0])
    weights = np.random.default_rng(0).random(shape, np.float32)
    got = np.asarray(probe.derive({softmax.outputs[0]: weights}).value(input_of(weighted, 0)), np.float32)
    axis = attribute(softmax, "axis", -1)
    if axis not in (-1, len(shape) - 1) or not np.allclose(got.reshape(-1), weights.reshape(-1), rtol=1e-2, atol=1e-6):
        raise UnsupportedModel(f"attention {number} ({softmax.name}): the attention weights are changed after the softmax: not supported")


# --- the Attention operator ---------------------------------------------------------------------------------------------


def _operator_pattern(graph: DecoderGraph, probe: Probe, node: ir.Node, number: int) -> AttentionPattern:
    inputs = [*node.inputs, *([None] * (7 - len(node.inputs)))]
    query, key, value = (input_of(node, place) for place in range(3))
    mask, past_key = inputs[3:5]
    where = f"attention {number} ({node.name})"
    if any(output.uses() for output in node.outputs[3:]):
        raise UnsupportedModel(f"{where}: its scores are used elsewhere: this form is not supported")
    if attribute(node, "qk_matmul_output_mode", 0) and len(node.outputs) > 3 and node.outputs[3].uses():
        raise UnsupportedModel(f"{where}: its scores are an output: this form is not supported")
    merged = len(probe.shape(query)) == 3
    shape = probe.shape(query)
    heads = int(attribute(node, "q_num_heads", 0)) if merged else shape[1]
    kv_heads = int(attribute(node, "kv_num_heads", 0)) if merged else probe.shape(key)[1]
    if not heads or not kv_heads or heads % kv_heads:
        raise UnsupportedModel(f"{where}: {heads} query heads do not divide into {kv_heads} key heads")
    q = _operand(graph, probe, query, None, heads, False, f"queries of {where}")
    k = _operand(graph, probe, key, None, kv_heads, False, f"keys of {where}", True, own_cache=past_key is not None)
    v = _operand(graph, probe, value, None, kv_heads, False, f"values of {where}", True, own_cache=past_key is not None)
    if v.scale != 1.0:
        raise UnsupportedModel(f"{where}: values are scaled by {v.scale} after the cache: this form is not supported")
    width = shape[-1] // heads if merged else shape[-1]
    scale = float(attribute(node, "scale", 0.0) or 0.0) or width**-0.5
    softcap, causal = float(attribute(node, "softcap", 0.0) or 0.0), bool(attribute(node, "is_causal", 0))
    offset = past_key is not None
    window = int(node.meta.get(WINDOW, 0))

    def scores(at: Probe, values: Array) -> Array:
        result = values * scale
        if softcap:
            result = np.tanh(result / softcap) * softcap
        chunk, total = result.shape[-2:]
        first = at.past if offset else 0
        rows, slots = np.arange(chunk)[:, None] + first, np.arange(total)[None, :]
        if mask is not None:
            bias = at.value(mask)
            result = np.where(bias, result, -np.inf) if bias.dtype == np.bool_ else result + bias
        if causal:
            result = np.where(slots <= rows, result, -np.inf)
        return np.where(slots > rows - window, result, -np.inf) if window else result

    masks = (mask,) if mask is not None and graph.dependence(mask) is Dependence.SHAPE else ()
    if mask is not None and graph.dependence(mask) > Dependence.SHAPE:
        raise UnsupportedModel(f"{where}: its mask depends on the tokens: this form is not supported")
    return AttentionPattern(number, node, node.outputs[0], q, k, v, _scaled(scores, q.scale * k.scale), masks)


# --- layouts ------------------------------------------------------------------------------------------------------------


def _operand(
    graph: DecoderGraph,
    probe: Probe,
    operand: ir.Value,
    leading: tuple[int, ...] | None,
    heads: int,
    transposed: bool,
    what: str,
    cached: bool | None = None,
    *,
    own_cache: bool = False,
) -> Operand:
    """The best value to take new tokens' q, k or v from, and its layout.

    leading: the axes before the last two of the product the operand takes part in; None for an operand of Attention.
    """
    cached = transposed if cached is None else cached
    best: tuple[tuple[int, int, int, int], Operand] | None = None
    seen_cache = not (cached and graph.has_past) or own_cache
    for depth, (value, scale, past) in enumerate(_walk(graph, probe, operand)):
        if past is not None:
            seen_cache, best = True, None  # only what is on the near side of the cache counts
        if not seen_cache:
            continue
        layout = _layout(probe, operand, value, scale, past, leading, heads, transposed)
        if layout is None:
            continue
        rank = (layout.heads, layout.cost, -int(scale != 1.0), depth)
        if best is None or rank < best[0]:
            best = rank, Operand(value, layout, scale)
    if best is None:
        detail = "" if seen_cache else ": they are not the past key or value followed by the new ones"
        raise UnsupportedModel(f"the {what} are not laid out in a way that is known{detail}")
    return best[1]


def _walk(graph: DecoderGraph, probe: Probe, value: ir.Value) -> Iterator[tuple[ir.Value, float, ir.Value | None]]:
    """`value` and what it is a mere rearrangement of, nearest first: (value, factor passed, cache it was joined to just now)."""
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


def _scalar(probe: Probe, value: ir.Value) -> float | None:
    number = scalar(value)
    if number is None and probe.graph.dependence(value) is Dependence.SHAPE:
        try:
            array = probe.value(value)
        except NotConcrete:
            return None
        number = float(array.reshape(())) if array.size == 1 else None
    return number or None


def _layout(
    probe: Probe,
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


def _match(probe: Probe, numbers: Array, wanted: Array) -> Layout | None:
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
