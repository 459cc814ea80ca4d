"""Find each layer's attention in a graph by its structure: the pattern that becomes cache writes and one Attention.

A pattern is what lies between the queries, keys and values of the new tokens and the weighted sum of the values. Three forms
are found: a Softmax between two MatMuls of data; the ONNX Attention operator; and those of com.microsoft, which
mesh/importer/passes/contrib_attention.py has rewritten as the ONNX operator. layout.py finds how queries, keys and values are laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.analysis.layout import Operand, find_operand
from mesh.importer.graph.decoder import DecoderGraph, Dependence, attribute, input_of, producer
from mesh.importer.graph.probe import GraphProbe
from mesh.importer.passes.contrib_attention import WINDOW

__all__ = ["AttentionPattern", "find_attention"]

Array = npt.NDArray[Any]

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


# (probe, scores [B, H, T, S] before scaling) -> what the softmax sees, same shape; where the heads are an axis of their own,
# scores [B, 1, T, S] may stand for those of every head
Scores = Callable[[GraphProbe, Array], Array]


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
    sinks: Array | None = None  # [H]: for each head one more logit of the softmax, which takes its share and has no value

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
    probe = GraphProbe(graph, BATCH, CHUNK, PAST if graph.has_past else 0)
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
    if not patterns and not graph.states:
        raise UnsupportedModel(
            f"{graph.path}: no attention was found: a decoder needs softmax(q @ k.T) @ v, Attention or GroupQueryAttention"
        )
    return patterns


# --- softmax(q @ k.T) @ v -----------------------------------------------------------------------------------------------


def _softmax_pattern(graph: DecoderGraph, probe: GraphProbe, softmax: ir.Node, number: int) -> AttentionPattern | None:
    into, column = _before_sinks(graph, input_of(softmax, 0))
    product = _scores_product(graph, into)
    if product is None:
        return None
    weighted = _weighted_sum(graph, softmax.outputs[0])
    if weighted is None:
        raise UnsupportedModel(
            f"attention {number} ({softmax.name}): the softmax of the scores is not simply multiplied by the values "
            "(weights used elsewhere, or an unknown form of attention sinks): this form is not supported"
        )
    raw = product.outputs[0]
    shape = probe.shape(raw)
    heads = prod(shape[:-2]) // probe.batch
    q = find_operand(graph, probe, input_of(product, 0), shape[:-2], heads, False, f"queries of attention {number}")

    def keys(as_many: int | None) -> Operand:
        what = f"keys of attention {number}"
        return find_operand(graph, probe, input_of(product, 1), shape[:-2], heads, True, what, as_many=as_many)

    def values(as_many: int | None) -> Operand:
        leading, what = probe.shape(weighted.outputs[0])[:-2], f"values of attention {number}"
        return find_operand(graph, probe, input_of(weighted, 1), leading, heads, False, what, True, scores=False, as_many=as_many)

    k, v = keys(None), values(None)
    if k.layout.heads != v.layout.heads:  # one of the two was repeated before it was cached: the cache has one number of heads
        most = max(k.layout.heads, v.layout.heads)
        k, v = keys(most), values(most)
    rank = len(shape)

    def scores(at: GraphProbe, numbers: Array) -> Array:
        rows, _, chunk, total = numbers.shape
        given = numbers if rank == 4 else np.broadcast_to(numbers, (rows, heads, chunk, total)).reshape(at.shape(raw))
        return np.reshape(at.derive({raw: given}).value(into), (rows, -1, chunk, total))

    sinks = None if column is None else _sinks(probe, column, heads, number)
    _check_weights(probe, softmax, weighted, number, sunk=sinks is not None)
    between = {value for node in _between(graph, into, raw) for value in node.inputs if value is not None}
    masks = tuple(v for v in between if graph.dependence(v) is Dependence.SHAPE)
    return AttentionPattern(number, softmax, weighted.outputs[0], q, k, v, _scaled(scores, q.scale * k.scale), masks, sinks)


def _before_sinks(graph: DecoderGraph, value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """The scores that a softmax takes, and the column of sinks that is appended to them, if there is one."""
    current = value
    while (node := current.producer()) is not None and node.op_type in ("Cast", "Identity"):
        current = input_of(node, 0)
    if node is None or node.op_type != "Concat" or len(node.inputs) != 2:
        return value, None
    scores, column = input_of(node, 0), input_of(node, 1)
    learned = graph.dependence(scores) is Dependence.TOKENS and graph.dependence(column) is not Dependence.TOKENS
    return (scores, column) if learned else (value, None)


def _sinks(probe: GraphProbe, column: ir.Value, heads: int, number: int) -> Array:
    """The sink of each head [H]. UnsupportedModel where it is not one number a head."""
    values = probe.value(column)
    shape = (probe.batch, heads, probe.chunk, 1)
    if values.ndim != 4 or values.shape[-1] != 1 or not np.array_equal(values, np.broadcast_to(values[:1, :, :1], values.shape)):
        raise UnsupportedModel(f"attention {number}: its sinks of shape {list(values.shape)} are not one number a head: not supported")
    return np.asarray(np.broadcast_to(values, shape)[0, :, 0, 0], np.float32)


def _scaled(scores: Scores, scale: float) -> Scores:
    """The scores function for operands that are taken before they are scaled by `scale`."""
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
            elif node.op_type in SCORE_OPS or node.op_type in ("IsNaN", "Not", "Dropout", "Slice"):
                output = node.outputs[0]
                if output not in seen:
                    seen.add(output)
                    frontier.append(output)
            else:
                return None
    return found


def _check_weights(probe: GraphProbe, softmax: ir.Node, weighted: ir.Node, number: int, *, sunk: bool) -> None:
    """Check that the values are multiplied by the softmax itself; by all but its last column where that is a sink's (`sunk`)."""
    shape = probe.shape(softmax.outputs[0])
    weights = np.random.default_rng(0).random(shape, np.float32)
    got = np.asarray(probe.derive({softmax.outputs[0]: weights}).value(input_of(weighted, 0)), np.float32)
    axis, kept = attribute(softmax, "axis", -1), (weights[..., :-1] if sunk else weights).reshape(-1)
    if axis not in (-1, len(shape) - 1) or got.size != kept.size or not np.allclose(got.reshape(-1), kept, rtol=1e-2, atol=1e-6):
        raise UnsupportedModel(f"attention {number} ({softmax.name}): the attention weights are changed after the softmax: not supported")


# --- the Attention operator ---------------------------------------------------------------------------------------------


def _operator_pattern(graph: DecoderGraph, probe: GraphProbe, node: ir.Node, number: int) -> AttentionPattern:
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
    q = find_operand(graph, probe, query, None, heads, False, f"queries of {where}")
    k = find_operand(graph, probe, key, None, kv_heads, False, f"keys of {where}", True, own_cache=past_key is not None)
    v = find_operand(graph, probe, value, None, kv_heads, False, f"values of {where}", True, own_cache=past_key is not None, scores=False)
    width = shape[-1] // heads if merged else shape[-1]
    scale = float(attribute(node, "scale", 0.0) or 0.0) or width**-0.5
    softcap, causal = float(attribute(node, "softcap", 0.0) or 0.0), bool(attribute(node, "is_causal", 0))
    offset = past_key is not None
    window = int(node.meta.get(WINDOW, 0))

    def scores(at: GraphProbe, values: Array) -> Array:
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
