"""Weights that a source has in 16 bits stay 16 bits: the same numbers in half the bytes, under arithmetic of 32 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from tiny_gguf import write_gguf
from tiny_models import LLAMA, make_model, torch

from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model, open_source
from mesh.importer.sources.source import Source
from mesh.importer.verify.verify import runtime_logits
from mesh.importer.write.blocks import BlockWriter
from mesh.kernels import library
from mesh.kernels.library import Kernels
from mesh.model.manifest import BlockInfo
from mesh.model.memory import ModelShape

TINY = {**LLAMA, "num_hidden_layers": 2}
GPT = {"vocab_size": 199, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "one table for both ends": ("Llama", {**TINY, "tie_word_embeddings": True}, "bfloat16"),
    "fused, a part each": ("Phi3", TINY, "float16"),
    "stored turned": ("GPT2", {**GPT, "tie_word_embeddings": True}, "bfloat16"),
    "heads side by side": ("GPTNeoX", {**GPT, "intermediate_size": 96}, "float16"),
    "a table of positions": ("OPT", {**GPT, "ffn_dim": 96, "word_embed_proj_dim": 64}, "bfloat16"),
    "experts": ("Mixtral", {**TINY, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}, "bfloat16"),
    "traced, with biases": ("Starcoder2", {**TINY, "use_bias": True, "tie_word_embeddings": False}, "bfloat16"),
    "traced, with experts": (
        "Qwen3Moe",
        {**TINY, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "decoder_sparse_step": 1, "head_dim": 16},
        "float16",
    ),
    "traced, fused": ("Glm", {**TINY, "head_dim": 16}, "bfloat16"),
}
WIDE = np.dtype(np.float32)


def matrices(directory: Path, blocks: tuple[BlockInfo, ...]) -> dict[tuple[str, str], np.ndarray]:
    """The weights of more than one axis, by block and name."""
    found = {}
    for block in blocks:
        for tensor in onnx.load(str(directory / f"{block.name}.onnx")).graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.ndim > 1 and array.size > 64 and array.dtype.kind != "i":
                found[block.name, tensor.name] = array
    return found


def written(source: Source, out: Path, bits: Literal[32] | None) -> tuple[BlockInfo, ...]:
    out.mkdir()
    return source.write_blocks(BlockWriter(out), ImportOptions(bits=bits), lambda *_: None)


def same(narrow: np.ndarray, wide: np.ndarray) -> bool:
    """Whether they are the same numbers, stored [out, in] or [in, out], experts one after the other or not."""
    numbers = narrow.astype(np.float32)
    forms = [numbers, numbers.swapaxes(-1, -2)]
    if wide.ndim == 3 and numbers.ndim == 2:
        forms = [numbers.reshape(len(wide), -1, numbers.shape[1]).swapaxes(1, 2)]
    return any(np.array_equal(form, wide) for form in forms)


def source_of(case: str, directory: Path) -> np.dtype[Any]:
    kind, values, name = CASES[case]
    model = make_model(kind, values)
    model.to(getattr(torch, name)).save_pretrained(directory)
    return np.dtype(name) if name == "float16" else np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16))


@pytest.mark.parametrize("case", CASES)
def test_blocks_hold_the_numbers_of_the_source_in_16_bits(case: str, tmp_path: Path) -> None:
    narrow_type = source_of(case, tmp_path / "source")
    source = open_source(tmp_path / "source")
    kept, wide = written(source, tmp_path / "kept", None), written(source, tmp_path / "wide", 32)
    assert source.kept_weights is not None and (source.kept_weights.bits, source.kept_weights.kept) == (16, narrow_type.name)
    ours, theirs = matrices(tmp_path / "kept", kept), matrices(tmp_path / "wide", wide)
    assert {array.dtype for array in theirs.values()} == {WIDE}
    assert {name for (_, name), array in ours.items() if array.dtype != narrow_type} <= {"router.weight"}
    assert {key for key in theirs if not same(ours[key], theirs[key])} == set()
    assert [block.parameters for block in kept] == [block.parameters for block in wide]
    for small, large in zip(kept, wide, strict=True):
        assert 0.49 * large.weight_bytes < small.weight_bytes < 0.56 * large.weight_bytes


@pytest.mark.parametrize("kind", ["F16", "BF16"])
@pytest.mark.parametrize("name", ["Llama", "Mixtral"])
def test_those_of_a_gguf_file_stay_16_bits_too(name: str, kind: str, tmp_path: Path) -> None:
    experts = {"num_local_experts": 4, "sliding_window": None} if name == "Mixtral" else {}
    write_gguf(tmp_path / "model.gguf", make_model(name, {**TINY, "vocab_size": 288, **experts}), gguf.GGMLQuantizationType[kind])
    source = open_source(tmp_path / "model.gguf")
    ours = matrices(tmp_path / "kept", written(source, tmp_path / "kept", None))
    theirs = matrices(tmp_path / "wide", written(source, tmp_path / "wide", 32))
    assert source.kept_weights is not None and source.kept_weights.kept == {"F16": "float16", "BF16": "bfloat16"}[kind]
    assert {array.dtype.itemsize for (_, name), array in ours.items() if name != "router.weight"} == {2}
    assert {key for key in theirs if not same(ours[key], theirs[key])} == set()
    assert {array.dtype for array in theirs.values()} == {WIDE}


@pytest.mark.parametrize("case", ["experts", "traced, with biases"])
def test_an_import_gives_the_tokens_of_32_bits_with_kernels_and_without(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The import itself compares with transformers, which computes with the same numbers in 32 bits."""
    source_of(case, tmp_path / "source")
    kept = import_model(tmp_path / "source", tmp_path / "kept")
    assert (kept.weights.bits, kept.hidden.dtype) == (16, "float32") and ModelShape.of(kept).bits == 16
    assert kept.report["source_error"] < 1e-4 and kept.report["source_greedy_equal"] == 1.0
    wide = kept.model_copy(update={"blocks": written(open_source(tmp_path / "source"), tmp_path / "wide", 32)})
    prompt = np.random.default_rng(1).integers(0, kept.vocab_size, 40)
    expected = np.concatenate(list(runtime_logits(tmp_path / "wide", wide, prompt)))
    for found in (library._found, lambda: Kernels(None, "turned off")):
        monkeypatch.setattr(library, "_found", found)
        got = np.concatenate(list(runtime_logits(tmp_path / "kept", kept, prompt)))
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize(
    "case",
    ["one table for both ends", "fused, a part each", "heads side by side", "experts", "traced, with biases", "traced, with experts"],
)
def test_products_of_bfloat16_keep_weights_of_bfloat16_and_round_others(case: str, tmp_path: Path) -> None:
    narrow_type = source_of(case, tmp_path / "source")
    source = open_source(tmp_path / "source")
    (tmp_path / "ours").mkdir()
    blocks = source.write_blocks(BlockWriter(tmp_path / "ours"), ImportOptions(products="bfloat16"), lambda *_: None)
    wide = matrices(tmp_path / "wide", written(source, tmp_path / "wide", 32))
    ours = matrices(tmp_path / "ours", blocks)
    used = {}
    for block in blocks:
        graph = onnx.load(str(tmp_path / "ours" / f"{block.name}.onnx")).graph
        made = {name: node for node in graph.node for name in node.output}
        for node in graph.node:
            sides = [behind(made, name, {key for _, key in ours}) for name in node.input[:2]]
            if node.op_type == "MatMul" and any(sides):
                other = node.input[sides.index(None)]
                used[block.name, next(filter(None, sides))] = made[made[other].input[0]].attribute[0].i
    assert used and set(used.values()) == {onnx.TensorProto.BFLOAT16}
    for key in used:
        assert ours[key].dtype.name == "bfloat16"
        same_numbers = same(ours[key], wide[key].astype(ours[key].dtype).astype(np.float32))
        assert same_numbers and (narrow_type.name != "bfloat16" or same(ours[key], wide[key]))


def behind(made: dict[str, onnx.NodeProto], name: str, weights: set[str]) -> str | None:
    """The weight that a value is made of by Cast, Transpose and choosing experts alone; not the router's, which stays as it is."""
    while name in made and made[name].op_type in ("Cast", "Transpose", "Gather", "GatherND", "Reshape"):
        name = made[name].input[0]
    return name if name in weights and name != "router.weight" else None


def test_a_checkpoint_with_few_matrices_of_16_bits_is_said_to_have_32(tmp_path: Path) -> None:
    model = make_model("Llama", {**TINY, "num_hidden_layers": 1})
    model.model.layers[0].self_attn.q_proj.bfloat16()
    model.save_pretrained(tmp_path / "source")
    weights = open_source(tmp_path / "source").kept_weights
    assert weights is not None and (weights.bits, weights.kept) == (32, "bfloat16")
