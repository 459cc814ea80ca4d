"""Layers that keep their states themselves compute the same with states from the common cache, in any number of parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_models import make_model, torch, transformers

from mesh.importer.run import import_model
from mesh.importer.trace.own_states import lightning_attention, linear_recurrence
from mesh.importer.trace.recurrences import recurrences

MINIMAX: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "head_dim": 8},
    **{"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "block_size": 8, "pad_token_id": None},
    **{"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
}


def randoms(*shapes: tuple[int, ...]) -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def same(got: Any, want: Any) -> bool:
    return bool(np.allclose(got.numpy(), want.numpy(), rtol=1e-4, atol=1e-5))


@pytest.mark.parametrize("before", [1, 9])
def test_a_linear_recurrence_in_two_parts_is_that_of_transformers_in_one(before: int) -> None:
    from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

    x, gate = randoms((2, 20, 6), (2, 20, 6))
    gate = gate.sigmoid()
    with torch.no_grad():
        wanted, wanted_after = RecurrentGemmaRglru._rnn_scan(None, x, gate, torch.zeros(2, 20, 1, dtype=torch.bool), None)
        first, state = linear_recurrence(x[:, :before], gate[:, :before])
        second, state = linear_recurrence(x[:, before:], gate[:, before:], state)
    assert same(torch.cat([first, second], dim=1), wanted) and same(state, wanted_after)


def test_lightning_attention_in_two_parts_is_that_of_transformers_in_one() -> None:
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.MiniMaxConfig(**MINIMAX)).eval()
    layer = model.model.layers[2].self_attn
    (hidden,) = randoms((2, 21, 32))
    cache, parts = transformers.DynamicCache(config=model.config), (hidden[:, :10], hidden[:, 10:])
    with torch.no_grad():
        own = MiniMaxCache()
        wanted, _ = layer(hidden, None, None, own)
        with recurrences(model):
            found = torch.cat([layer(part, None, None, _after(cache))[0] for part in parts], dim=1)
    assert same(found, wanted)
    assert same(cache.get_recurrent_state(2), own.get_linear_cache(2))
    ones = torch.ones(1, 1, 2, 4)
    _, after = lightning_attention(ones, ones, ones, torch.ones(2))
    assert tuple(after.shape) == (1, 2, 4, 4)


def _after(cache: Any) -> Any:
    """The cache with what the last part has left in it, if there was one."""
    for layer in cache.layers:
        if getattr(layer, "recurrent_states", None) and layer.recurrent_states[0] is not None:
            layer.has_previous_state[0] = True
    return cache


def test_a_model_with_lightning_attention_computes_what_transformers_computes(tmp_path: Any) -> None:
    make_model("MiniMax", MINIMAX, tmp_path / "source")
    manifest = import_model(tmp_path / "source", tmp_path / "model")
    report = manifest.report
    assert report["oracle"] == "onnxruntime" and report["source_error"] < 1e-4 and report["source_greedy_equal"] == 1.0
    assert [state.shape for state in manifest.cache[0].states] == [(4, 8, 8)]
