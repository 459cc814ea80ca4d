"""A small Llama with random weights, imported once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from mesh.importer.run import import_model

LAYERS, HIDDEN, HEADS, KV_HEADS, DIM, MLP, VOCAB, CONTEXT = 5, 48, 6, 2, 8, 80, 131, 96


def write_llama(directory: Path, *, seed: int = 0, dim: int = DIM, hidden: int = HIDDEN) -> Path:
    """config.json and model.safetensors of a random Llama whose greedy tokens vary. `dim`: of a head."""
    rng = np.random.default_rng(seed)
    directory.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": dim,
        "vocab_size": VOCAB,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    (directory / "config.json").write_text(json.dumps(config))

    def matrix(out: int, size: int) -> np.ndarray:
        return (rng.standard_normal((out, size)) * 1.6 / np.sqrt(size)).astype(np.float32)

    def norm() -> np.ndarray:
        return (1 + 0.2 * rng.standard_normal(hidden)).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(VOCAB, hidden) * 5,
        "model.norm.weight": norm(),
        "lm_head.weight": matrix(VOCAB, hidden) * 3,
    }
    for layer in range(LAYERS):
        shapes = {
            "self_attn.q_proj": (HEADS * dim, hidden),
            "self_attn.k_proj": (KV_HEADS * dim, hidden),
            "self_attn.v_proj": (KV_HEADS * dim, hidden),
            "self_attn.o_proj": (hidden, HEADS * dim),
            "mlp.gate_proj": (MLP, hidden),
            "mlp.up_proj": (MLP, hidden),
            "mlp.down_proj": (hidden, MLP),
        }
        prefix = f"model.layers.{layer}."
        tensors |= {f"{prefix}{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        tensors |= {f"{prefix}{name}.weight": norm() for name in ("input_layernorm", "post_attention_layernorm")}
    save_file(tensors, directory / "model.safetensors")
    return directory


@pytest.fixture(scope="session")
def new_llama() -> Callable[..., Path]:
    return write_llama


@pytest.fixture(scope="session")
def llama_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, llama_source: Path) -> Path:
    """The model directory."""
    out = tmp_path_factory.mktemp("models") / "llama"
    import_model(llama_source, out)
    return out
