"""Several products of one input become one: q, k and v; gate and up.

The time of a decode step of one row is the time to read the weights once, and every product is a call with its own start and end. If
several MatMuls have the same left operand and a weight each, one MatMul with the weights side by side, followed by a Split, reads the
same bytes in fewer, longer calls. Each column is summed as before.

    x --> MatMul(q) -->            x --> MatMul(q|k|v) --> Split -->
    x --> MatMul(k) -->    ==>                                   -->
    x --> MatMul(v) -->                                          -->

The weights must go through the same ops before the product: none, a Cast, or a DequantizeLinear with a scale for each output.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mesh.lowering import registry
from mesh.lowering.lower import Lowered
from mesh.lowering.prepare import Graph, GraphNode, with_last_use
from mesh.model.onnx_form import OPSET

__all__ = ["join_products"]


@dataclass(frozen=True)
class _Product:
    """A MatMul that may be joined: its place, its weight, and the op between the two if there is one."""

    index: int
    weight: str
    through: GraphNode | None


def join_products(lowered: Lowered, packable: Set[str]) -> tuple[Graph, dict[str, tuple[str, ...]]]:
    """(the graph after joining, and for each new weight the names of the weights that lie side by side in it, in order).

    `packable`: weights [in, out] that only MatMuls read. Scales and zero points [..., out] that are weights are joined as well.
    """
    graph = lowered.graph
    uses = Counter(name for node in graph.nodes for name in node.inputs)
    made_by = {name: node for node in graph.nodes for name in node.outputs}
    together: dict[Any, list[_Product]] = defaultdict(list)
    for index, node in enumerate(graph.nodes):
        if (node.op.domain, node.op.op_type) == ("", "MatMul") and uses[node.inputs[1]] == 1:
            through = made_by.get(node.inputs[1])
            weight = node.inputs[1] if through is None else through.inputs[0]
            if weight in packable and uses[weight] == 1:
                kind = _kind(lowered, weight, through, uses)
                if kind is not None:
                    together[node.inputs[0], kind].append(_Product(index, weight, through))
    return _rewrite(lowered, [products for products in together.values() if len(products) > 1])


def _shape(lowered: Lowered, name: str) -> tuple[int, ...]:
    if name in lowered.packed:
        return tuple(lowered.packed[name].shape)
    return tuple((lowered.weights[name] if name in lowered.weights else lowered.graph.constants[name]).shape)


def _kind(lowered: Lowered, weight: str, through: GraphNode | None, uses: Mapping[str, int]) -> Any:
    """What two products must have in common to be joined: everything but the left operand and the number of outputs. None: not joined."""
    depth, out = _shape(lowered, weight)
    stored = (depth, lowered.weights[weight].dtype, lowered.packed[weight].signed if weight in lowered.packed else None)
    if through is None:
        return stored
    extras = []
    for name in through.inputs[1:]:
        array = lowered.weights.get(name, lowered.graph.constants.get(name))
        if array is None or name in lowered.packed or uses[name] != 1 or array.shape[-1:] != (out,):
            return None
        extras.append((name in lowered.weights, array.dtype, array.shape[:-1]))
    return (*stored, through.op.op_type, through.op.since, repr(sorted(through.attributes.items())), *extras)


def _rewrite(lowered: Lowered, groups: list[list[_Product]]) -> tuple[Graph, dict[str, tuple[str, ...]]]:
    graph = lowered.graph
    split = registry.find("Split", "", OPSET)
    assert split is not None
    constants = dict(graph.constants)
    parts: dict[str, tuple[str, ...]] = {}
    dropped: set[int] = set()
    placed: dict[int, tuple[GraphNode, ...]] = {}
    place = {id(node): index for index, node in enumerate(graph.nodes)}

    def side_by_side(names: tuple[str, ...]) -> str:
        joined = "|".join(names)
        if names[0] in lowered.weights:
            parts[joined] = names
        else:
            constants[joined] = np.concatenate([constants.pop(name) for name in names], axis=-1)
        return joined

    for products in groups:
        nodes = [graph.nodes[product.index] for product in products]
        weights = tuple(product.weight for product in products)
        outputs = tuple(node.outputs[0] for node in nodes)
        right = side_by_side(weights)
        before: tuple[GraphNode, ...] = ()
        throughs = [product.through for product in products if product.through is not None]
        if throughs:
            extras = (side_by_side(names) for names in zip(*(node.inputs[1:] for node in throughs), strict=True))
            before = (replace(throughs[0], inputs=(right, *extras), outputs=("|".join(node.outputs[0] for node in throughs),)),)
            right = before[0].outputs[0]
            dropped.update(place[id(node)] for node in throughs)
        product, sizes = "|".join(outputs), "|".join(("sizes", *outputs))
        constants[sizes] = np.array([_shape(lowered, weight)[1] for weight in weights], np.int64)
        placed[products[0].index] = (
            *before,
            replace(nodes[0], inputs=(nodes[0].inputs[0], right), outputs=(product,)),
            GraphNode("", split, (product, sizes), outputs, {"axis": -1}, "Split"),
        )
        dropped.update(product.index for product in products)
    kept = (placed.get(index, () if index in dropped else (node,)) for index, node in enumerate(graph.nodes))
    return with_last_use(Graph(graph.inputs, graph.outputs, tuple(node for nodes in kept for node in nodes), constants)), parts
