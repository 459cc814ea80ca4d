"""A graph with calls of the kernels gives what it gave before, whatever stands beside its products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mesh.kernels.library import kernels
from mesh.lowering import Lowered, lower
from mesh.lowering.fuse import fuse
from mesh.lowering.operands import operands
from mesh.lowering.weights import pack

pytestmark = pytest.mark.skipif(kernels().name is None, reason=f"kernels: {kernels()}")

SIZE = 32
Node = tuple[str, list[str], str] | tuple[str, list[str], str, dict[str, int]]


def made_node(op: str, inputs: list[str], output: str, attributes: dict[str, Any] | None = None) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], **(attributes or {}))


def model(nodes: Sequence[Node], constants: dict[str, np.ndarray], inputs: dict[str, tuple[int, ...]]) -> onnx.ModelProto:
    """Nodes (op, inputs, output, maybe attributes), the last of which makes `y`. The constants w... are weights, the others are smaller."""
    graph = helper.make_graph(
        [made_node(*node) for node in nodes],
        "beside products",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])


def both(nodes: Sequence[Node], constants: dict[str, np.ndarray], inputs: dict[str, np.ndarray]) -> tuple[list[str], Any, Any]:
    """(the ops after fusing, y after it, y before it)."""
    lowered = lower(model(nodes, constants, {name: array.shape for name, array in inputs.items()}))
    expected = lowered(lowered.weights, inputs)["y"]
    graph, found = operands(lowered)
    weights: dict[str, Any] = {name: pack([operand], lambda name: (lowered.weights[name], None)) for name, operand in found.items()}
    weights |= {name: array for name, array in lowered.weights.items() if name not in weights}
    fused = fuse(graph, weights, decode=False)
    return [node.op.op_type for node in fused.nodes], Lowered(fused, weights, {}, lowered.static_inputs)(weights, inputs)["y"], expected


def numbers(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape) + shape[0]).standard_normal(shape).astype(np.float32)


def test_the_sum_of_two_products_is_made_by_one_of_them() -> None:
    """Attention and MLP beside each other, as Falcon and Cohere have them, without biases."""
    nodes: list[Node] = [("MatMul", ["x", "w0"], "a"), ("MatMul", ["z", "w1"], "b"), ("Add", ["a", "b"], "s"), ("Add", ["s", "x"], "y")]
    weights = {"w0": numbers(SIZE, SIZE), "w1": numbers(SIZE, SIZE)}
    ops, got, expected = both(nodes, weights, {"x": numbers(1, 5, SIZE), "z": numbers(1, 5, SIZE)})
    assert ops == ["Products", "Products", "Add"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shapes", [((1, 5, SIZE), (1, 5, SIZE)), ((1, 5, SIZE), (1, 1, SIZE)), ((1, 5, 1), (1, 5, SIZE))])
def test_a_gate_of_another_shape_broadcasts(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    nodes: list[Node] = [("Sigmoid", ["x"], "s"), ("Mul", ["x", "s"], "g"), ("Mul", ["g", "z"], "h"), ("MatMul", ["h", "w"], "y")]
    ops, got, expected = both(nodes, {"w": numbers(SIZE, SIZE)}, {"x": numbers(*shapes[0]), "z": numbers(*shapes[1])})
    assert ops == ["Products"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(SIZE,), (1,), ()])
def test_a_norm_may_have_one_scale_for_all(shape: tuple[int, ...]) -> None:
    scale = np.full(shape, 1.5, np.float32)
    nodes: list[Node] = [("RMSNormalization", ["x", "scale"], "n"), ("MatMul", ["n", "w"], "y")]
    ops, got, expected = both(nodes, {"w": numbers(SIZE, SIZE), "scale": scale}, {"x": numbers(1, 5, SIZE)})
    assert ops == ["Products"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


BFLOAT16, FLOAT = {"to": int(TensorProto.BFLOAT16)}, {"to": int(TensorProto.FLOAT)}


@pytest.mark.parametrize("before", ["nothing", "norm", "gate"])
def test_inputs_are_rounded_to_bfloat16_on_the_way(before: str) -> None:
    before_it: dict[str, list[Node]] = {
        "nothing": [],
        "norm": [("RMSNormalization", ["x", "scale"], "n")],
        "gate": [("Sigmoid", ["x"], "s"), ("Mul", ["x", "s"], "g"), ("Mul", ["g", "z"], "n")],
    }
    made = before_it[before]
    last = made[-1][2] if made else "x"
    rounded: list[Node] = [("Cast", [last], "r", BFLOAT16), ("Cast", ["r"], "q", FLOAT)]
    products: list[Node] = [("MatMul", ["q", "w0"], "a"), ("MatMul", ["q", "w1"], "b"), ("Add", ["a", "b"], "y")]
    weights = {"w0": numbers(SIZE, SIZE), "w1": numbers(SIZE, SIZE), "scale": np.ones(SIZE, np.float32)}
    inputs = {"x": numbers(1, 5, SIZE), "z": numbers(1, 5, SIZE)}
    ops, got, expected = both([*made, *rounded, *products], weights, inputs)
    exact = both([*made, *([("MatMul", [last, "w0"], "a"), ("MatMul", [last, "w1"], "b"), products[2]])], weights, inputs)[2]
    assert ops == ["Products", "Add"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(expected - exact).max() > 1e-3  # XLA takes no two conversions for one that is not there


def test_a_rounded_input_that_something_else_reads_stays() -> None:
    nodes: list[Node] = [
        ("RMSNormalization", ["x", "scale"], "n"),
        ("Cast", ["n"], "r", BFLOAT16),
        ("Cast", ["r"], "q", FLOAT),
        ("MatMul", ["q", "w0"], "a"),
        ("Add", ["q", "n"], "b"),
        ("Add", ["a", "b"], "y"),
    ]
    weights = {"w0": numbers(SIZE, SIZE), "scale": np.ones(SIZE, np.float32)}
    ops, got, expected = both(nodes, weights, {"x": numbers(1, 5, SIZE)})
    assert ops == ["RMSNormalization", "Cast", "Cast", "Add", "Products"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_another_conversion_is_not_taken_for_that_rounding() -> None:
    nodes: list[Node] = [("Cast", ["x"], "r", {"to": int(TensorProto.FLOAT16)}), ("Cast", ["r"], "q", FLOAT), ("MatMul", ["q", "w0"], "y")]
    ops, got, expected = both(nodes, {"w0": numbers(SIZE, SIZE)}, {"x": numbers(1, 5, SIZE)})
    assert ops == ["Cast", "Cast", "Products"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_what_is_bfloat16_before_is_read_as_it_is() -> None:
    nodes: list[Node] = [("Cast", ["x"], "r", BFLOAT16), ("Cast", ["r"], "s", BFLOAT16), ("Cast", ["s"], "q", FLOAT)]
    nodes.append(("MatMul", ["q", "w0"], "y"))
    ops, got, expected = both(nodes, {"w0": numbers(SIZE, SIZE)}, {"x": numbers(1, 5, SIZE)})
    assert ops == ["Cast", "Products"]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
