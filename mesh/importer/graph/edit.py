"""Small changes to a graph that several passes make: a new node, a new constant, a branch in place of its If."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir

from mesh.model.onnx_form import OPSET

__all__ = ["inline_branch", "insert", "new_constant"]


def insert(graph: ir.Graph, at: ir.Node, op_type: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> list[ir.Value]:
    """Put a node of the default domain in front of `at`, named after it. Attributes that are None are left out. Returns its outputs."""
    given = {name: value for name, value in attributes.items() if value is not None}
    node = ir.node(op_type, list(inputs), attributes=given, num_outputs=outputs, version=OPSET)
    node.name = f"{at.name}/{op_type}" if at.name else None
    graph.insert_before(at, node)
    return list(node.outputs)


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
    """Replace the If `node` by its then branch (`taken`) or its else branch. Outputs of the graph keep their names."""
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
        if named:  # onnxruntime knows the output by its name
            old.name, new.name = f"{old.name}__replaced", old.name
    graph.remove(node, safe=True)
