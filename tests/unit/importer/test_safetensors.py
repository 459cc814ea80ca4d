"""Blocks built from Hugging Face directories agree with transformers on every architecture."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ort_chain import Chain, relative_error
from tiny_models import LLAMA, logits_of, make_model
from tokenizers import Tokenizer, models

from mesh.errors import CorruptModel, ModelNotFound, UnsupportedModel, VerificationFailed
from mesh.importer.families import llama
from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model
from mesh.importer.sources.safetensors import open_source
from mesh.importer.write.blocks import BlockWriter

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
    "opt-plain-norms": Case(
        "OPT", {**GPT, "ffn_dim": 100, "word_embed_proj_dim": 60, "layer_norm_elementwise_affine": False, "enable_bias": False}
    ),
    "bloom": Case("Bloom", {k: v for k, v in GPT.items() if k not in ("max_position_embeddings", "num_attention_heads")} | {"n_head": 5}),
    "bloom-post-norm": Case(
        "Bloom",
        {"vocab_size": 199, "hidden_size": 64, "n_layer": 3, "n_head": 4, "apply_residual_connection_post_layernorm": True},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_prefill_chunks_and_decode_agree_with_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(CASES[name].config, CASES[name].values, tmp_path / "source")
    source = open_source(tmp_path / "source")
    steps: list[tuple[str, int, int]] = []
    blocks = source.write_blocks(BlockWriter(tmp_path), ImportOptions(), lambda *step: steps.append(step))
    assert [block.name for block in blocks] == ["embed", "layer_000", "layer_001", "layer_002", "head"]
    assert steps[-1][1:] == (5, 5)

    prompt = np.random.default_rng(1).integers(0, source.vocab_size, 23).tolist()
    want = logits_of(model, prompt)
    assert relative_error(Chain(tmp_path, source.cache)(prompt), want) < 1e-4

    chunked = Chain(tmp_path, source.cache)
    got = np.concatenate([chunked(prompt[start : start + 5]) for start in range(0, len(prompt), 5)])
    assert relative_error(got, want) < 1e-4

    tokens = list(prompt)
    logits = got[-1]
    for _ in range(12):
        tokens.append(int(logits.argmax()))
        logits = chunked([tokens[-1]])[0]
        want = logits_of(model, tokens)[-1]
        assert relative_error(logits, want) < 1e-4
        assert logits.argmax() == want.argmax()


def test_shards_and_sixteen_bit_sources_give_the_same_blocks(tmp_path: Path) -> None:
    """One file or many, bfloat16 widened by us or by torch: the same bytes, where 32 bits are asked for."""
    make_model("Llama", LLAMA, tmp_path / "one")
    model = make_model("Llama", LLAMA)
    model.bfloat16().save_pretrained(tmp_path / "many", max_shard_size="40KB")
    model.float().save_pretrained(tmp_path / "widened")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    digests = {}
    for name in ("one", "many", "widened"):
        (tmp_path / f"{name}.out").mkdir()
        blocks = open_source(tmp_path / name).write_blocks(BlockWriter(tmp_path / f"{name}.out"), ImportOptions(bits=32), lambda *_: None)
        digests[name] = [file.sha256 for block in blocks for file in block.files]
    assert digests["many"] == digests["widened"] != digests["one"]


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_sources_that_cannot_be_imported_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = tmp_path / "source"
    make_model("Llama", LLAMA, source)
    weights = source / "model.safetensors"
    whole, config = weights.read_bytes(), (source / "config.json").read_text()

    weights.write_bytes(whole[:-100])
    with pytest.raises(CorruptModel, match=rf"model.safetensors is not a whole .* it has {len(whole) - 100:,} bytes .* not fully covered"):
        open_source(source)
    weights.write_bytes(whole[:20])
    with pytest.raises(CorruptModel, match=r"not a whole safetensors file"):
        open_source(source)
    weights.write_bytes(b"{" * 5000)
    with pytest.raises(CorruptModel, match=r"not a whole safetensors file"):
        open_source(source)
    weights.write_bytes(whole)

    edit_config(source, model_type="bert")
    with pytest.raises(
        UnsupportedModel, match=r"no family of ours builds model_type 'bert' \(they build bloom, gemma3, .*qwen3\).*\[trace\]"
    ):
        open_source(source)
    edit_config(source, model_type="llama", num_key_value_heads="2")
    with pytest.raises(CorruptModel, match=r"num_key_value_heads is '2' where llama needs a positive integer"):
        open_source(source)
    edit_config(source, num_key_value_heads=2)
    edit_config(source, model_type="gemma3_text", use_bidirectional_attention=True)
    with pytest.raises(UnsupportedModel, match=r"makes it an encoder"):
        open_source(source)
    edit_config(source, model_type="llama", use_bidirectional_attention=None, quantization_config={"quant_method": "gptq"})
    with pytest.raises(CorruptModel, match=r"quantization_config does not read \(KeyError: 'bits'\)"):
        open_source(source)
    edit_config(source, quantization_config=None, num_hidden_layers=4)
    with pytest.raises(CorruptModel, match=r"no tensor model.layers.3"):
        open_source(source)
    edit_config(source, num_hidden_layers=2)
    with pytest.raises(UnsupportedModel, match=r"no use for the tensor model.layers.2"):
        open_source(source)
    edit_config(source, num_hidden_layers=3, vocab_size=200)
    with pytest.raises(CorruptModel, match=r"vocab_size is 200"):
        open_source(source)
    edit_config(source, vocab_size=199, num_attention_heads=2, head_dim=None)
    with pytest.raises(CorruptModel, match=r"k_proj.weight has shape .* where"):
        open_source(source)
    (source / "config.json").write_text(config[:50])
    with pytest.raises(CorruptModel, match=r"config.json is not JSON"):
        open_source(source)
    (source / "config.json").write_text(config)
    weights.unlink()
    with pytest.raises(ModelNotFound, match=r"neither model.safetensors nor"):
        open_source(source)
    with pytest.raises(ModelNotFound, match=r"no config.json"):
        open_source(tmp_path / "nothing")


@pytest.mark.parametrize("values", [{"sliding_window": None}, {"num_key_value_heads": None}])
def test_a_null_is_not_the_default_of_its_key(values: dict[str, Any], tmp_path: Path) -> None:
    """Mistral's default window is 4,096 tokens, and its default number of key heads 8: a configuration that says null has neither."""
    make_model("Mistral", {**LLAMA, "num_key_value_heads": 4, "sliding_window": 9}, tmp_path)
    edit_config(tmp_path, **values)
    cache = open_source(tmp_path).cache
    assert {c.kv_heads for c in cache} == {4}
    assert {c.window for c in cache} == ({None} if "sliding_window" in values else {9})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert {c.window for c in open_source(tmp_path).cache} == {4096}


def test_a_window_that_is_misread_is_found_although_no_prompt_of_the_check_is_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("Mistral", {**LLAMA, "sliding_window": 100}, tmp_path / "source")
    report = import_model(tmp_path / "source", tmp_path / "model").report
    assert report["source_engine"].startswith("transformers")
    assert report["late_positions"] == [96, 108, 248]
    monkeypatch.setattr(llama, "_window", lambda config, index: None)
    with pytest.raises(VerificationFailed, match=r"the logits at position 248 differ from those of transformers"):
        import_model(tmp_path / "source", tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_damage_that_a_user_can_mend_is_said_in_one_line(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = make_model("Llama", LLAMA, source)
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(CorruptModel, match=r"model.safetensors is a git-lfs pointer, not the file itself: run `git lfs pull`"):
        import_model(source, tmp_path / "out")
    model.model.norm.weight.data[3] = float("nan")
    model.save_pretrained(source)
    with pytest.raises(CorruptModel, match=r"tensor model.norm.weight holds NaN"):
        import_model(source, tmp_path / "out")
    weights.rename(source / "pytorch_model.bin")
    with pytest.raises(UnsupportedModel, match=r"has its weights as .bin files"):
        import_model(source, tmp_path / "out")
    (source / "pytorch_model.bin").unlink()
    weights.write_bytes(whole)
    (source / "tokenizer.json").write_text(Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a")).to_str())
    (source / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    with pytest.raises(CorruptModel, match=r"the chat template does not parse \(line 2: .*\)"):
        import_model(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_context_that_is_shorter_than_the_models_says_why(tmp_path: Path) -> None:
    make_model("Phi3", CASES["phi3-longrope"].values, tmp_path / "source")
    manifest = import_model(tmp_path / "source", tmp_path / "model")
    assert manifest.context_length == 64
    assert manifest.report["note"].startswith("the context ends at 64 of 256 tokens: beyond that the rotary frequencies change")


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    make_model("Llama", LLAMA, tmp_path, max_shard_size="40KB")
    part = sorted(tmp_path.glob("*.safetensors"))[1]
    part.unlink()
    with pytest.raises(CorruptModel, match=f"{part.name} is missing"):
        open_source(tmp_path)


def test_a_mixture_of_experts_stored_as_one_tensor_is_read_too(tmp_path: Path) -> None:
    """transformers saves Mixtral as one tensor an expert; newer checkpoints may keep its own fused form."""
    values = CASES["mixtral"].values
    model = make_model("Mixtral", values, tmp_path / "split")
    make_model("Mixtral", values, tmp_path / "fused", save_original_format=False)
    split, fused = open_source(tmp_path / "split"), open_source(tmp_path / "fused")
    prompt = np.random.default_rng(1).integers(0, split.vocab_size, 9).tolist()
    for name, source in (("a", split), ("b", fused)):
        (tmp_path / name).mkdir()
        source.write_blocks(BlockWriter(tmp_path / name), ImportOptions(), lambda *_: None)
        assert relative_error(Chain(tmp_path / name, source.cache)(prompt), logits_of(model, prompt)) < 1e-4


def digests(source: Path, out: Path) -> list[str]:
    out.mkdir()
    blocks = open_source(source).write_blocks(BlockWriter(out), ImportOptions(), lambda *_: None)
    return [file.sha256 for block in blocks for file in block.files]


@pytest.mark.parametrize("name", ["llama-llama3", "llama-linear", "gemma3", "gpt-neox", "phi3-longrope"])
def test_older_configurations_mean_the_same(name: str, tmp_path: Path) -> None:
    """Before rope_parameters there were rope_theta, rope_scaling and names of each architecture's own."""
    source = tmp_path / "source"
    make_model(CASES[name].config, CASES[name].values, source)
    new = digests(source, tmp_path / "new")
    config = json.loads((source / "config.json").read_text())
    rope = config.pop("rope_parameters")
    if name == "gemma3":
        config |= {"rope_theta": rope["full_attention"]["rope_theta"], "rope_local_base_freq": rope["sliding_attention"]["rope_theta"]}
        config |= {"layer_types": None, "sliding_window_pattern": 2, "rope_scaling": None}
    elif name == "gpt-neox":
        config |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}
    else:
        config |= {"rope_theta": rope.pop("rope_theta"), "partial_rotary_factor": rope.pop("partial_rotary_factor", None)}
        kind = rope.pop("rope_type")
        config["rope_scaling"] = {**rope, "type": "su" if kind == "longrope" else kind}
    (source / "config.json").write_text(json.dumps(config))
    assert digests(source, tmp_path / "old") == new


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_the_text_model_of_a_multimodal_gemma_is_found(prefix: str, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    source = tmp_path / "source"
    make_model(CASES["gemma3"].config, CASES["gemma3"].values, source)
    plain = digests(source, tmp_path / "plain")
    tensors = {prefix + name.removeprefix("model."): tensor for name, tensor in load_file(source / "model.safetensors").items()}
    tensors["vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": config, "vision_config": {}}))
    assert digests(source, tmp_path / "wrapped") == plain
