"""Several products of one input become one: q, k and v; gate and up.

The time of a decode step of one row is the time to read the weights once, and every product is a call with its own start and end. If
several MatMuls have the same left operand and a weight each, one MatMul with the weights side by side, followed by a Split, reads the
same bytes in fewer, longer calls. Each column is summed as before.

    x --> MatMul(q) -->            x --> MatMul(q|k|v) --> Split -->
    x --> MatMul(k) -->    ==>                                   -->
    x --> MatMul(v) -->                                          -->

The weights must be stored in the same way. Kernels need no joining: they take several weights in one call (mesh/lowering/fuse.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mesh.lowering import registry
from mesh.lowering.operands import RightOperand
from mesh.lowering.prepare import Graph, GraphNode, with_last_use
from mesh.model.onnx_form import OPSET

__all__ = ["join_products"]


def join_products(
    graph: Graph, operands: Mapping[str, RightOperand], kind: Callable[[RightOperand], Any]
) -> tuple[Graph, dict[str, tuple[str, ...]]]:
    """(the graph after joining, and for each weight in it the names of the operands that lie side by side in it, in order).

    `kind`: how an operand is stored; operands of equal kind and depth may be joined.
    """
    together: dict[Any, list[int]] = defaultdict(list)
    for index, node in enumerate(graph.nodes):
        if _is_product(node, operands):
            operand = operands[node.inputs[1]]
            together[node.inputs[0], operand.depth, kind(operand)].append(index)
    parts: dict[str, tuple[str, ...]] = {name: (name,) for name in operands}
    nodes: list[GraphNode | None] = list(graph.nodes)
    constants = dict(graph.constants)
    placed: dict[int, tuple[GraphNode, ...]] = {}
    for indices in together.values():
        if len(indices) < 2:
            continue
        products = [graph.nodes[index] for index in indices]
        names = tuple(product.inputs[1] for product in products)
        joined = "|".join(names)
        for name in names:
            del parts[name]
        parts[joined] = names
        placed[indices[0]] = _joined(products, joined, [operands[name].out for name in names], constants)
        for index in indices:
            nodes[index] = None
    kept = (placed.get(index, () if node is None else (node,)) for index, node in enumerate(nodes))
    flat = tuple(node for group in kept for node in group)
    return with_last_use(Graph(graph.inputs, graph.outputs, flat, constants)), parts


def _is_product(node: GraphNode, operands: Mapping[str, RightOperand]) -> bool:
    return (node.op.domain, node.op.op_type) == ("", "MatMul") and node.inputs[1] in operands


def _joined(products: list[GraphNode], weight: str, widths: list[int], constants: dict[str, Any]) -> tuple[GraphNode, GraphNode]:
    split = registry.find("Split", "", OPSET)
    assert split is not None
    outputs = tuple(node.outputs[0] for node in products)
    product, sizes = "|".join(outputs), "|".join(("sizes", *outputs))
    constants[sizes] = np.array(widths, np.int64)
    return (
        replace(products[0], inputs=(products[0].inputs[0], weight), outputs=(product,)),
        GraphNode("", split, (product, sizes), outputs, {"axis": -1}, "Split"),
    )
