"""Hugging Face directories of families that nothing here builds: transformers' own implementation is traced."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ort_chain import Chain, relative_error
from tiny_models import LLAMA, logits_of, make_model, torch

from mesh.errors import CorruptModel, UnsupportedModel
from mesh.importer import run
from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model
from mesh.importer.trace import model as model_module
from mesh.importer.trace.model import cache_shapes, open_model
from mesh.importer.verify import outside
from mesh.lowering.experts import ExpertWeight
from mesh.model.manifest import Manifest
from mesh.runtime.loading import load_block

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "soft caps and two kinds of layers": (
        "Gemma2",
        {
            **LLAMA,
            "num_hidden_layers": 2,
            "head_dim": 24,
            "sliding_window": 9,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 9.0,
        },
    ),
    "experts, one tensor each in the checkpoint": (
        "Qwen2Moe",
        {**LLAMA, "num_hidden_layers": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"shared_expert_intermediate_size": 40},
    ),
    "complex rotary positions and chunks": (
        "Llama4Text",
        {**LLAMA, "num_hidden_layers": 3, "head_dim": 16, "intermediate_size_mlp": 40, "num_local_experts": 4, "attention_chunk_size": 10}
        | {"no_rope_layers": [1, 0, 1], "floor_scale": 4, "interleave_moe_layer_step": 2},
    ),
    "layers that read the keys and values of earlier ones, and an embedding for each layer": (
        "Gemma4Text",
        {**LLAMA, "num_hidden_layers": 3, "head_dim": 16, "global_head_dim": 24, "sliding_window": 9, "num_kv_shared_layers": 1}
        | {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "hidden_size_per_layer_input": 8}
        | {"vocab_size_per_layer_input": LLAMA["vocab_size"], "eos_token_id": None, "bos_token_id": None},
    ),
    "keys picked by a list of one number": (
        "Falcon",
        {**LLAMA, "num_hidden_layers": 2, "new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 112},
    ),
    "a bias of positions from the end": (
        "Mpt",
        {"vocab_size": LLAMA["vocab_size"], "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256, "expansion_ratio": 2},
    ),
    "latents in the cache": (
        "DeepseekV3",
        {**LLAMA, "num_hidden_layers": 2, "num_key_value_heads": LLAMA["num_attention_heads"], "q_lora_rank": 24, "kv_lora_rank": 16}
        | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2}
        | {"n_group": 1, "topk_group": 1, "moe_intermediate_size": 24, "first_k_dense_replace": 1},
    ),
    "a number of each position beside its scores": ("Doge", {**LLAMA, "num_hidden_layers": 2}),
    "the difference of two attentions": (
        "DiffLlama",
        {**LLAMA, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4},
    ),
    "experts for queries and outputs": (
        "JetMoe",
        {"vocab_size": LLAMA["vocab_size"], "hidden_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 4, "kv_channels": 16}
        | {"intermediate_size": 48, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 256},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_traced_model_computes_what_transformers_computes(case: str, tmp_path: Path) -> None:
    kind, values = CASES[case]
    model = make_model(kind, values, tmp_path / "source")
    manifest = import_model(tmp_path / "source", tmp_path / "model")
    report = manifest.report
    assert report["source_engine"].startswith("transformers") and report["source_error"] < 1e-4 and report["source_greedy_equal"] == 1.0
    assert report["made_by"]["way"] == "trace" and report["made_by"].keys() >= {"torch", "transformers"}
    assert max(report["late_positions"]) == 248  # the end of the context, beyond every window
    assert Manifest.load(tmp_path / "model").source == "safetensors"
    prompt = np.random.default_rng(1).integers(0, manifest.vocab_size, 23).tolist()
    chain = Chain(tmp_path / "model", manifest.cache)
    got = np.concatenate([chain(prompt[:9]), chain(prompt[9:])])
    assert relative_error(got, logits_of(model, prompt)) < 1e-4


@pytest.mark.parametrize(("bits", "stored"), [(32, "float32"), (16, "float16"), (8, "int8"), (4, "4 bits")])
def test_experts_are_held_as_the_options_say(bits: Any, stored: str, tmp_path: Path) -> None:
    """The import itself compares the blocks with onnxruntime, and the logits with transformers."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
    make_model("Qwen3Moe", {**LLAMA, "num_hidden_layers": 2, **experts}, tmp_path / "source")
    import_model(tmp_path / "source", tmp_path / "model", ImportOptions(bits=bits))
    held = [each for each in load_block(tmp_path / "model", "layer_001").weights.values() if isinstance(each, ExpertWeight)]
    assert [each.codes.stored_as for each in held] == [stored] * 2


@pytest.mark.parametrize("kind", ["StableLm", "Mamba"])
def test_a_model_too_large_to_run_whole_is_compared_module_by_module(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of Mamba reads the weights of its convolution without calling it."""
    monkeypatch.setattr(outside, "WHOLE_CHECKPOINT_BYTES", 0)
    sizes = {**LLAMA, "num_hidden_layers": 2}
    make_model(kind, sizes if kind == "StableLm" else {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 199}, tmp_path / "source")
    report = import_model(tmp_path / "source", tmp_path / "model").report
    assert report["source_error"] < 1e-4 and report["source_greedy_equal"] == 1.0


def edit_config(directory: Path, **values: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_what_cannot_be_traced_is_refused_by_name_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    make_model("StableLm", LLAMA, source)
    whole = (source / "config.json").read_text()
    edit_config(source, model_type="nothing_known")
    with pytest.raises(UnsupportedModel, match=r"transformers 5\.\S+ does not know the model_type nothing_known: install"):
        import_model(source, out)
    edit_config(source, auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (source / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UnsupportedModel, match=r"the model is code of its own directory, which is not run: .*--trust-remote-code"):
        import_model(source, out)
    assert not (tmp_path / "ran").exists()
    (source / "config.json").write_text(whole)
    edit_config(source, num_hidden_layers=4)
    with pytest.raises(CorruptModel, match=r"no tensor for the parameter model\.layers\.3\."):
        import_model(source, out)
    monkeypatch.setattr(run, "available", lambda: False)
    with pytest.raises(UnsupportedModel, match=r"builds model_type 'stablelm' .*pip install 'stagemesh\[trace\]'"):
        import_model(source, out)
    assert not out.exists()


INDEXED = (
    "DeepseekV32",
    {**LLAMA, "num_hidden_layers": 2, "num_key_value_heads": LLAMA["num_attention_heads"], "q_lora_rank": 24, "kv_lora_rank": 16}
    | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1}
    | {
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 40,
    },
)


HIDING = ("Doge", {**LLAMA, "num_hidden_layers": 2, "keep_window_size": 40})


@pytest.mark.parametrize(
    ("kind", "values", "why"),
    [(*INDEXED, "an indexer chooses the positions"), (*HIDING, "attention hides the positions with the lowest scores")],
    ids=["an indexer", "hidden scores"],
)
def test_a_context_ends_where_positions_would_be_left_out(kind: str, values: dict[str, Any], why: str, tmp_path: Path) -> None:
    model = make_model(kind, values, tmp_path / "source")
    manifest = import_model(tmp_path / "source", tmp_path / "model")
    assert manifest.context_length == 40 and manifest.report["source_greedy_equal"] == 1.0
    assert f"context ends at 40 of 256 tokens: beyond that {why}" in manifest.report["note"]
    prompt = np.random.default_rng(1).integers(0, manifest.vocab_size, 40).tolist()
    assert relative_error(Chain(tmp_path / "model", manifest.cache)(prompt), logits_of(model, prompt)) < 1e-4


def test_of_adapters_for_languages_those_of_the_default_language_are_served(tmp_path: Path) -> None:
    values = {**LLAMA, "num_hidden_layers": 2, "is_decoder": True, "languages": ("en_XX", "de_DE"), "default_language": "de_DE"}
    model = make_model("Xmod", {**values, "adapter_layer_norm": True, "pad_token_id": 1}, tmp_path / "source")
    manifest = import_model(tmp_path / "source", tmp_path / "model")
    assert manifest.report["source_greedy_equal"] == 1.0 and "the language de_DE alone" in manifest.report["note"]
    prompt = np.random.default_rng(1).integers(0, manifest.vocab_size, 23)
    chain = Chain(tmp_path / "model", manifest.cache)
    got = np.concatenate([chain(prompt[:9].tolist()), chain(prompt[9:].tolist())])
    given = {"position_ids": torch.arange(23)[None], "use_cache": False}  # as generate gives them: without them positions begin at 2
    with torch.no_grad():
        english, german = (model(torch.from_numpy(prompt)[None], lang_ids=torch.tensor([n]), **given).logits[0].numpy() for n in (0, 1))
    assert relative_error(got, german) < 1e-4 < 0.1 < relative_error(got, english)


def test_a_model_that_keeps_nothing_between_steps_gets_a_cache(tmp_path: Path) -> None:
    values = {"vocab_size": LLAMA["vocab_size"], "n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4}
    model = make_model("OpenAIGPT", values, tmp_path / "source")
    manifest = import_model(tmp_path / "source", tmp_path / "model")
    assert [kept.kv_heads for kept in manifest.cache] == [4, 4]
    prompt = np.random.default_rng(1).integers(0, manifest.vocab_size, 23).tolist()
    chain = Chain(tmp_path / "model", manifest.cache)
    got = np.concatenate([chain(prompt[:9]), chain(prompt[9:])])
    assert relative_error(got, logits_of(model, prompt)) < 1e-4


def test_the_language_model_is_built_alone_where_what_is_around_it_needs_another_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers
    from safetensors.numpy import load_file, save_file

    source = tmp_path / "source"
    model = make_model("Gemma2", {**LLAMA, "num_hidden_layers": 2, "head_dim": 16}, source)
    text = {**model.config.to_dict(), "use_bidirectional_attention": False}
    whole = transformers.PaliGemmaConfig(text_config=text, vision_config={"num_hidden_layers": 1})
    whole.save_pretrained(source)
    tensors = load_file(source / "model.safetensors")
    inside = {name.replace("model.", "model.language_model.", 1): each for name, each in tensors.items()}
    save_file(inside, source / "model.safetensors")

    def needs_more(*_: Any, **__: Any) -> None:
        raise ImportError("the vision tower needs a package that is not there")

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_config", needs_more)
    manifest = import_model(source, tmp_path / "model")
    assert "the text decoder alone" in manifest.report["note"] and manifest.report["source_greedy_equal"] == 1.0
    prompt = np.random.default_rng(1).integers(0, manifest.vocab_size, 23).tolist()
    assert relative_error(Chain(tmp_path / "model", manifest.cache)(prompt), logits_of(model, prompt)) < 1e-4


def test_a_choice_by_numbers_in_python_is_refused_where_nothing_stands_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, values = CASES["experts for queries and outputs"]
    make_model(kind, values, tmp_path)
    monkeypatch.setattr(model_module, "python_forms", lambda _: nullcontext())
    with pytest.raises(
        UnsupportedModel, match=r"jetmoe asks for numbers while it runs, to decide what it computes \(.*\): it cannot be traced"
    ):
        cache_shapes(open_model(tmp_path))
