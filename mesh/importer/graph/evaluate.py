"""Run one ONNX node on numbers: shape, position and mask arithmetic, and the layout steps around attention.

docs/adr/0007-evaluating-nodes.md says why the common operators are written here in numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from mesh.errors import UnsupportedModel
from mesh.importer.graph.decoder import attribute
from mesh.model.onnx_form import OPSET

__all__ = ["HELP", "NotConcrete", "evaluate"]

Array = npt.NDArray[Any]
HELP = "export with the standard ONNX operators, or with onnxruntime-genai's"


class NotConcrete(Exception):
    """The value depends on tokens, or its shape does."""


def evaluate(node: ir.Node, inputs: list[Array | None]) -> list[Array]:
    """The outputs of `node`. NotConcrete if these inputs do not fit it, UnsupportedModel if the operator is not known."""
    fast = FAST.get(node.op_type) if node.domain == "" else None
    with np.errstate(all="ignore"):
        try:
            results = [fast(node, *inputs)] if fast is not None else _reference(node, inputs)
        except (IndexError, ValueError, TypeError) as error:
            raise NotConcrete(f"{node.op_type} {node.name}: {error}") from None
    return [np.asarray(result) for result in results]


def _reference(node: ir.Node, inputs: list[Array | None]) -> list[Array]:
    evaluator = node.meta.get("mesh.evaluator")
    if evaluator is None:
        try:
            evaluator = ReferenceEvaluator(ir.to_proto(node), opsets={"": OPSET})
        except Exception:
            raise UnsupportedModel(f"operator {node.domain or 'ai.onnx'}.{node.op_type} (node {node.name}) is not known: {HELP}") from None
        node.meta["mesh.evaluator"] = evaluator
    feeds = {str(v.name): array for v, array in zip(node.inputs, inputs, strict=True) if v is not None}
    try:
        results: Any = evaluator.run(None, feeds)
    except (IndexError, ValueError, RuntimeError, TypeError) as error:
        raise NotConcrete(f"{node.op_type} {node.name}: {error}") from None
    return list(results)


def _cast(node: ir.Node, x: Array) -> Array:
    return np.asarray(x, ir.DataType(attribute(node, "to")).numpy())


def _divide(_: ir.Node, a: Array, b: Array) -> Array:
    if a.dtype.kind in "iu":
        return np.asarray(np.sign(a) * np.sign(b) * (np.abs(a) // np.maximum(np.abs(b), 1)), a.dtype)
    return np.asarray(a / b)


def _gather(node: ir.Node, x: Array, indices: Array) -> Array:
    axis = attribute(node, "axis", 0)
    try:
        return np.asarray(np.take(x, indices, axis=axis))
    except IndexError as error:
        raise NotConcrete(str(error)) from None


def _gather_elements(node: ir.Node, x: Array, indices: Array) -> Array:
    axis = attribute(node, "axis", 0) % x.ndim
    rows = tuple(slice(None) if a == axis else slice(size) for a, size in enumerate(indices.shape))
    return np.take_along_axis(x[rows], indices, axis)


def _gather_nd(node: ir.Node, x: Array, indices: Array) -> Array:
    if attribute(node, "batch_dims", 0):
        return _reference(node, [x, indices])[0]
    try:
        return np.asarray(x[tuple(np.moveaxis(indices, -1, 0))])
    except IndexError as error:
        raise NotConcrete(str(error)) from None


def _reshape(node: ir.Node, x: Array, target: Array) -> Array:
    keep = not attribute(node, "allowzero", 0)
    dims = [x.shape[i] if dim == 0 and keep else int(dim) for i, dim in enumerate(target)]
    if x.size == 0 and -1 in dims:
        # numpy cannot deduce a dimension of an empty array
        known = int(np.prod([dim for dim in dims if dim > 0]))
        rest = int(np.prod([dim for dim in x.shape if dim > 0]))
        dims = [rest // max(known, 1) if dim == -1 else dim for dim in dims]
    return x.reshape(dims)


def _squeeze(_: ir.Node, x: Array, axes: Array | None = None) -> Array:
    return np.squeeze(x, tuple(int(a) for a in axes) if axes is not None else None)


def _transpose(node: ir.Node, x: Array) -> Array:
    return np.transpose(x, node.attributes["perm"].value if "perm" in node.attributes else None)


def _concat(node: ir.Node, *arrays: Array) -> Array:
    return np.concatenate(arrays, axis=node.attributes["axis"].value)


def _binary(function: Callable[..., Any]) -> Callable[..., Array]:
    return lambda node, a, b: np.asarray(function(a, b))


# the operators that shape, position and mask arithmetic is made of; onnx's reference implementation runs the others
FAST: dict[str, Callable[..., Array]] = {
    "Add": _binary(np.add), "Sub": _binary(np.subtract), "Mul": _binary(np.multiply), "Div": _divide,
    "Equal": _binary(np.equal), "Less": _binary(np.less), "LessOrEqual": _binary(np.less_equal), "Greater": _binary(np.greater),
    "GreaterOrEqual": _binary(np.greater_equal), "And": _binary(np.logical_and), "Or": _binary(np.logical_or),
    "Not": lambda node, x: np.logical_not(x), "Where": lambda node, c, a, b: np.asarray(np.where(c, a, b), a.dtype),
    "Cast": _cast, "Gather": _gather, "GatherND": _gather_nd, "GatherElements": _gather_elements, "Reshape": _reshape, "Squeeze": _squeeze,
    "Unsqueeze": lambda node, x, axes: np.expand_dims(x, tuple(int(a) for a in axes)),
    "Expand": lambda node, x, shape: np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(int(d) for d in shape))),
    "Concat": _concat, "Transpose": _transpose, "Range": lambda node, a, b, c: np.arange(a, b, c, dtype=a.dtype),
    "MatMul": lambda node, a, b: np.matmul(a, b), "Identity": lambda node, x: x,
}  # fmt: skip
