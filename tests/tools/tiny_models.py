"""Tiny random transformers models: every parameter random, because zeros and ones hide mistakes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the models are made with torch and transformers (the fixtures extra)")
transformers = pytest.importorskip("transformers", reason="the models are made with torch and transformers (the fixtures extra)")

LLAMA: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": None,
}


def make_model(kind: str, values: dict[str, Any], directory: Path | None = None, **saving: Any) -> Any:
    """A random `kind`ForCausalLM in float32, saved to `directory` as Hugging Face does."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(transformers, f"{kind}Config")(**values, attn_implementation="eager")
        model = transformers.AutoModelForCausalLM.from_config(config).eval().float()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 1.5 * parameter.shape[-1] ** -0.5)
                else:
                    parameter.normal_(0.0 if "bias" in name or kind.startswith("Gemma") else 1.0, 0.3)
        if directory is not None:
            model.save_pretrained(directory, **saving)
    return model


def logits_of(model: Any, tokens: list[int]) -> np.ndarray:
    """[len(tokens), vocab], without a cache."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(torch.tensor([tokens]), use_cache=False).logits[0].float().numpy()
