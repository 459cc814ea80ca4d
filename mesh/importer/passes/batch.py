"""Let a graph that was exported for one row take any number of rows, as blocks do."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.graph.decoder import Dependence, Draft, Role, input_of
from mesh.importer.graph.edit import insert, new_constant

__all__ = ["free_batch"]


def free_batch(draft: Draft) -> bool:
    """Let a graph that was exported for one row take any number of rows. UnsupportedModel if it was exported for several.

    A Reshape of data to a shape that begins with one row keeps the number of rows of its input instead.
    """
    graph = draft.analysed()
    tokens = graph.input(Role.TOKENS)
    if tokens is None or tokens.shape is None or not isinstance(tokens.shape[0], int):
        return False
    if tokens.shape[0] != 1:
        raise UnsupportedModel(f"{graph.path}: exported for exactly {tokens.shape[0]} rows: export it with a dynamic batch, or for one row")
    for value in draft.roles:
        if value.shape is not None and len(value.shape) in (2, 4, 5):
            row = len(value.shape) - 4 if len(value.shape) > 2 else 0
            value.shape = ir.Shape(["batch" if axis == row and dim == 1 else dim for axis, dim in enumerate(value.shape)])
    for node in graph.nodes:
        if node.op_type not in ("Reshape", "Expand") or graph.dependence(input_of(node, 0)) < Dependence.PAST:
            continue
        target = input_of(node, 1)
        source = target.producer()
        if target.const_value is not None:
            dims = target.const_value.numpy().copy()
            if dims.size < 2 or dims[0] != 1 or node.op_type == "Expand":
                continue
            dims[0] = 0
            node.replace_input_with(1, new_constant(graph.model.graph, dims))
        elif source is not None and source.op_type == "Concat" and node.op_type == "Reshape" and _is_one(source.inputs[0]):
            (rest,) = insert(graph.model.graph, node, "Concat", new_constant(graph.model.graph, np.array([0])), *source.inputs[1:], axis=0)
            node.replace_input_with(1, rest)
        else:
            continue
        node.attributes.pop("allowzero", None)
    return True


def _is_one(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.numpy().reshape(-1).tolist() == [1]
