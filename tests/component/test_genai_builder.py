"""What onnxruntime-genai's builder makes of tiny models imports, its codes are kept, and its tokens are onnxruntime's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mesh.importer.run import import_model

LONG = pytest.mark.skipif(not os.environ.get("MESH_TEST_QUANTIZED"), reason="takes minutes with its like: make test-quantized")
GEMMA2 = {"sliding_window": 9, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "head_dim": 16}
WIDE = {"hidden_size": 128}  # rotary tables of a part of a head are multiples of 8
BUILT: dict[str, tuple[str, dict[str, Any], str, list[str], str | None]] = {
    "a windowed cache, one weight for table and head": ("Gemma2", GEMMA2, "int4", ["algo_config=k_quant_mixed"], "4 bits, 8 bits"),
    "zero points": ("Llama", {}, "int4", ["block_size=16", "is_symmetric=false"], "4 bits"),
    "llama": ("Llama", {}, "int4", [], "4 bits"),
    "llama, tied": ("Llama", {"tie_word_embeddings": True}, "int4", [], "4 bits"),
    "llama, mixed": ("Llama", {}, "int4", ["algo_config=k_quant_mixed"], "4 bits, 8 bits"),
    "llama, 8 bits": ("Llama", {}, "int8", [], "8 bits"),
    "llama, QDQ": ("Llama", {}, "int4", ["use_qdq=true"], "4 bits"),
    "llama, 32 bits": ("Llama", {}, "fp32", [], None),
    "mistral": ("Mistral", {"sliding_window": 9}, "int4", [], "4 bits"),
    "qwen2": ("Qwen2", {}, "int4", [], "4 bits"),
    "qwen3": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 16}, "int4", [], "4 bits"),
    "phi3": ("Phi3", {"max_position_embeddings": 4096, "original_max_position_embeddings": 4096}, "int4", [], "4 bits"),
    "phi": ("Phi", WIDE, "int4", [], "4 bits"),
    "smollm3": ("SmolLM3", {}, "int4", [], "4 bits"),
    "nemotron": ("Nemotron", WIDE, "int4", [], "4 bits"),
    "ernie": ("Ernie4_5", {"head_dim": 16}, "int4", [], "4 bits"),
    "hunyuan": ("HunYuanDenseV1", {"head_dim": 16}, "int4", [], "4 bits"),
    "gemma": ("Gemma", {"head_dim": 16}, "int4", [], "4 bits"),
    "gemma2": ("Gemma2", GEMMA2, "int4", [], "4 bits"),
    "granite": ("Granite", {}, "int4", [], "4 bits"),
}


@pytest.mark.parametrize("name", [each if index < 1 else pytest.param(each, marks=LONG) for index, each in enumerate(BUILT)])
def test_what_onnxruntime_genai_builds_is_imported(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai", reason="the fixtures extra")
    from tiny_models import LLAMA, make_model
    from tokenizers import Tokenizer, models

    kind, values, precision, options, kept = BUILT[name]
    source = tmp_path / "source"
    make_model(kind, {**LLAMA, "intermediate_size": 128, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2, **values}, source)
    Tokenizer(models.WordLevel({str(n): n for n in range(199)}, unk_token="0")).save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "2"}')
    command = ["-i", source, "-o", tmp_path / "built", "-p", precision, "-e", "cpu", "-c", tmp_path / "cache"]
    command += ["--extra_options", *options] if options else []
    built = subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", *map(str, command)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    manifest = import_model(tmp_path / "built", tmp_path / "model")
    assert manifest.report["source_error"] < 1e-5 and manifest.report["source_greedy_equal"] == 1.0
    assert manifest.weights.kept == kept
    layers = sum(block.weight_bytes for block in manifest.blocks if block.name.startswith("layer"))
    tables = 2 * 4 * manifest.layers * manifest.context_length * manifest.cache[0].key_dim  # of angles, in every layer
    assert layers - tables < 1.1 * (tmp_path / "built" / "model.onnx.data").stat().st_size
