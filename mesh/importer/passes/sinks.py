"""Bring attention sinks that are written as a factor to the form of one more logit.

softmax(x) @ v * sigmoid(logsumexp(x) - sink)   is   softmax(x, sink) without its last column, @ v
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mesh.importer.graph.decoder import Draft, attribute, input_of
from mesh.importer.graph.edit import insert, new_constant

__all__ = ["append_sinks"]


def append_sinks(draft: Draft) -> bool:
    """Rewrite each such factor; the softmax takes the sink of its head as one more score."""
    graph, changed = draft.model.graph, False
    for node in list(graph):
        if (node.domain, node.op_type) == ("", "Mul"):
            for product, factor in ((node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])):
                if product is not None and factor is not None and _rewritten(graph, node, product, factor):
                    changed = True
                    break
    return changed


def _rewritten(graph: ir.Graph, at: ir.Node, product: ir.Value, factor: ir.Value) -> bool:
    weighted, sigmoid = product.producer(), _maker(factor, "Sigmoid")
    difference = None if sigmoid is None else _maker(input_of(sigmoid, 0), "Sub")
    total = None if difference is None else _maker(input_of(difference, 0), "ReduceLogSumExp")
    if weighted is None or weighted.op_type != "MatMul" or difference is None or total is None or attribute(total, "keepdims", 1):
        return False
    scores, softmax = input_of(total, 0), _maker(input_of(weighted, 0), "Softmax")
    if softmax is None or softmax.inputs[0] is not scores:
        return False
    last, first = new_constant(graph, np.array([-1])), new_constant(graph, np.array([0]))
    size = insert(graph, at, "Concat", *insert(graph, at, "Shape", scores, start=0, end=-1), new_constant(graph, np.array([1])), axis=0)
    column = insert(graph, at, "Expand", *insert(graph, at, "Unsqueeze", input_of(difference, 1), last), *size)
    joined = insert(graph, at, "Concat", scores, *column, axis=-1)
    weights = softmax.outputs[0]
    users = [(user, place) for user, place in weights.uses()]
    (kept,) = insert(graph, at, "Slice", weights, first, last, last)
    softmax.replace_input_with(0, joined[0])
    for user, place in users:
        user.replace_input_with(place, kept)
    ir.convenience.replace_all_uses_with(at.outputs[0], product)
    graph.sort()
    return True


def _maker(value: ir.Value, op_type: str) -> ir.Node | None:
    """The node of that type that makes the value, past casts and further axes."""
    node = value.producer()
    while node is not None and node.op_type in ("Cast", "Unsqueeze"):
        node = input_of(node, 0).producer()
    return node if node is not None and (node.domain, node.op_type) == ("", op_type) else None
