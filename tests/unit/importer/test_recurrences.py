"""The recurrences that are put in place of transformers' own while a model is traced compute the same, from any state on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_models import make_model, torch, transformers

from mesh.importer.run import import_model
from mesh.importer.trace.recurrences import recurrences, selective_states

QWEN: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": None},
    **{"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 6},
}


def randoms(*shapes: tuple[int, ...]) -> list[Any]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def same(got: Any, want: Any) -> bool:
    return bool(np.allclose(got.numpy(), want.numpy(), rtol=1e-4, atol=1e-5))


@pytest.mark.parametrize("tokens", [1, 5, 70])
@pytest.mark.parametrize("normed", [False, True])
def test_the_gated_delta_rule_is_that_of_transformers(tokens: int, normed: bool) -> None:
    from transformers.models.qwen3_next import modeling_qwen3_next as home

    q, k, v, g, beta, state = randoms((2, tokens, 2, 8), (2, tokens, 2, 8), (2, tokens, 4, 6), (2, tokens, 4), (2, tokens, 4), (2, 4, 8, 6))
    given = {"g": -g.abs(), "beta": beta.sigmoid(), "output_final_state": True, "use_qk_l2norm_in_kernel": normed}
    k = k / k.norm(dim=-1, keepdim=True)
    own = home.torch_chunk_gated_delta_rule
    model = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3NextConfig(**QWEN))
    with torch.no_grad(), recurrences(model):
        assert home.torch_chunk_gated_delta_rule is not own
        for before in (None, state):
            out, after = home.torch_chunk_gated_delta_rule(q, k, v, initial_state=before, **given)
            wanted, wanted_after = own(q, k, v, initial_state=before, **given)
            assert same(out, wanted) and same(after, wanted_after)
    assert home.torch_chunk_gated_delta_rule is own


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_the_recurrence_of_mamba_2_is_that_of_transformers(tokens: int) -> None:
    from transformers.models.bamba import modeling_bamba as home

    sizes = [(2, tokens, 4, 6), (2, tokens, 4), (4,), (2, tokens, 2, 8), (2, tokens, 2, 8), (4,), (4,), (2, 4, 6, 8)]
    x, dt, a, b, c, d, bias, state = randoms(*sizes)
    given = {"chunk_size": 16, "D": d, "dt_bias": bias, "dt_softplus": True, "return_final_states": True}
    with torch.no_grad():
        for limit in ((0.0, float("inf")), (0.1, 0.9)):
            for before in (None, state):
                options = {**given, "dt_limit": limit, "initial_states": before}
                out, after = selective_states(x, dt, -a.exp(), b, c, **options)
                wanted, wanted_after = home.mamba2_chunk_scan(x, dt, -a.exp(), b, c, **options)
                assert same(out, wanted) and same(after, wanted_after)
    assert isinstance(selective_states(x, dt, -a.exp(), b, c, dt_softplus=True), torch.Tensor)


def test_a_model_with_a_gated_delta_rule_computes_what_transformers_computes(tmp_path: Any) -> None:
    make_model("Qwen3Next", QWEN, tmp_path / "source")
    manifest = import_model(tmp_path / "source", tmp_path / "model")
    report = manifest.report
    assert report["oracle"] == "onnxruntime" and report["source_error"] < 1e-4 and report["source_greedy_equal"] == 1.0
    assert [layer.attends for layer in manifest.cache] == [False, True]
    assert [state.shape for state in manifest.cache[0].states] == [(56, 4), (4, 8, 6)]
