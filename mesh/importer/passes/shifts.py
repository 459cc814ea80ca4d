"""Remove the subtraction of the highest score in front of a softmax: the softmax is the same without it."""

from __future__ import annotations

import onnx_ir as ir

from mesh.importer.graph.decoder import Dependence, Draft, attribute, input_of
from mesh.importer.graph.probe import GraphProbe

__all__ = ["drop_shifts"]


def drop_shifts(draft: Draft) -> bool:
    """Softmax(x - ReduceMax(x)) over the last axis becomes Softmax(x)."""
    softmaxes = [
        node for node in draft.model.graph if node.domain == "" and node.op_type == "Softmax" and attribute(node, "axis", -1) == -1
    ]
    shifted = [node for node in softmaxes if _difference(input_of(node, 0)) is not None]
    if not shifted:
        return False
    graph = draft.analysed()
    probe = GraphProbe(graph, 2, 3, 4 if graph.has_past else 0)
    changed = False
    for node in shifted:
        x, highest = _difference(input_of(node, 0)) or (None, None)
        if x is not None and highest is not None and _of_last_axis(probe, highest):
            node.replace_input_with(0, x)
            changed = True
    return changed


def _difference(value: ir.Value) -> tuple[ir.Value, ir.Node] | None:
    """(x, the ReduceMax of x) where `value` is the difference of the two."""
    difference = value.producer()
    if difference is None or (difference.domain, difference.op_type) != ("", "Sub"):
        return None
    x, highest = input_of(difference, 0), input_of(difference, 1).producer()
    if highest is None or highest.op_type != "ReduceMax" or highest.inputs[0] is not x or not attribute(highest, "keepdims", 1):
        return None
    return x, highest


def _of_last_axis(probe: GraphProbe, highest: ir.Node) -> bool:
    axes = highest.inputs[1] if len(highest.inputs) > 1 else None
    return axes is not None and probe.graph.dependence(axes) is Dependence.CONSTANT and probe.value(axes).tolist() == [-1]
