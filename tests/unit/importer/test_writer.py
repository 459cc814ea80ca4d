"""Blocks on disk: aligned, checksummed as written, valid for stock tools, and never more than one tensor in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from mesh.errors import UnsupportedModel
from mesh.importer.options import ImportOptions
from mesh.importer.write.blocks import BlockWriter, GraphBuilder, Weight


def adder(name: str, weights: dict[str, Any]) -> GraphBuilder:
    """Sums its weights, each reduced to a number, so that every one of them is used."""
    builder = GraphBuilder(name)
    total = builder.input("x", [1])
    for key, value in weights.items():
        flat = builder.op("ReduceSum", builder.op("Cast", builder.weight(key, value), to=1), keepdims=0)
        total = builder.op("Add", total, flat)
    builder.op("Identity", total, out="y")
    builder.output("y", [1])
    return builder


def test_written_weights_equal_the_given_weights(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((33, 300)).astype(np.float32)
    nibbles = rng.integers(-8, 8, (7, 301)).astype(ml_dtypes.int4)  # odd: elements of different rows share a byte
    given: dict[str, Any] = {
        "transposed": lambda: matrix.T,
        "halved": Weight(lambda: matrix, np.dtype(np.float16)),
        "chosen": Weight(lambda: matrix, lambda array: np.dtype(ml_dtypes.bfloat16) if array.size > 9 else array.dtype),
        "nibbles": nibbles,
        "stack": rng.integers(-99, 99, (3, 20, 50)).astype(np.int8),
        "small": np.arange(5, dtype=np.float32),
        "unused": lambda: pytest.fail("a weight that the graph does not use was read"),
    }
    builder = adder("layer_000", {key: value for key, value in given.items() if key != "unused"})
    builder.weights["unused"] = given["unused"]
    info = builder.write(BlockWriter(tmp_path))

    assert [file.name for file in info.files] == ["layer_000.onnx", "layer_000.onnx.data"]
    for file in info.files:
        data = (tmp_path / file.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (file.bytes, file.sha256)
    model = onnx.load(tmp_path / "layer_000.onnx")
    back = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    np.testing.assert_array_equal(back["transposed"], matrix.T)
    np.testing.assert_array_equal(back["halved"], matrix.astype(np.float16))
    np.testing.assert_array_equal(back["chosen"], matrix.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(back["nibbles"].astype(np.int8), nibbles.astype(np.int8))
    np.testing.assert_array_equal(back["stack"], given["stack"])
    np.testing.assert_array_equal(back["small"], given["small"])
    stored = {tensor.name: tensor for tensor in onnx.load(tmp_path / "layer_000.onnx", load_external_data=False).graph.initializer}
    assert {name for name, tensor in stored.items() if not tensor.external_data} == {"small"}
    offsets = [int(entry.value) for tensor in stored.values() for entry in tensor.external_data if entry.key == "offset"]
    assert all(offset % 64 == 0 for offset in offsets)
    assert info.weight_bytes == 33 * 300 * 8 + (7 * 301 + 1) // 2 + 3000 + 20

    session = ort.InferenceSession(tmp_path / "layer_000.onnx", providers=["CPUExecutionProvider"])
    want = sum(float(array.astype(np.float64).sum()) for array in back.values())
    assert session.run(None, {"x": np.zeros(1, np.float32)})[0][0] == pytest.approx(want, rel=1e-3)


def test_tensors_larger_than_a_chunk_are_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mesh.importer.write.writer.CHUNK_BYTES", 512)
    rng = np.random.default_rng(0)
    given = {
        "wide": rng.standard_normal((5, 1000)).astype(np.float32),
        "column": rng.standard_normal((1000, 1)).astype(np.float32),
        "cube": rng.standard_normal((3, 50, 40)).astype(np.float32),
        "odd": rng.integers(-8, 8, (101, 33)).astype(ml_dtypes.int4),
        "odd_cube": rng.integers(-8, 8, (3, 45, 77)).astype(ml_dtypes.int4),
    }
    adder("layer_000", dict(given)).write(BlockWriter(tmp_path))
    model = onnx.load(tmp_path / "layer_000.onnx")
    for tensor in model.graph.initializer:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor).astype(np.float32), given[tensor.name].astype(np.float32))


def test_parameters_count_weights_and_not_their_scales(tmp_path: Path) -> None:
    weight = np.ones((64, 48), np.float32)
    counts = {}
    for options in (ImportOptions(), ImportOptions(bits=16), ImportOptions(bits=8), ImportOptions(bits=4)):
        builder = GraphBuilder("head", options)
        builder.linear(builder.input("x", ["n", 64]), "logits", weight, out="y")
        builder.output("y", ["n", 48])
        info = builder.write(BlockWriter(tmp_path))
        counts[options.bits] = (info.parameters, info.weight_bytes)
    assert counts == {32: (3072, 12288), 16: (3072, 6144), 8: (3072, 3072 + 192), 4: (3072, 1536 + 768 + 96 + 192)}


def test_an_ir_model_is_written_without_reading_all_its_weights_first(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    weight = np.random.default_rng(0).standard_normal((64, 32)).astype(np.float32)
    builder = GraphBuilder("head")
    builder.linear(builder.input("x", ["n", 64]), "logits", weight, np.ones(32, np.float32), out="y")
    builder.output("y", ["n", 32])
    first = builder.write(BlockWriter(tmp_path / "first"))
    model = ir.load(tmp_path / "first" / "head.onnx")
    second = BlockWriter(tmp_path).write("head", model)
    assert second.files[1] == first.files[1]
    stored = model.graph.initializers["logits.weight"].const_value
    assert isinstance(stored, ir.ExternalTensor) and str(stored.path).endswith("head.onnx.data")
    x = np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)
    got = ort.InferenceSession(tmp_path / "head.onnx", providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, x @ weight + 1, rtol=1e-5, atol=1e-5)


def test_a_graph_that_is_not_onnx_is_refused(tmp_path: Path) -> None:
    builder = GraphBuilder("head")
    builder.op("NoSuchOp", builder.input("x", ["n"]), out="y")
    builder.output("y", ["n"])
    with pytest.raises(UnsupportedModel, match=r"block head is not a valid ONNX model: .*NoSuchOp"):
        builder.write(BlockWriter(tmp_path))
