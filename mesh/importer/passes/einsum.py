"""Rewrite an Einsum that is a matrix product as MatMul, so that attention written with einsum looks like any other."""

from __future__ import annotations

import onnx_ir as ir

from mesh.importer.graph.decoder import Draft, attribute, input_of
from mesh.importer.graph.edit import insert

__all__ = ["rewrite_einsum"]


def rewrite_einsum(draft: Draft) -> bool:
    """Rewrite an Einsum of two operands with one summed letter as Transpose and MatMul. Others stay as they are."""
    model, changed = draft.model, False
    for node in list(model.graph):
        if node.op_type != "Einsum" or node.domain != "" or len(node.inputs) != 2:
            continue
        plan = _product(str(attribute(node, "equation", "")))
        if plan is None:
            continue
        left, right, out = plan
        sides = [_transposed(model, node, input_of(node, place), perm) for place, perm in ((0, left), (1, right))]
        (product,) = insert(model.graph, node, "MatMul", *sides)
        result = _transposed(model, node, product, out)
        ir.convenience.replace_all_uses_with(node.outputs[0], result, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        changed = True
    return changed


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
    return insert(model.graph, at, "Transpose", value, perm=perm)[0]
