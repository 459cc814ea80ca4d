"""Bring a graph of any opset from 11 on to opset 24, and take out branches whose condition never varies.

Only what changed its form between the opsets is rewritten; onnx's own converter wants the weights in memory and knows no
contrib operators.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from mesh.errors import UnsupportedModel

__all__ = ["OLDEST", "convert_opset", "inline_branch", "new_constant"]

OLDEST = 11
NEWEST = 24

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


def convert_opset(model: ir.Model) -> None:
    """Rewrite the nodes of the default domain, in place. UnsupportedModel for an opset out of range."""
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))
    if not opset >= OLDEST:
        raise UnsupportedModel(f"the model is of ONNX opset {opset}: export it with an opset of {OLDEST} to {NEWEST}")
    if opset > NEWEST:
        raise UnsupportedModel(f"the model is of ONNX opset {opset}, newer than {NEWEST}: export it with an opset of {OLDEST} to {NEWEST}")
    for graph in (model.graph, *model.graph.subgraphs()):
        for node in list(graph):
            if node.domain in ("", "ai.onnx"):
                node.domain = ""
                _convert(graph, node, opset)
                node.version = NEWEST
    model.opset_imports[""] = NEWEST
    model.ir_version = max(model.ir_version, 12)


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
    """Before 13 the input was flattened to two dimensions at `axis`; over the last axis that is the same thing."""
    axis = node.attributes["axis"].value if "axis" in node.attributes else 1
    value = node.inputs[0]
    rank = len(value.shape) if value is not None and value.shape is not None else None
    if axis == -1 or (rank is not None and axis == rank - 1):
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        return
    shape, flat = ir.node("Shape", [value], version=NEWEST), ir.node("Flatten", [value], attributes={"axis": axis}, version=NEWEST)
    inner = ir.node(node.op_type, [flat.outputs[0]], attributes={"axis": -1}, version=NEWEST)
    back = ir.node("Reshape", [inner.outputs[0], shape.outputs[0]], version=NEWEST)
    graph.insert_before(node, [shape, flat, inner, back])
    back.outputs[0].name = None
    ir.convenience.replace_all_uses_with(node.outputs[0], back.outputs[0], replace_graph_outputs=True)
    graph.remove(node, safe=True)


def _set_input(node: ir.Node, place: int, value: ir.Value) -> None:
    if len(node.inputs) <= place:
        node.resize_inputs(place + 1)
    node.replace_input_with(place, value)


def new_constant(graph: ir.Graph, array: np.ndarray) -> ir.Value:
    """A new initializer of `graph`."""
    number = len(graph.initializers)
    while f"constant_{number}" in graph.initializers:
        number += 1
    value = ir.Value(
        name=f"constant_{number}",
        const_value=ir.tensor(array),
        shape=ir.Shape(array.shape),
        type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
    )
    graph.register_initializer(value)
    return value


def inline_branch(model: ir.Model, node: ir.Node, taken: bool) -> None:
    """Replace the If `node` by its then or else branch."""
    branch = node.attributes["then_branch" if taken else "else_branch"].value
    outputs = list(branch.outputs)
    graph = model.graph
    for name, value in list(branch.initializers.items()):
        del branch.initializers[name]
        value.name = f"{name}__{len(graph.initializers)}" if name in graph.initializers else name
        graph.register_initializer(value)
    nodes: Iterable[ir.Node] = list(branch)
    branch.remove(nodes)
    while len(branch.outputs):
        branch.outputs.pop()
    graph.insert_before(node, nodes)
    for old, new in zip(node.outputs, outputs, strict=True):
        named = old.is_graph_output()
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        if named:  # the oracle knows it by its name
            old.name, new.name = f"{old.name}__replaced", old.name
    graph.remove(node, safe=True)
