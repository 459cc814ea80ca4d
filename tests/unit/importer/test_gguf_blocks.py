"""Quantized tensors of GGUF are kept: the blocks' values are those that the gguf package dequantizes, bit for bit."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from mesh.importer.options import ImportOptions
from mesh.importer.sources.gguf_blocks import FORMS, kept
from mesh.importer.write.blocks import BlockWriter, GraphBuilder
from mesh.importer.write.kept import Kept, SourceMatrix
from mesh.kernels import library
from mesh.kernels.library import Kernels, kernels
from mesh.lowering.experts import ExpertWeight
from mesh.runtime.loading import load_block

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "MXFP4")
EXPERTS, OUT, IN = 3, 24, 512


def stored(name: str, out: int = OUT) -> tuple[int, np.ndarray, np.ndarray]:
    """(the type's number, random blocks uint8 [out, blocks, bytes], the numbers [out, in] that the gguf package makes of them)."""
    kind = GGMLQuantizationType[name]
    elements, size = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(int(kind))
    blocks = rng.integers(0, 256, (out, IN // elements, size), np.uint8)
    if name == "MXFP4":  # the smallest scales whose products are normal numbers, and usual ones
        blocks[:, :, 0] = rng.integers(110, 140, blocks.shape[:2])
        blocks[0, :3, 0] = (2, 3, 4)
        return int(kind), blocks, quants.dequantize(blocks.reshape(out, -1), kind)
    halves = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2), "Q5_1": (0, 2)}.get(name, (0,))
    for at in halves:  # random bits would be infinities among others
        numbers = rng.standard_normal(blocks.shape[:2]).astype(np.float16)
        numbers[0] = [6e-8] + [0] * (len(numbers[0]) - 1)  # the smallest there is, and zeros
        blocks[:, :, at : at + 2] = numbers[..., None].view(np.uint8)
    return int(kind), blocks, quants.dequantize(blocks.reshape(out, -1), kind)


def dequantized(kept: Kept) -> np.ndarray:
    """The numbers [out, in] that a block computes of it, float32, step by step as its nodes do."""

    def factors(each: tuple[np.ndarray, np.ndarray | None]) -> np.ndarray:
        data, step = each
        numbers = data.astype(np.float32)
        return numbers if step is None else numbers * np.repeat(step.astype(np.float32), data.shape[1] // step.shape[1], axis=1)

    assert kept.scale is not None
    values: np.ndarray = kept.codes.astype(np.float32) * np.repeat(factors(kept.scale), kept.form.group, axis=1)
    if kept.minimum is None:
        return values
    minimum = np.repeat(factors(kept.minimum), kept.form.group, axis=1)
    return values + minimum if kept.form.minimum == "add" else values - minimum


@pytest.mark.parametrize("name", TYPES)
def test_codes_and_scales_are_the_same_numbers(name: str) -> None:
    kind, blocks, numbers = stored(name)
    assert FORMS[kind].name == name
    np.testing.assert_array_equal(dequantized(kept(kind, blocks)), numbers)


@pytest.mark.parametrize("name", TYPES)
def test_a_block_has_the_same_numbers_in_onnxruntime_and_here(name: str, tmp_path: Path) -> None:
    """A product with the unit matrix gives the weight itself, and a table's rows are the table."""
    kind, blocks, numbers = stored(name)
    weight = SourceMatrix(lambda: numbers, FORMS[kind], lambda: kept(kind, blocks))
    builder = GraphBuilder("layer_000", ImportOptions())
    builder.linear(builder.input("x", ["rows", IN]), "w", weight, out="y")
    builder.output("y", ["rows", OUT])
    ids = builder.input("ids", ["batch", "chunk"], 7)
    builder.output(builder.embedding(ids, "table", weight, out="rows_of_table"), ["batch", "chunk", IN])
    info = builder.write(BlockWriter(tmp_path))
    assert {form.name for form in builder.kept} == {name}
    given = {"x": np.eye(IN, dtype=np.float32), "ids": np.arange(OUT)[None]}
    session = onnxruntime.InferenceSession(tmp_path / "layer_000.onnx", providers=["CPUExecutionProvider"])
    y, rows = session.run(["y", "rows_of_table"], given)
    np.testing.assert_array_equal(y.T, numbers)
    np.testing.assert_array_equal(rows[0], numbers)
    assert info.parameters == 2 * OUT * IN
    block = load_block(tmp_path, "layer_000")
    ours = block.lowered(block.weights, {"x": jnp.asarray(given["x"]), "ids": jnp.asarray(given["ids"], jnp.int32)})
    np.testing.assert_array_equal(np.asarray(ours["y"]).T, numbers)
    np.testing.assert_array_equal(np.asarray(ours["rows_of_table"])[0], numbers)


@pytest.mark.parametrize("engine", ["kernels", "XLA"])
@pytest.mark.parametrize("name", TYPES)
def test_weights_of_experts_have_the_same_numbers_too(name: str, engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unit vectors through every expert give its weight, and in memory it takes what it takes in the file."""
    if engine == "XLA":
        monkeypatch.setattr(library, "_found", lambda: Kernels(None, "turned off"))
    elif kernels().name is None:
        pytest.skip(f"kernels: {kernels()}")
    kind, blocks, numbers = stored(name, EXPERTS * OUT)
    shape = (EXPERTS, OUT, IN)
    weight = SourceMatrix(lambda: numbers.reshape(shape), FORMS[kind], lambda: kept(kind, blocks), shape)
    builder = GraphBuilder("layer_000", ImportOptions())
    x, chosen = builder.input("x", ["rows", 1, IN]), builder.input("chosen", ["rows"], 7)
    table, outputs_first = builder.experts("w", weight)
    assert outputs_first
    builder.op("MatMul", x, builder.op("Transpose", builder.op("Gather", table, chosen), perm=[0, 2, 1]), out="y")
    builder.output("y", ["rows", 1, OUT])
    assert builder.write(BlockWriter(tmp_path)).parameters == numbers.size
    session = onnxruntime.InferenceSession(tmp_path / "layer_000.onnx", providers=["CPUExecutionProvider"])
    block = load_block(tmp_path, "layer_000")
    assert [type(each) for each in block.weights.values()] == [ExpertWeight]
    if engine == "kernels":
        assert block.weight_bytes <= 1.06 * blocks.nbytes * (1.25 if name == "MXFP4" else 1)  # a code of MXFP4 needs 5 bits as an integer
    for expert in range(EXPERTS):
        given = {"x": np.eye(IN, dtype=np.float32)[:, None], "chosen": np.full(IN, expert)}
        (y,) = session.run(["y"], given)
        np.testing.assert_array_equal(y[:, 0].T, numbers.reshape(shape)[expert])
        ours = block.lowered(block.weights, {"x": jnp.asarray(given["x"]), "chosen": jnp.asarray(given["chosen"], jnp.int32)})
        np.testing.assert_array_equal(np.asarray(ours["y"])[:, 0].T, numbers.reshape(shape)[expert])


def test_experts_whose_products_sum_over_their_rows_are_multiplied_out(tmp_path: Path) -> None:
    """Groups lie along the rows, so such a product has no form that reads codes."""
    kind, blocks, numbers = stored("Q4_K", EXPERTS * OUT)
    shape = (EXPERTS, OUT, IN)
    builder = GraphBuilder("layer_000", ImportOptions())
    x, chosen = builder.input("x", ["rows", 1, OUT]), builder.input("chosen", ["rows"], 7)
    table, _ = builder.experts("w", SourceMatrix(lambda: numbers.reshape(shape), FORMS[kind], lambda: kept(kind, blocks), shape))
    builder.op("MatMul", x, builder.op("Gather", table, chosen), out="y")
    builder.output("y", ["rows", 1, IN])
    builder.write(BlockWriter(tmp_path))
    block = load_block(tmp_path, "layer_000")
    assert not any(isinstance(each, ExpertWeight) for each in block.weights.values())
    chosen_experts = np.arange(OUT) % EXPERTS
    given = {"x": jnp.eye(OUT, dtype=jnp.float32)[:, None], "chosen": jnp.asarray(chosen_experts, jnp.int32)}
    y = np.asarray(block.lowered(block.weights, given)["y"])[:, 0]
    np.testing.assert_array_equal(y, numbers.reshape(shape)[chosen_experts, np.arange(OUT)])


@pytest.mark.parametrize("name", TYPES)
def test_in_memory_a_weight_takes_about_what_it_takes_in_the_file(name: str, tmp_path: Path) -> None:
    kind, blocks, numbers = stored(name, 64)
    builder = GraphBuilder("layer_000", ImportOptions())
    weight = SourceMatrix(lambda: numbers, FORMS[kind], lambda: kept(kind, blocks))
    builder.linear(builder.input("x", ["rows", IN]), "w", weight, out="y")
    builder.output("y", ["rows", 64])
    builder.write(BlockWriter(tmp_path))
    bits = 5 if name == "MXFP4" else int(name[1])  # a code of MXFP4 needs 5 bits as an integer
    held = 8 if bits > 4 and kernels().name is None else bits  # without kernels codes are bytes, but for those of 4 bits
    assert load_block(tmp_path, "layer_000").weight_bytes <= 1.06 * blocks.nbytes * held / (4 if name == "MXFP4" else bits)
