"""Hugging Face directories whose weights are quantized import as they are, and compute what transformers computes with the numbers that
their codes stand for."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ort_chain import Chain, relative_error
from tiny_models import LLAMA, logits_of, make_model

from mesh.errors import UnsupportedModel
from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model
from mesh.lowering.experts import ExpertWeight
from mesh.model.manifest import Manifest
from mesh.runtime.loading import load_block

torch = pytest.importorskip("torch", reason="the checkpoints are made with torch (the fixtures extra)")

from quantized_checkpoints import (  # noqa: E402
    Quantize,
    awq,
    compressed,
    fp8,
    gptq,
    packed_integers,
    plain_integers,
    scheme,
    write_quantized,
)

LONG = pytest.mark.skipif(not os.environ.get("MESH_TEST_QUANTIZED"), reason="takes minutes with its like: make test-quantized")
TINY = {**LLAMA, "num_hidden_layers": 2, "intermediate_size": 128}


@dataclass(frozen=True)
class Case:
    kind: str
    quantize: Quantize
    config: dict[str, Any]
    kept: str
    values: dict[str, Any]
    note: str = ""


def of_int8(activations: bool) -> dict[str, Any]:
    each = scheme(8, "int", "channel")
    if activations:
        each["input_activations"] = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    return compressed("int-quantized", each)


ROUNDS = "activations are not rounded"
CASES = {
    "gptq in its own order": Case(
        "Llama",
        gptq(4, 32, symmetric=False, shuffled=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False},
        "GPTQ of 4 bits",
        {},
    ),
    "traced, in its own order": Case(
        "Olmo2",
        gptq(4, 32, symmetric=True, shuffled=True),
        {"quant_method": "gptq", "bits": 4, "group_size": 32},
        "GPTQ of 4 bits, float16",
        {},
    ),
    "traced, with biases": Case(
        "Starcoder2",
        awq(32),
        {"quant_method": "awq", "bits": 4, "group_size": 32},
        "AWQ of 4 bits, float16",
        {"use_bias": True, "tie_word_embeddings": False},
    ),
    "awq with biases": Case("Qwen2", awq(32), {"quant_method": "awq", "bits": 4, "group_size": 32}, "AWQ of 4 bits", {}),
    "int8 and a tied head": Case("Llama", plain_integers(-1), of_int8(True), "int8", {"tie_word_embeddings": True}, ROUNDS),
    "int4 in fused projections": Case(
        "Phi3", packed_integers(4, 32, symmetric=True), compressed("pack-quantized", scheme(4, "int", "group", group_size=32)), "int4", {}
    ),
    "blocks of fp8": Case(
        "Qwen3", fp8((16, 32), "weight_scale_inv"), {"quant_method": "fp8", "weight_block_size": [16, 32]}, "fp8", {"head_dim": 16}, ROUNDS
    ),
}


def total(directory: Path, files: str) -> int:
    return sum(file.stat().st_size for file in directory.glob(files))


@pytest.mark.parametrize("name", [each if index < 1 else pytest.param(each, marks=LONG) for index, each in enumerate(CASES)])
def test_a_quantized_model_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = make_model(case.kind, {**TINY, **case.values})
    write_quantized(tmp_path / "source", model, case.quantize, case.config)
    manifest = import_model(tmp_path / "source", tmp_path / "model")
    report = manifest.report
    assert report["source_engine"].startswith("transformers") and report["source_error"] < 1e-4 and report["source_greedy_equal"] == 1.0
    assert manifest.weights.kept == case.kept and case.note in report.get("note", case.note)
    assert Manifest.load(tmp_path / "model").weights == manifest.weights
    prompt = np.random.default_rng(1).integers(0, manifest.vocab_size, 23).tolist()
    chain = Chain(tmp_path / "model", manifest.cache)
    got = np.concatenate([chain(prompt[:9]), chain(prompt[9:])])
    assert relative_error(got, logits_of(model, prompt)) < 1e-4
    if not case.values.get("tie_word_embeddings"):  # a table that is the head too is stored in both blocks
        assert total(tmp_path / "model", "*.data") < 1.1 * total(tmp_path / "source", "*.safetensors")


def test_sinks_and_experts_of_four_bits_compute_what_transformers_computes(tmp_path: Path) -> None:
    """gpt_oss as it is published: all experts of a layer in one tensor of MXFP4, and one more logit in the softmax of each head."""
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    values = {**LLAMA, "num_hidden_layers": 2, "head_dim": 16, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = make_model("GptOss", {**values, "sliding_window": 9})
    source, rng = tmp_path / "source", np.random.default_rng(0)
    model.save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("gate_up_proj", "down_proj")):
                experts, depth, out = value.shape
                blocks = torch.from_numpy(rng.integers(0, 256, (experts, out, depth // 32, 16), np.uint8))
                scales = torch.from_numpy(rng.integers(122, 125, (experts, out, depth // 32), np.uint8))
                del tensors[name]
                tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
                value.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "mxfp4"}}))
    manifest = import_model(source, tmp_path / "model")
    assert manifest.report["source_error"] < 1e-4 and manifest.report["source_greedy_equal"] == 1.0
    assert manifest.weights.kept == "MXFP4" and "note" not in manifest.report
    assert {each.window for each in manifest.cache} == {None, 9}
    held = [each for each in load_block(tmp_path / "model", "layer_001").weights.values() if isinstance(each, ExpertWeight)]
    assert [each.codes.group for each in held] == [32, 32] and all(each.codes.stored_as in ("5 bits", "int8") for each in held)
    prompt = rng.integers(0, manifest.vocab_size, 23).tolist()
    chain = Chain(tmp_path / "model", manifest.cache)
    expected = logits_of(model, prompt)
    assert relative_error(np.concatenate([chain(prompt[:9]), chain(prompt[9:])]), expected) < 1e-4
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(-1e4)  # as if there were none
    assert relative_error(logits_of(model, prompt), expected) > 1e-2


def test_experts_with_a_tensor_each_stay_as_they_are(tmp_path: Path) -> None:
    """Codes, scales and zero points of all experts of a layer become one weight of the block."""
    values = {**TINY, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1, "head_dim": 16}
    model = make_model("Qwen3Moe", values)
    config = compressed("pack-quantized", scheme(4, "int", "group", group_size=32))
    write_quantized(tmp_path / "source", model, packed_integers(4, 32, symmetric=False), config)
    manifest = import_model(tmp_path / "source", tmp_path / "model")
    assert manifest.report["source_error"] < 1e-4 and manifest.report["source_greedy_equal"] == 1.0
    assert manifest.weights.kept == "int4, float16"
    held = [each for each in load_block(tmp_path / "model", "layer_001").weights.values() if isinstance(each, ExpertWeight)]
    assert [(each.codes.stored_as, each.codes.group, each.codes.zero_point is not None) for each in held] == [("4 bits", 32, True)] * 2
    prompt = np.random.default_rng(1).integers(0, manifest.vocab_size, 23).tolist()
    assert relative_error(Chain(tmp_path / "model", manifest.cache)(prompt), logits_of(model, prompt)) < 1e-4


@LONG
def test_another_width_is_made_of_the_numbers_only_when_it_is_asked_for(tmp_path: Path) -> None:
    model = make_model("Llama", TINY)
    write_quantized(tmp_path / "source", model, gptq(4, 32, symmetric=True), CASES["gptq in its own order"].config)
    manifest = import_model(tmp_path / "source", tmp_path / "model", ImportOptions(bits=8))
    assert manifest.weights.kept is None and manifest.weights.bits == 8
    assert manifest.report["source_greedy_equal"] > 0.8


def test_a_quantization_that_is_not_supported_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    make_model("Llama", TINY, tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(UnsupportedModel, match=r"quantized by bitsandbytes are not supported .*: import the unquantized model, or a GGUF"):
        import_model(tmp_path / "source", tmp_path / "model")
    assert not (tmp_path / "model").exists()
