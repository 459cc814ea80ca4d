"""Products of one input become one product, and the numbers stay what they were."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mesh.lowering import Lowered, lower
from mesh.lowering.join import join_products
from mesh.lowering.operands import operands
from mesh.lowering.weights import pack

DEPTH, WIDTHS = 32, (48, 16, 16)


def model(kind: str, *, shared: bool = False) -> onnx.ModelProto:
    """Three products of one input, their weights float32, float16 behind a Cast, or 8 or 4 bits behind a DequantizeLinear."""
    rng = np.random.default_rng(1)
    nodes, initializers, outputs = [], [], []
    for index, width in enumerate(WIDTHS):
        weight, right = f"w{index}", f"w{index}"
        values = rng.standard_normal((DEPTH, width)).astype(np.float32)
        if kind == "float32":
            initializers.append(numpy_helper.from_array(np.tile(values, (2, 1))[:DEPTH], weight))
        elif kind == "float16":
            initializers.append(numpy_helper.from_array(values.astype(np.float16), weight))
            nodes.append(helper.make_node("Cast", [weight], [right := f"wide{index}"], to=TensorProto.FLOAT))
        else:
            grouped = kind == "4 bits in groups"
            codes = rng.integers(-8, 8, (DEPTH, width)).astype(np.int8)
            stored = TensorProto.INT4 if grouped else TensorProto.INT8
            initializers.append(helper.make_tensor(weight, stored, codes.shape, codes.reshape(-1).tolist()))
            scales = rng.random((DEPTH // 16, width) if grouped else (width,)).astype(np.float32)
            initializers.append(numpy_helper.from_array(scales, f"s{index}"))
            attributes: dict[str, Any] = {"axis": 0, "block_size": 16} if grouped else {"axis": 1}
            nodes.append(helper.make_node("DequantizeLinear", [weight, f"s{index}"], [right := f"wide{index}"], **attributes))
        nodes.append(helper.make_node("MatMul", ["x", right], [f"y{index}"]))
        outputs.append(helper.make_tensor_value_info(f"y{index}", TensorProto.FLOAT, [1, 5, width]))
    if shared:  # the first weight is read by something else as well
        nodes.append(helper.make_node("Transpose", ["w0"], ["other"], perm=[1, 0]))
        outputs.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [WIDTHS[0], DEPTH]))
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 5, DEPTH])]
    graph = helper.make_graph(nodes, "products", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)])


def products(graph: Any) -> int:
    return sum(node.op.op_type == "MatMul" for node in graph.nodes)


@pytest.mark.parametrize("kind", ["float32", "float16", "8 bits", "4 bits in groups"])
def test_joined_products_give_the_same_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Scales are arguments where there are many of them, constants otherwise.
    monkeypatch.setattr("mesh.lowering.prepare.WEIGHT_ELEMENTS", 16 if "groups" in kind else 64)
    lowered = lower(model(kind))
    x = np.random.default_rng(2).standard_normal((1, 5, DEPTH)).astype(np.float32)
    expected = lowered({name: lowered.weights[name] for name in lowered.weights}, {"x": x})
    graph, found = operands(lowered)
    graph, parts = join_products(graph, found, lambda operand: operand.dtype)
    assert products(graph) == 1
    assert parts == {"w0|w1|w2": ("w0", "w1", "w2")}

    def read(name: str) -> Any:
        return lowered.weights.get(name, lowered.graph.constants.get(name)), lowered.packed.get(name)

    weights: dict[str, Any] = {name: pack([found[part] for part in names], read) for name, names in parts.items()}
    result = Lowered(graph, weights, lowered.packed, lowered.static_inputs)(weights, {"x": x})
    for name in ("y0", "y1", "y2"):
        np.testing.assert_allclose(np.asarray(result[name]), np.asarray(expected[name]), rtol=1e-5, atol=1e-5)


def test_a_weight_that_something_else_reads_stays_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.lowering.prepare.WEIGHT_ELEMENTS", 64)
    lowered = lower(model("float32", shared=True))
    graph, found = operands(lowered)
    graph, parts = join_products(graph, found, lambda operand: operand.dtype)
    assert products(graph) == 2
    assert set(parts) == {"w1|w2"}


def test_unlike_weights_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of different inputs, or of weights stored at different widths, are not one product."""
    monkeypatch.setattr("mesh.lowering.prepare.WEIGHT_ELEMENTS", 64)
    proto = model("float32")
    proto.graph.node[1].input[0] = "x2"
    proto.graph.input.append(helper.make_tensor_value_info("x2", TensorProto.FLOAT, [1, 5, DEPTH]))
    graph, found = operands(lower(proto))
    graph, parts = join_products(graph, found, lambda operand: operand.dtype)
    assert set(parts) == {"w0|w2", "w1"}
    assert products(graph) == 2
