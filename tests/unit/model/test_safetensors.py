"""Blocks built from Hugging Face directories agree with transformers on every architecture."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ort_chain import Chain, relative_error

from mesh.errors import CorruptModel, ModelNotFound, UnsupportedModel
from mesh.model.blocks import BlockWriter
from mesh.model.importers.safetensors import open_source
from mesh.model.source import ImportOptions

torch = pytest.importorskip("torch", reason="the models are made with torch and transformers")
transformers = pytest.importorskip("transformers")

LLAMA = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}
GPT = {"vocab_size": 199, "hidden_size": 60, "num_hidden_layers": 3, "num_attention_heads": 5, "max_position_embeddings": 128}


@dataclass(frozen=True)
class Case:
    config: str
    values: dict[str, Any] = field(default_factory=dict)


def rope(**values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **values}}


CASES = {
    "llama": Case("Llama", LLAMA),
    "llama-head-dim": Case("Llama", {**LLAMA, "head_dim": 24, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "llama-tied": Case("Llama", {**LLAMA, "tie_word_embeddings": True, "num_key_value_heads": 4}),
    "llama-linear": Case("Llama", {**LLAMA, **rope(rope_type="linear", factor=4.0)}),
    "llama-llama3": Case(
        "Llama",
        {
            **LLAMA,
            **rope(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
        },
    ),
    "llama-yarn": Case("Llama", {**LLAMA, **rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)}),
    "mistral": Case("Mistral", {**LLAMA, "sliding_window": 7}),
    "mixtral": Case("Mixtral", {**LLAMA, "num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen2": Case("Qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    "qwen3": Case("Qwen3", {**LLAMA, "head_dim": 20, "tie_word_embeddings": True}),
    "phi3": Case("Phi3", {**LLAMA, "sliding_window": 9}),
    "phi3-longrope": Case(
        "Phi3",
        {
            **LLAMA,
            "original_max_position_embeddings": 64,
            **rope(
                rope_type="longrope",
                partial_rotary_factor=0.5,
                short_factor=[1.0, 1.1, 1.3, 1.7],
                long_factor=[2.0, 3.0, 4.0, 5.0],
                original_max_position_embeddings=64,
            ),
        },
    ),
    "gemma3": Case(
        "Gemma3Text",
        {**LLAMA, "head_dim": 24, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gemma3-capped": Case(
        "Gemma3Text",
        {**LLAMA, "sliding_window": 5, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 40},
    ),
    "gpt2": Case("GPT2", {**GPT, "n_inner": 100}),
    "gpt2-scaled": Case("GPT2", {**GPT, "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}),
    "gpt-neox": Case("GPTNeoX", {**GPT, "intermediate_size": 100}),
    "gpt-neox-sequential": Case(
        "GPTNeoX", {**GPT, "intermediate_size": 100, "use_parallel_residual": False, **rope(partial_rotary_factor=1.0)}
    ),
    "opt": Case("OPT", {**GPT, "ffn_dim": 100, "word_embed_proj_dim": 60}),
    "opt-post-norm": Case("OPT", {**GPT, "ffn_dim": 100, "word_embed_proj_dim": 28, "do_layer_norm_before": False}),
    "bloom": Case("Bloom", {k: v for k, v in GPT.items() if k not in ("max_position_embeddings", "num_attention_heads")} | {"n_head": 5}),
    "bloom-post-norm": Case(
        "Bloom",
        {"vocab_size": 199, "hidden_size": 64, "n_layer": 3, "n_head": 4, "apply_residual_connection_post_layernorm": True},
    ),
}


def make(case: Case, directory: Path, **saving: Any) -> Any:
    """A random model of that configuration, saved as Hugging Face does. Every parameter random: zeros and ones hide mistakes."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{case.config}Config")(**case.values, attn_implementation="eager")
        model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                spread = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5 * 1.5
                parameter.normal_(0.0, spread).add_(
                    1.0 if parameter.ndim == 1 and "bias" not in name and "gemma" not in case.config.lower() else 0.0
                )
        model.save_pretrained(directory, **saving)
    return model


def expected(model: Any, tokens: list[int]) -> np.ndarray:
    """Logits [len(tokens), vocab] of transformers without a cache."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()


@pytest.mark.parametrize("name", CASES)
def test_prefill_chunks_and_decode_agree_with_transformers(name: str, tmp_path: Path) -> None:
    model = make(CASES[name], tmp_path / "source")
    source = open_source(tmp_path / "source")
    steps: list[tuple[str, int, int]] = []
    blocks = source.write_blocks(BlockWriter(tmp_path), ImportOptions(), lambda *step: steps.append(step))
    assert [block.name for block in blocks] == ["embed", "layer_000", "layer_001", "layer_002", "head"]
    assert steps[-1][1:] == (5, 5)

    prompt = np.random.default_rng(1).integers(0, source.vocab_size, 23).tolist()
    want = expected(model, prompt)
    assert relative_error(Chain(tmp_path, source.cache)(prompt), want) < 1e-4

    chunked = Chain(tmp_path, source.cache)
    got = np.concatenate([chunked(prompt[start : start + 5]) for start in range(0, len(prompt), 5)])
    assert relative_error(got, want) < 1e-4

    tokens = list(prompt)
    logits = got[-1]
    for _ in range(12):
        tokens.append(int(logits.argmax()))
        logits = chunked([tokens[-1]])[0]
        want = expected(model, tokens)[-1]
        assert relative_error(logits, want) < 1e-4
        assert logits.argmax() == want.argmax()
