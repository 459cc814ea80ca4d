"""Make experts static that were exported as a loop over tokens chosen by NonZero, so that a compiler can take them.

    where(mask[e]) -> rows; y = expert_e(x[rows]) * weight[rows]; out.index_add(rows, y)

becomes the same over every element of the mask, chosen or not, with y multiplied by the mask before it is added. What lies
between is computed row by row, so rows that were not chosen add nothing. It costs arithmetic, not weights: each expert is
applied to all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.graph.decoder import DecoderGraph, Dependence, Draft, attribute, constant, input_of, producer
from mesh.importer.graph.edit import insert, new_constant
from mesh.importer.graph.evaluate import NotConcrete
from mesh.importer.graph.probe import GraphProbe

__all__ = ["make_experts_static", "mask_chosen_rows"]

SCATTERS = ("ScatterElements", "ScatterND")
MASK = "mesh.mask"  # in the meta of the node that gives all indices of a mask: the mask


def make_experts_static(draft: Draft) -> bool:
    """Replace every NonZero of data by all indices of its input, unless another NonZero has chosen that input."""
    graph = draft.analysed()
    past = (4, 7) if graph.has_past else (0, 0)
    probes = [GraphProbe(graph, rows, chunk, before) for (rows, chunk), before in zip(((2, 3), (3, 5)), past, strict=True)]
    found, blocked = False, ""
    for node in graph.nodes:
        if node.op_type != "NonZero" or node.domain != "" or graph.dependence(input_of(node, 0)) is not Dependence.TOKENS:
            continue
        mask = input_of(node, 0)
        try:
            shapes = [probe.shape(mask) for probe in probes]
        except NotConcrete:
            blocked = blocked or str(node.name)
            continue
        if shapes[0] == shapes[1]:
            indices = np.indices(shapes[0]).reshape(len(shapes[0]), -1).astype(np.int64)
            grid = new_constant(graph.model.graph, indices[:, : _traced(node, indices.shape[1])])
        else:
            grid = _all_indices(graph, node, mask, len(shapes[0]))
            producer(grid).meta[MASK] = mask
        ir.convenience.replace_all_uses_with(node.outputs[0], grid)
        graph.model.graph.remove(node, safe=True)
        found = True
    if blocked and not found:
        raise UnsupportedModel(f"node {blocked} (NonZero) chooses among what was chosen by the tokens: not supported")
    return found


def _traced(node: ir.Node, most: int) -> int:
    """How many of the indices the graph uses: a traced loop over the experts in use has one turn for each expert."""
    frontier = [node]
    while frontier:
        for follower, _ in frontier.pop().outputs[0].uses():
            if follower.op_type == "Transpose":
                frontier.append(follower)
            elif follower.op_type == "Split" and len(follower.inputs) > 1:
                sizes = constant(follower.inputs[1])
                total = int(sizes.sum()) if sizes is not None else most
                if len(follower.outputs) == total < most:
                    return total
    return most


def _op(graph: DecoderGraph, at: ir.Node, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
    return insert(graph.model.graph, at, op_type, *inputs, **attributes)[0]


def _all_indices(graph: DecoderGraph, at: ir.Node, mask: ir.Value, rank: int) -> ir.Value:
    """int64 [rank, size]: what NonZero gives for a mask of ones."""
    constants = {number: new_constant(graph.model.graph, np.array(number)) for number in (0, 1)}
    first = new_constant(graph.model.graph, np.array([0]))
    counter = _op(graph, at, "Range", constants[0], _op(graph, at, "Size", mask), constants[1])
    lines: list[ir.Value] = []
    for axis in reversed(range(rank)):
        size = _op(graph, at, "Shape", mask, start=axis, end=axis + 1)
        lines.insert(0, _op(graph, at, "Unsqueeze", _op(graph, at, "Mod", counter, size), first))
        counter = _op(graph, at, "Div", counter, size)
    return _op(graph, at, "Concat", *lines, axis=0)


def mask_chosen_rows(draft: Draft) -> bool:
    """Multiply by the mask what is added for the rows that make_experts_static chose."""
    graph = draft.analysed()
    probe = GraphProbe(graph, 2, 3, 4 if graph.has_past else 0)
    found = False
    for node in graph.nodes:
        mask = node.meta.pop(MASK, None)
        if mask is None:
            continue
        found = True
        for scatter in list(_scatters(graph, node)):
            _check_adds(graph, probe, scatter)
            updates = input_of(scatter, 2)
            shape = probe.shape(updates)
            flat = _op(graph, scatter, "Reshape", mask, new_constant(graph.model.graph, np.array([-1] + [1] * (len(shape) - 1))))
            factor = _op(graph, scatter, "Cast", flat, to=int(ir.DataType.from_numpy(probe.dtype(updates))))
            scatter.replace_input_with(2, _op(graph, scatter, "Mul", updates, factor))
            scatter.attributes["reduction"] = ir.AttrString("reduction", "add")
    return found


def _scatters(graph: DecoderGraph, start: ir.Node) -> Iterator[ir.Node]:
    """The scatters that put back the rows chosen at `start`."""
    seen: set[ir.Node] = set()
    frontier = [start]
    reached = False
    while frontier:
        for output in frontier.pop().outputs:
            if output is graph.logits:
                raise UnsupportedModel(f"the rows chosen by node {start.name} are not added back: experts of this form are not supported")
            for node, place in output.uses():
                if node in seen or node.op_type in ("Shape", "Size"):
                    continue
                seen.add(node)
                if node.op_type in SCATTERS and place in (1, 2):
                    reached = True
                    yield node
                else:
                    frontier.append(node)
    if not reached:
        raise UnsupportedModel(f"the rows chosen by node {start.name} are not added back: experts of this form are not supported")


def _check_adds(graph: DecoderGraph, probe: GraphProbe, scatter: ir.Node) -> None:
    """A row may be chosen twice, so the scatter must add. One that replaces may write into zeros only, where adding is the same."""
    if attribute(scatter, "reduction", "none") == "add":
        return
    data = input_of(scatter, 0)
    if graph.dependence(data) > Dependence.SHAPE or np.any(probe.value(data)):
        raise UnsupportedModel(
            f"node {scatter.name} ({scatter.op_type}) replaces rows chosen by the tokens: experts of this form are not supported"
        )
