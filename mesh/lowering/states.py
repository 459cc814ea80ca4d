"""The part of a head before its product with the vocabulary: what makes the last hidden state of a model, after the final norm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mesh.lowering.lower import Lowered
from mesh.lowering.operands import RightOperand
from mesh.lowering.prepare import Graph, GraphNode, with_nodes

__all__ = ["before_vocabulary"]


def before_vocabulary(lowered: Lowered, graph: Graph, operands: Mapping[str, RightOperand], vocabulary: int) -> Graph | None:
    """The part of the head `graph`, in which the right operands of products have the names of `operands`, up to the left operand of the
    product that makes `vocabulary` numbers. None: it has no such product, or several."""

    def width(node: GraphNode) -> int:
        if (node.op.domain, node.op.op_type) == ("", "MatMul"):
            return operands[node.inputs[1]].out if node.inputs[1] in operands else 0
        if (node.op.domain, node.op.op_type) == ("", "Gemm") and node.inputs[1] in lowered.weights:
            shape: Any = lowered.weights[node.inputs[1]].shape
            return int(shape[0 if node.attributes.get("transB") else 1])
        return 0

    products = [node for node in graph.nodes if width(node) == vocabulary]
    return with_nodes(replace(graph, outputs=(products[0].inputs[0],)), graph.nodes) if len(products) == 1 else None
