"""Bring a graph of any opset from 11 on to opset 24.

Only operators whose form changed between the opsets are rewritten. docs/adr/0006-opset-conversion.md says why onnx's own
converter is not used.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.graph.decoder import Draft
from mesh.importer.graph.edit import new_constant
from mesh.model.onnx_form import IR_VERSION, OPSET

__all__ = ["OLDEST", "convert_opset"]

OLDEST = 11

# attribute of the old form -> (first opset of the new form, place among the inputs)
AXES_INPUT = {
    "Squeeze": 13,
    "Unsqueeze": 13,
    "ReduceSum": 13,
    **dict.fromkeys(
        (
            "ReduceMean",
            "ReduceMax",
            "ReduceMin",
            "ReduceProd",
            "ReduceL1",
            "ReduceL2",
            "ReduceLogSum",
            "ReduceLogSumExp",
            "ReduceSumSquare",
        ),
        18,
    ),
}
SOFTMAX_LIKE = ("Softmax", "LogSoftmax", "Hardmax")


def convert_opset(draft: Draft) -> bool:
    """Rewrite the nodes of the default domain. UnsupportedModel for an opset out of range."""
    model = draft.model
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
    if not opset >= OLDEST:
        raise UnsupportedModel(f"the model is of ONNX opset {opset}: export it with an opset of {OLDEST} to {OPSET}")
    if opset > OPSET:
        raise UnsupportedModel(f"the model is of ONNX opset {opset}, newer than {OPSET}: export it with an opset of {OLDEST} to {OPSET}")
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in list(graph):
            if node.domain in ("", "ai.onnx"):
                node.domain = ""
                _convert(graph, node, opset)
                node.version = OPSET
    model.opset_imports[""] = OPSET
    model.ir_version = max(model.ir_version, IR_VERSION)
    return True


def _convert(graph: ir.Graph, node: ir.Node, opset: int) -> None:
    if node.op_type == "Scatter":
        node.op_type = "ScatterElements"
    since = AXES_INPUT.get(node.op_type)
    if since is not None and opset < since and "axes" in node.attributes:
        axes = node.attributes.pop("axes").value
        _set_input(node, 1, new_constant(graph, np.asarray(axes, np.int64)))
    elif node.op_type == "Split" and opset < 18:
        if opset < 13 and "split" in node.attributes:
            _set_input(node, 1, new_constant(graph, np.asarray(node.attributes.pop("split").value, np.int64)))
        if len(node.inputs) < 2 or node.inputs[1] is None:
            node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
    elif node.op_type in SOFTMAX_LIKE and opset < 13:
        _convert_softmax(graph, node)


def _convert_softmax(graph: ir.Graph, node: ir.Node) -> None:
    """Before opset 13 the input was flattened to two dimensions at `axis`. Only over the last axis is that what it is today."""
    axis = node.attributes["axis"].value if "axis" in node.attributes else 1
    value = node.inputs[0]
    rank = len(value.shape) if value is not None and value.shape is not None else None
    if axis == -1 or (rank is not None and axis == rank - 1):
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        return
    shape, flat = ir.node("Shape", [value], version=OPSET), ir.node("Flatten", [value], attributes={"axis": axis}, version=OPSET)
    inner = ir.node(node.op_type, [flat.outputs[0]], attributes={"axis": -1}, version=OPSET)
    back = ir.node("Reshape", [inner.outputs[0], shape.outputs[0]], version=OPSET)
    graph.insert_before(node, [shape, flat, inner, back])
    back.outputs[0].name = None
    ir.convenience.replace_all_uses_with(node.outputs[0], back.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _set_input(node: ir.Node, place: int, value: ir.Value) -> None:
    if len(node.inputs) <= place:
        node.resize_inputs(place + 1)
    node.replace_input_with(place, value)
