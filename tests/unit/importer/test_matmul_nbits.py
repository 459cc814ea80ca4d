"""Exports whose weights onnxruntime has quantized: the codes are kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.matmul_nbits_quantizer import (
    DefaultWeightOnlyQuantConfig,
    MatMulNBitsQuantizer,
    QuantFormat,
)
from places import EXPORTS

from mesh.errors import UnsupportedModel
from mesh.importer.graph.decoder import Draft
from mesh.importer.passes.contrib import rewrite_contrib
from mesh.importer.run import import_model
from mesh.importer.verify.oracle import session
from mesh.lowering.lower import lower
from mesh.lowering.operands import operands
from mesh.lowering.weights import pack

LONG = pytest.mark.skipif(not os.environ.get("MESH_TEST_QUANTIZED"), reason="takes minutes with its like: make test-quantized")
IN, OUT = 96, 40
FORMS = [(bits, symmetric, block) for bits in (2, 4, 8) for symmetric in (True, False) for block in (16, 32, 128)]


def nbits(bits: int, symmetric: bool, block: int, order: np.ndarray | None = None) -> onnx.ModelProto:
    """y = x @ W, for random codes, scales and zero points of W [IN, OUT] as MatMulNBits stores them."""
    rng, groups = np.random.default_rng(bits * block), -(-IN // block)
    weights = {
        "W_Q": rng.integers(0, 256, (OUT, groups, block * bits // 8), np.uint8),
        "W_scales": rng.uniform(0.01, 1, (OUT, groups)).astype(np.float32),
        "W_zero_points": rng.integers(0, 256, (OUT, -(-groups * bits // 8)), np.uint8),
        "g_idx": np.zeros(0, np.int32) if order is None else order.astype(np.int32),
    }
    inputs = ["x", "W_Q", "W_scales", "" if symmetric else "W_zero_points", "" if order is None else "g_idx"]
    node = helper.make_node("MatMulNBits", inputs, ["y"], domain="com.microsoft", K=IN, N=OUT, bits=bits, block_size=block)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", OUT])],
        [numpy_helper.from_array(array, name) for name, array in weights.items() if name in inputs],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10)


def rewritten(model: onnx.ModelProto) -> onnx.ModelProto:
    draft = Draft(Path("x"), ir.from_proto(model))
    assert rewrite_contrib(draft)
    draft.model.graph.sort()
    draft.model.opset_imports[""] = 24
    return ir.to_proto(draft.model)


@pytest.mark.parametrize(("bits", "symmetric", "block"), FORMS)
def test_the_codes_stand_for_the_same_numbers_in_onnxruntime_and_here(bits: int, symmetric: bool, block: int, tmp_path: Path) -> None:
    """A product with the unit matrix gives the weight itself."""
    model, eye = nbits(bits, symmetric, block), np.eye(IN, dtype=np.float32)
    onnx.save(model, tmp_path / "source.onnx")
    theirs = session(tmp_path / "source.onnx").run(["y"], {"x": eye})[0]
    lowered = lower(rewritten(model))
    np.testing.assert_array_equal(np.asarray(lowered(lowered.weights, {"x": jnp.asarray(eye)})[lowered.graph.outputs[0]]), theirs)
    _, found = operands(lowered)
    assert len(found) == 1  # the weight stays narrow, its zero points too
    weights = {**lowered.graph.constants, **lowered.weights}
    packed = pack(list(found.values()), lambda name: (weights[name], lowered.packed.get(name)))
    assert packed.codes.kernel_kind == ("int8" if bits == 8 else "4 bits")
    np.testing.assert_array_equal(np.asarray(packed.product(jnp.asarray(eye))), theirs)


def test_inputs_in_an_order_of_their_own_are_brought_into_it() -> None:
    """A group index: the codes of a group are not side by side."""
    index = np.random.default_rng(0).permutation(np.arange(IN) // 32)
    order = np.argsort(index, kind="stable")
    plain, turned = nbits(4, False, 32), nbits(4, False, 32, index)
    codes = np.asarray(numpy_helper.to_array(plain.graph.initializer[0])).reshape(OUT, -1)
    each = np.stack([codes & 15, codes >> 4], -1).reshape(OUT, IN)
    moved = np.empty_like(each)
    moved[:, order] = each  # where the source has them, group by group in `plain`
    stored = (moved[:, 0::2] | moved[:, 1::2] << 4).reshape(OUT, 3, 16)
    turned.graph.initializer[0].CopyFrom(numpy_helper.from_array(stored, "W_Q"))
    results = []
    x = np.random.default_rng(1).standard_normal((2, IN)).astype(np.float32)
    for model, given in ((plain, x[:, order]), (turned, x)):
        lowered = lower(rewritten(model))
        results.append(np.asarray(lowered(lowered.weights, {"x": jnp.asarray(given)})[lowered.graph.outputs[0]]))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-6)
    with pytest.raises(UnsupportedModel, match="groups of unequal size"):
        rewritten(nbits(4, False, 32, np.zeros(IN)))


@pytest.mark.parametrize(
    ("bits", "symmetric", "form"),
    [
        (4, False, QuantFormat.QDQ),
        pytest.param(4, True, QuantFormat.QOperator, marks=LONG),
        pytest.param(8, False, QuantFormat.QOperator, marks=LONG),
    ],
)
def test_a_model_that_onnxruntime_has_quantized_is_kept(bits: int, symmetric: bool, form: Any, tmp_path: Path) -> None:
    model = onnx.load(EXPORTS / "llama-dynamo.onnx")
    config = DefaultWeightOnlyQuantConfig(block_size=32, is_symmetric=symmetric, accuracy_level=1, quant_format=form, bits=bits)
    quantizer = MatMulNBitsQuantizer(model, algo_config=config)
    quantizer.process()
    onnx.save(quantizer.model.model, tmp_path / "model.onnx")
    manifest = import_model(tmp_path / "model.onnx", tmp_path / "out")
    assert manifest.report["source_error"] < 1e-5 and manifest.report["source_greedy_equal"] == 1.0
    assert manifest.weights.kept == f"{bits} bits" and manifest.weights.bits == bits
    whole = import_model(EXPORTS / "llama-dynamo.onnx", tmp_path / "whole")
    stored, wide = (sum(block.weight_bytes for block in each.blocks if block.name.startswith("layer")) for each in (manifest, whole))
    assert stored < wide * (bits + 3) / 32


def test_half_precision_is_compared_to_as_many_digits_as_it_has(tmp_path: Path) -> None:
    """An export of float16 runs in float16, and its blocks in float32."""
    model = ir.load(EXPORTS / "genai-llama.onnx")
    half = ir.DataType.FLOAT16
    for value in model.graph.initializers.values():
        if value.dtype == ir.DataType.FLOAT and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float16), name=value.name)
            value.dtype = half
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.dtype == ir.DataType.FLOAT:
            value.dtype = half
    ir.save(model, tmp_path / "model.onnx")
    onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    report = import_model(tmp_path / "model.onnx", tmp_path / "out").report
    assert report["oracle_error"] < 1e-5 and 1e-5 < report["source_error"] < 1e-2
