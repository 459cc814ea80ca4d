"""Families that are refused by what config.json says: before torch is loaded, and in the words of the refusal after it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import LLAMA

from mesh.errors import UnsupportedModel
from mesh.importer.run import refuse_by_name
from mesh.importer.trace import refused
from mesh.importer.trace.model import cache_shapes, open_model

IMPORTED = """
import sys
from mesh.cli import main
for directory in sys.argv[1:]:
    assert main(["import", directory, f"{directory}/out"])
print(sorted({"torch", "transformers", "jax", "onnx_ir"} & set(sys.modules)))
"""
TEXT = {**LLAMA, "num_hidden_layers": 2}
QWEN4 = {
    **{**TEXT, "layer_types": ["indexed_attention", "linear_attention"], "indexer_n_heads": 2},
    **{"indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2, "head_dim": 8},
}
BY_SETTINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "layers that run several times": (
        "hrm_text",
        {**LLAMA, "num_hidden_layers": 6, "H_cycles": 2, "L_cycles": 2, "head_dim": 16},
        "the layers of hrm_text run 4 times for each token, on what the last time has made: they cannot be divided between shards",
    ),
    "layers that run as often as nothing says": (
        "dory",
        {},
        "the layers of dory run 2 times for each token, on what the last time has made: they cannot be divided between shards",
    ),
    "experts chosen by other tokens": (
        "doge",
        {**TEXT, "is_moe": True, "num_experts": 16},
        "doge chooses experts for a token by the numbers of other tokens: not served",
    ),
    "a prompt that is read in both directions": (
        "paligemma",
        {"text_config": {**TEXT, "model_type": "gemma", "head_dim": 16}},
        "paligemma attends to later positions of its prompt (use_bidirectional_attention): not served",
    ),
    "the same as a setting": (
        "gemma2",
        {**TEXT, "head_dim": 16, "use_bidirectional_attention": True},
        "gemma2 attends to later positions of its prompt (use_bidirectional_attention): not served",
    ),
    "an encoder": ("t5", {}, "t5 is an encoder with a decoder: only decoders alone are served"),
    "a family inside another": (
        "qwen4_exp",
        {"text_config": {**QWEN4, "model_type": "qwen4_exp_text"}},
        f"qwen4_exp {refused.INDEXERS}: not served",
    ),
}


NEEDS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
    "prophetnet": {"is_encoder_decoder": False},
}
"""What a configuration asks for beside its defaults."""


def saved(kind: str, values: dict[str, Any], directory: Path) -> Path:
    """A directory with the configuration as transformers saves it, and a file that is no weights."""
    import transformers

    directory.mkdir()
    transformers.CONFIG_MAPPING[kind](**values).save_pretrained(directory)
    (directory / "model.safetensors").write_bytes(b"never read")
    return directory


def by_library(directory: Path) -> str:
    with pytest.raises(UnsupportedModel) as caught:
        open_model(directory)
    return str(caught.value)


def test_what_a_configuration_says_is_refused_without_torch_and_in_the_same_words(tmp_path: Path) -> None:
    expected = {}
    for case, (kind, values, message) in BY_SETTINGS.items():
        directory = saved(kind, values, tmp_path / case)
        expected[case] = f"{directory / 'config.json'}: {message}"
        assert by_library(directory) == expected[case]
    for kind, why in refused.NOT_SERVED.items():
        directory = saved(kind, NEEDS.get(kind, {}), tmp_path / kind)
        expected[kind] = f"{directory / 'config.json'}: {kind} {why}: not served"
        assert by_library(directory) == expected[kind]
    call = [sys.executable, "-c", IMPORTED, *(str(tmp_path / each) for each in expected)]
    ran = subprocess.run(call, capture_output=True, text=True, check=True)
    assert ran.stderr.splitlines() == [f"mesh: {each}" for each in expected.values()] and ran.stdout == "[]\n"


@pytest.mark.parametrize(("kind", "values"), [("hrm_text", {"H_cycles": 2, "L_cycles": 3}), ("hrm_text", {"H_cycles": 1, "L_cycles": 2})])
def test_settings_say_how_often_layers_run_when_they_are_called(
    kind: str, values: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved(kind, {**LLAMA, "num_hidden_layers": 2, "head_dim": 16, **values}, tmp_path / kind)
    told = by_library(directory)
    monkeypatch.setattr(refused, "TIMES", {})
    with pytest.raises(UnsupportedModel) as counted:
        cache_shapes(open_model(directory))
    assert str(counted.value) == told


def test_an_indexer_of_a_family_that_no_list_names_is_refused_when_the_model_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = saved("qwen4_exp_text", QWEN4, tmp_path / "qwen4")
    told = by_library(directory)
    monkeypatch.setattr(refused, "NOT_SERVED", {})
    assert by_library(directory) == told


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("bart", {"is_encoder_decoder": True, "architectures": ["BartForCausalLM"]}),
        ("doge", {}),
        ("paligemma", {"text_config": {"model_type": "gemma", "use_bidirectional_attention": False}}),
        ("dory", {"n_recurrent_loops": 1}),
        ("hrm_text", {"H_cycles": "many", "L_cycles": 1}),  # the library's to refuse
        ("gemma4", {"text_config": None}),
    ],
)
def test_what_a_setting_makes_a_decoder_is_not_refused(kind: str, values: dict[str, Any]) -> None:
    refused.refuse_config_file(Path("config.json"), json.loads(json.dumps({"model_type": kind, **values})))


def test_a_directory_with_an_export_is_not_refused_by_the_configuration_beside_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"never read")
    with pytest.raises(UnsupportedModel, match="rwkv keeps a state"):
        refuse_by_name(tmp_path)
    weights.rename(tmp_path / "model.onnx")
    refuse_by_name(tmp_path)
