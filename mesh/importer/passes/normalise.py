"""Bring a graph to the few forms that the analysis knows: no branches, no einsum where a matrix product does, a free batch."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.graph.decoder import DecoderGraph, Kind, Role, argument, attribute
from mesh.importer.graph.evaluate import NotConcrete
from mesh.importer.graph.probe import Probe
from mesh.importer.passes.opset import NEWEST, inline_branch, new_constant

__all__ = ["free_batch", "inline_branches", "rewrite_einsum"]


def inline_branches(graph: DecoderGraph) -> bool:
    """Replace every If of the main graph whose condition is the same at all sizes; whether there was one.

    Sizes are of several tokens after several: what exporters write for a single token or an empty cache gives the same
    result by the general way.
    """
    branches = [node for node in graph.nodes if node.op_type == "If" and node.domain == ""]
    past = (4, 7, 9) if graph.has_past else (0, 0, 0)
    probes = [Probe(graph, rows, chunk, before) for (rows, chunk), before in zip(((2, 3), (3, 5), (1, 4)), past, strict=True)]
    for node in branches:
        try:
            taken = {bool(probe.value(argument(node, 0)).reshape(-1)[0]) for probe in probes}
        except NotConcrete:
            raise UnsupportedModel(f"node {node.name} (If) chooses by the tokens: export without control flow") from None
        if len(taken) > 1:
            raise UnsupportedModel(f"node {node.name} (If) chooses by the number of rows or tokens: export without control flow")
        inline_branch(graph.model, node, taken.pop())
        # what follows may depend on what this branch holds: look at the graph anew
        return True
    return False


def rewrite_einsum(model: ir.Model) -> None:
    """Einsum of two operands with one summed letter as Transpose and MatMul, in place; others stay."""
    for node in list(model.graph):
        if node.op_type != "Einsum" or node.domain != "" or len(node.inputs) != 2:
            continue
        plan = _product(str(attribute(node, "equation", "")))
        if plan is None:
            continue
        left, right, out = plan
        sides = [_transposed(model, node, argument(node, place), perm) for place, perm in ((0, left), (1, right))]
        product = ir.node("MatMul", sides, version=NEWEST)
        model.graph.insert_before(node, product)
        result = _transposed(model, node, product.outputs[0], out)
        ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)


def _product(equation: str) -> tuple[list[int], list[int], list[int]] | None:
    """Transpositions of the operands to [batch..., m, k] and [batch..., k, n], and of their product to the output."""
    terms, arrow, out = equation.replace(" ", "").partition("->")
    operands = terms.split(",")
    if not arrow or len(operands) != 2 or not all(term.isalpha() and len(set(term)) == len(term) for term in (*operands, out)):
        return None
    a, b = operands
    batch = [letter for letter in out if letter in a and letter in b]
    summed = [letter for letter in a if letter in b and letter not in out]
    rows = [letter for letter in a if letter not in b]
    columns = [letter for letter in b if letter not in a]
    if not (len(summed) == len(rows) == len(columns) == 1) or set(rows + columns) - set(out):
        return None
    left, right, product = [*batch, *rows, *summed], [*batch, *summed, *columns], [*batch, *rows, *columns]
    return [a.index(x) for x in left], [b.index(x) for x in right], [product.index(x) for x in out]


def _transposed(model: ir.Model, at: ir.Node, value: ir.Value, perm: list[int]) -> ir.Value:
    if perm == sorted(perm):
        return value
    node = ir.node("Transpose", [value], attributes={"perm": perm}, version=NEWEST)
    model.graph.insert_before(at, node)
    return node.outputs[0]


def free_batch(graph: DecoderGraph) -> None:
    """Let a graph that was exported for one row take any number of them, in place.

    Reshapes of data to a shape that begins with one row keep the rows they are given instead.
    """
    tokens = graph.input(Role.TOKENS)
    if tokens is None or tokens.shape is None or not isinstance(tokens.shape[0], int):
        return
    if tokens.shape[0] != 1:
        raise UnsupportedModel(f"{graph.path}: exported for exactly {tokens.shape[0]} rows: export it with a dynamic batch, or for one row")
    for value in graph.roles:
        if value.shape is not None and len(value.shape) in (2, 4, 5):
            row = len(value.shape) - 4 if len(value.shape) > 2 else 0
            value.shape = ir.Shape(["batch" if axis == row and dim == 1 else dim for axis, dim in enumerate(value.shape)])
    for node in graph.nodes:
        if node.op_type not in ("Reshape", "Expand") or graph.kind(argument(node, 0)) < Kind.PAST:
            continue
        target = argument(node, 1)
        source = target.producer()
        if target.const_value is not None:
            dims = target.const_value.numpy().copy()
            if dims.size < 2 or dims[0] != 1 or node.op_type == "Expand":
                continue
            dims[0] = 0
            node.replace_input_with(1, new_constant(graph.model.graph, dims))
        elif source is not None and source.op_type == "Concat" and node.op_type == "Reshape" and _is_one(source.inputs[0]):
            rest = ir.node(
                "Concat", [new_constant(graph.model.graph, np.array([0])), *source.inputs[1:]], attributes={"axis": 0}, version=NEWEST
            )
            graph.model.graph.insert_before(node, rest)
            node.replace_input_with(1, rest.outputs[0])
        else:
            continue
        node.attributes.pop("allowzero", None)


def _is_one(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and value.const_value.numpy().reshape(-1).tolist() == [1]
