"""Recognise blocks that are the same program except for their weights.

The layers of a decoder differ in their weights and in the names that their exporter invented. Here names are replaced by the order of
appearance, and every vector of numbers becomes an argument of the program instead of a constant in it. Equal layers then become equal
graphs, and one compiled program serves all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mesh.lowering import Lowered
from mesh.lowering.prepare import Graph, GraphNode

__all__ = ["canonical"]

_ARGUMENT_ELEMENTS = 16
"""Float constants of at least this many elements are weights (norms, biases); smaller ones are part of the computation."""


def canonical(lowered: Lowered) -> tuple[str, Lowered]:
    """(signature, the same block under canonical names). Blocks of equal signature differ only in the numbers of their weights."""
    graph = lowered.graph
    promoted = {
        name: value
        for name, value in graph.constants.items()
        if value.size >= _ARGUMENT_ELEMENTS and value.dtype != object and np.issubdtype(value.dtype, np.inexact)
    }
    weights = {**lowered.weights, **promoted}
    names: dict[str, str] = {name: name for name in (*graph.inputs, *graph.outputs, "")}

    def rename(name: str) -> str:
        return names.setdefault(name, f"v{len(names)}")

    nodes = tuple(
        replace(node, name="", label=node.op.op_type, inputs=tuple(map(rename, node.inputs)), outputs=tuple(map(rename, node.outputs)))
        for node in graph.nodes
    )
    constants = {rename(name): value for name, value in graph.constants.items() if name not in promoted}
    last_use = {index: tuple(map(rename, used)) for index, used in graph.last_use.items()}
    renamed = Lowered(
        Graph(graph.inputs, graph.outputs, nodes, constants, last_use),
        {rename(name): value for name, value in weights.items()},
        {rename(name): layout for name, layout in lowered.packed.items()},
        lowered.static_inputs,
    )
    return _signature(renamed), renamed


def _signature(lowered: Lowered) -> str:
    digest = hashlib.sha256()

    def add(*parts: Any) -> None:
        for part in parts:
            if isinstance(part, np.ndarray):
                add(part.dtype.str, part.shape)
                digest.update(part.tobytes() if part.dtype != object else repr(part.tolist()).encode())
            elif isinstance(part, Mapping):
                for key in sorted(part):
                    add(key, part[key])
            else:
                digest.update(repr(part).encode() + b"\0")

    add(lowered.graph.inputs, lowered.graph.outputs)
    for node in lowered.graph.nodes:
        add(node.op.domain, node.op.op_type, node.op.since, node.inputs, node.outputs, _attributes(node))
    add(lowered.graph.constants, lowered.packed)
    for name in sorted(lowered.weights):
        add(name, lowered.weights[name].dtype.name, lowered.weights[name].shape)
    return digest.hexdigest()


def _attributes(node: GraphNode) -> dict[str, Any]:
    return dict(node.attributes)
