"""The recurrences that are put in place of transformers' own while a model is traced compute the same, from any state on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tiny_models import make_model, torch, transformers

from mesh.errors import VerificationFailed
from mesh.importer.run import import_model
from mesh.importer.trace import recurrences as home_of_recurrences
from mesh.importer.trace.recurrences import delta_rule, recurrences, selective_scan, selective_states

QWEN: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "pad_token_id": None},
    **{"layer_types": ["linear_attention", "full_attention"], "num_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 24, "shared_expert_intermediate_size": 24},
    **{"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 6},
}


MAMBA: dict[str, Any] = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "pad_token_id": None}
JAMBA: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": None, "attn_layer_period": 2, "attn_layer_offset": 1},
    **{"num_experts": 4, "mamba_d_state": 8, "mamba_dt_rank": 4},
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


@pytest.mark.parametrize("tokens", [1, 5, 70])
def test_the_delta_rule_of_kimi_is_that_of_transformers(tokens: int) -> None:
    from transformers.models.kimi_linear import modeling_kimi_linear as home

    q, k, v, g, beta, state = randoms(*[(2, tokens, 4, 8)] * 2, (2, tokens, 4, 6), (2, tokens, 4, 8), (2, tokens, 4), (2, 4, 8, 6))
    given = {"g": -g.abs() * 0.1, "beta": beta.sigmoid(), "output_final_state": True, "use_qk_l2norm_in_kernel": True}
    with torch.no_grad():
        for before in (None, state):
            out, after = delta_rule(q, k, v, initial_state=before, **given)
            wanted, wanted_after = home.chunk_kimi_delta_attention(q, k, v, initial_state=before, **given)
            assert same(out, wanted) and same(after, wanted_after)


@pytest.mark.parametrize("before", [0, 1, 20])
def test_the_recurrence_of_mamba_1_goes_on_where_transformers_computes_the_whole(before: int) -> None:
    """transformers' function begins with zeros, whatever state there is."""
    from transformers.models.mamba import modeling_mamba as home

    x, dt, z, b, c, a, d, bias = randoms(*[(2, 6, 27)] * 3, *[(2, 8, 27)] * 2, (6, 8), (6,), (6,))

    def part(start: int, stop: int) -> tuple[Any, ...]:
        own, other = (x, dt, z), (b, c)
        return (*(each[..., start:stop] for each in own), *(each[..., start:stop] for each in other))

    def given(z: Any) -> dict[str, Any]:
        return {"D": d, "z": z, "delta_bias": bias, "delta_softplus": True, "return_last_state": True}

    with torch.no_grad():
        wanted, wanted_after = home.mamba_selective_scan(x, dt, -a.exp(), b, c, **given(z))
        state, outs = None, []
        for start, stop in ((0, before), (before, 27)):
            if start < stop:
                x_, dt_, z_, b_, c_ = part(start, stop)
                out, state = selective_scan(x_, dt_, -a.exp(), b_, c_, initial_state=state, **given(z_))
                outs.append(out)
    assert same(torch.cat(outs, dim=-1), wanted) and same(state, wanted_after)


def test_a_model_with_a_gated_delta_rule_computes_what_transformers_computes(tmp_path: Any) -> None:
    make_model("Qwen3Next", QWEN, tmp_path / "source")
    manifest = import_model(tmp_path / "source", tmp_path / "model")
    report = manifest.report
    assert report["oracle"] == "onnxruntime" and report["source_error"] < 1e-4 and report["source_greedy_equal"] == 1.0
    assert [layer.attends for layer in manifest.cache] == [False, True]
    assert [state.shape for state in manifest.cache[0].states] == [(56, 4), (4, 8, 6)]


@pytest.mark.parametrize(("kind", "config", "attends"), [("Mamba", MAMBA, [False, False]), ("Jamba", JAMBA, [False, True])])
def test_a_model_of_mamba_1_computes_what_transformers_computes(
    kind: str, config: dict[str, Any], attends: list[bool], tmp_path: Any
) -> None:
    make_model(kind, config, tmp_path / "source")
    manifest = import_model(tmp_path / "source", tmp_path / "model")
    report = manifest.report
    assert report["oracle"] == "onnxruntime" and report["source_error"] < 1e-4 and report["source_greedy_equal"] == 1.0
    assert report["late_positions"] == [312]
    assert [layer.attends for layer in manifest.cache] == attends
    assert [state.shape for state in manifest.cache[0].states] == [(64, 4), (64, 8)]


def test_a_state_that_is_forgotten_between_chunks_is_found_at_import(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_zeros(before: list[Any], *args: Any, **given: Any) -> Any:
        return selective_scan(*args, initial_state=before.pop(0) * 0 if before else None, **given)

    monkeypatch.setattr(home_of_recurrences, "_scan_after", from_zeros)
    make_model("Mamba", MAMBA, tmp_path / "source")
    with pytest.raises(VerificationFailed, match="differ"):
        import_model(tmp_path / "source", tmp_path / "model")
    assert not (tmp_path / "model").exists()
