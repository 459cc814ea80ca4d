"""Run one ONNX node on numbers: shape, position and mask arithmetic, and the layout steps around attention.

docs/adr/0007-evaluating-nodes.md says why the common operators are written here in numpy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from mesh.errors import CorruptModel, UnsupportedModel
from mesh.importer.graph.decoder import attribute
from mesh.lowering import ops
from mesh.lowering.registry import find
from mesh.model.onnx_form import OPSET

__all__ = ["HELP", "NotConcrete", "evaluate"]

ops.load()  # the lowerings that take numpy arrays compute most nodes

Array = npt.NDArray[Any]
TENSOR = ir.AttributeType.TENSOR
MOST_ELEMENTS = 1 << 27
_COMPARISONS = ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor", "Where")
_ELEMENTWISE = frozenset({"Add", "Sub", "Mul", "Div", "Mod", "Pow", "Max", "Min", *_COMPARISONS})
HELP = "export with the standard ONNX operators, or with onnxruntime-genai's"


class NotConcrete(Exception):
    """The value depends on tokens, or its shape does."""


def evaluate(node: ir.Node, inputs: list[Array | None]) -> list[Array]:
    """The outputs of `node`. NotConcrete if these inputs do not fit it, UnsupportedModel if the operator is not known."""
    _require_small(node, inputs)
    with np.errstate(all="ignore"):
        try:
            if node.domain == "" and node.op_type in _OWN:
                results: Sequence[Any] = [_OWN[node.op_type](node, *inputs)]
            else:
                results = _lowered(node, inputs) or _reference(node, inputs)
        except (IndexError, ValueError, TypeError) as error:
            raise NotConcrete(f"{node.op_type} {node.name}: {error}") from None
    return [np.asarray(result) for result in results]


def _require_small(node: ir.Node, inputs: list[Array | None]) -> None:
    """CorruptModel where the result would be larger than anything that shape, position and mask arithmetic needs."""
    shapes = [() if array is None else array.shape for array in inputs]
    numbers = [None if array is None else array.reshape(-1) for array in inputs]
    try:
        match node.op_type, numbers:
            case "ConstantOfShape", [sizes] if sizes is not None:
                size = math.prod(map(int, sizes))
            case "Expand", [array, sizes, *_] if array is not None and sizes is not None:
                size = math.prod(np.broadcast_shapes(shapes[0], tuple(map(int, sizes))))
            case "Tile", [array, repeats, *_] if array is not None and repeats is not None:
                size = array.size * math.prod(map(int, repeats))
            case "OneHot", [array, depth, *_] if array is not None and depth is not None:
                size = array.size * int(depth[0])
            case "Range", [start, limit, step] if start is not None and limit is not None and step is not None:
                size = math.ceil(float(limit[0] - start[0]) / float(step[0]))
            case op, _ if op in _ELEMENTWISE:
                size = math.prod(np.broadcast_shapes(*shapes))
            case _, _:
                return
    except (ArithmeticError, IndexError, ValueError):
        return  # the operator says what is wrong
    if size > MOST_ELEMENTS:
        raise CorruptModel(f"{node.op_type} {node.name} would make {size:,} numbers, where at most {MOST_ELEMENTS:,} are made")


def _lowered(node: ir.Node, inputs: list[Array | None]) -> Sequence[Any]:
    """The outputs by the op's lowering, where that takes numpy arrays; nothing for any other op."""
    op = find(node.op_type, node.domain, OPSET)
    attributes = {name: value.as_tensor().numpy() if value.type is TENSOR else value.value for name, value in node.attributes.items()}
    if op is None or not op.numpy or op.problem(attributes, len(inputs)) is not None:
        return ()
    if op.takes_outputs:
        attributes["n_outputs"] = len(node.outputs)
    try:
        results = op.function(*inputs, **attributes)
    except UnsupportedModel as error:
        raise NotConcrete(f"{node.op_type} {node.name}: {error}") from None
    return results if isinstance(results, (tuple, list)) else (results,)


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


def _reshape(node: ir.Node, x: Array, target: Array) -> Array:
    keep = not attribute(node, "allowzero", 0)
    dims = [x.shape[i] if dim == 0 and keep else int(dim) for i, dim in enumerate(target)]
    if x.size == 0 and -1 in dims:
        # numpy cannot deduce a dimension of an empty array
        known = int(np.prod([dim for dim in dims if dim > 0]))
        rest = int(np.prod([dim for dim in x.shape if dim > 0]))
        dims = [rest // max(known, 1) if dim == -1 else dim for dim in dims]
    return x.reshape(dims)


# Nodes that are not computed as their lowering would. Reshape: past sizes of zero give empty arrays, whose -1 stands for the size that
# it has for other pasts. MatMul: the lowering is JAX's alone.
_OWN: dict[str, Callable[..., Array]] = {"Reshape": _reshape, "MatMul": lambda node, a, b: np.matmul(a, b)}
