"""GGUF files of architectures that nothing here builds: transformers' implementation is traced, with the weights of the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from ort_chain import Chain, relative_error
from tiny_models import LLAMA, logits_of, make_model

from mesh.errors import CorruptModel, UnsupportedModel
from mesh.importer.run import import_model
from mesh.importer.sources.gguf_blocks import FORMS, kept
from mesh.importer.sources.gguf_file import GgufCheckpoint
from mesh.importer.trace.gguf_config import architecture_of, configuration
from mesh.importer.trace.gguf_weights import GgufParameters
from mesh.importer.trace.model import model_of
from mesh.importer.trace.reference import TransformersReference
from mesh.lowering.experts import ExpertWeight
from mesh.runtime.loading import load_block

BASE = {**LLAMA, "num_hidden_layers": 2}
HEADS, KV_HEADS = LLAMA["num_attention_heads"], LLAMA["num_key_value_heads"]
SIZES: Mapping[str, Any] = {
    "block_count": 2,
    "context_length": LLAMA["max_position_embeddings"],
    "embedding_length": LLAMA["hidden_size"],
    "feed_forward_length": LLAMA["intermediate_size"],
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
}
PROMPT = np.random.default_rng(1).integers(0, LLAMA["vocab_size"], 23)
Stored = Callable[[str, np.ndarray], np.ndarray]


def as_it_is(name: str, array: np.ndarray) -> np.ndarray:
    return array


def in_pairs(name: str, array: np.ndarray) -> np.ndarray:
    """Queries and keys as llama.cpp's converter stores those of LLaMA's kin."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return array
    heads = HEADS if "q_proj" in name else KV_HEADS
    return array.reshape(heads, 2, len(array) // heads // 2, -1).swapaxes(1, 2).reshape(array.shape)


def norms_plus_one(name: str, array: np.ndarray) -> np.ndarray:
    return array + 1 if name.endswith("norm.weight") else array


def kinds_apart(name: str, array: np.ndarray) -> np.ndarray:
    """Queries, keys and values of Falcon as llama.cpp's converter stores them: each kind together, not each group of heads."""
    if not name.endswith("query_key_value.weight"):
        return array
    groups = array.reshape(KV_HEADS, HEADS // KV_HEADS + 2, -1, array.shape[-1])
    return np.concatenate([groups[:, each].reshape(-1, array.shape[-1]) for each in (slice(0, -2), [-2], [-1])])


def states(name: str, array: np.ndarray) -> np.ndarray:
    """The decay of states and short convolutions as llama.cpp's converter stores them."""
    return -np.exp(array) if name.endswith("A_log") else array.squeeze(1) if ".conv" in name and array.ndim == 3 else array


def values_apart(name: str, array: np.ndarray) -> np.ndarray:
    """A gated delta net of 2 key heads with 2 values each as llama.cpp's converter stores it: the first value of both, then the second."""

    def heads(rows: np.ndarray) -> np.ndarray:
        return rows.reshape(4, -1, *rows.shape[1:])[[0, 2, 1, 3]].reshape(rows.shape)

    if name.endswith("norm.weight"):
        return array if "linear_attn" in name else array + 1
    if name.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        return np.concatenate([array[:32], heads(array[32:])]).squeeze()
    if name.endswith("out_proj.weight"):
        return heads(array.T).T
    if name.endswith(("A_log", "dt_bias", "in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight")):
        return heads(states(name, array))
    return array


def turned_apart(name: str, array: np.ndarray) -> np.ndarray:
    """Queries and keys of GLM-4V as they are stored: of the turned half of a head the first of all pairs, then the second."""
    if not name.endswith(("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")):
        return array
    heads = array.reshape(HEADS if "q_proj" in name else KV_HEADS, 16, -1)
    return np.concatenate([heads[:, 0:8:2], heads[:, 1:8:2], heads[:, 8:]], axis=1).reshape(array.shape)


def fits(array: Any) -> bool:
    """Whether a matrix, or one of several, has blocks of 32."""
    return array.ndim in (2, 3) and array.shape[-1] % 32 == 0


def one_by_one(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The parameters of a model with the gates and ups of its experts apart."""
    for name, value in state.items():
        if name.endswith(".experts.gate_up_proj"):
            for part, rows in zip(("gate_proj", "up_proj"), value.chunk(2, dim=1), strict=True):
                yield name.replace("gate_up_proj", f"{part}.weight"), rows
        else:
            yield (f"{name}.weight" if name.endswith(".experts.down_proj") else name), value


def write(path: Path, architecture: str, model: Any, keys: Mapping[str, Any], stored: Stored = as_it_is, quantized: bool = False) -> None:
    """`keys`: without the architecture's name before them. `quantized`: matrices as Q8_0."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in keys.items():
        add: Mapping[type, Callable[[str, Any], None]] = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        add[type(value)](key if key.startswith("xielu.") else f"{architecture}.{key}", value)
    writer.add_tokenizer_model("none")
    kind = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, 2)
    for name, value in one_by_one(model.state_dict()):
        theirs = names.get_name(name.replace(".dt_bias", ".dt_proj.bias"), try_suffixes=(".weight", ".bias"))
        if theirs is None or (name == "lm_head.weight" and model.config.tie_word_embeddings):
            continue
        array = np.ascontiguousarray(stored(name, value.float().numpy()), np.float32)
        if quantized and fits(array):
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(theirs, gguf.quants.quantize(array, q8), raw_dtype=q8)
        else:
            writer.add_tensor(theirs, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


STARCODER2 = {**SIZES, "attention.layer_norm_epsilon": 1e-5, "rope.freq_base": 5000.0}
GRANITE = {
    **SIZES,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.dimension_count": LLAMA["hidden_size"] // HEADS,
    "attention.scale": 0.3,
    "embedding_scale": 3.0,
    "residual_scale": 0.5,
    "logit_scale": 2.0,
}
GEMMA2 = {
    **SIZES,
    "attention.layer_norm_rms_epsilon": 1e-6,
    "attention.key_length": 24,
    "attention.value_length": 24,
    "attention.sliding_window": 9,
    "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 9.0,
}
FALCON = {**SIZES, "attention.layer_norm_epsilon": 1e-5, "tensor_data_layout": "jploski"}
MAMBA = {
    **{"block_count": 2, "context_length": 1 << 20, "embedding_length": 64, "feed_forward_length": 0, "attention.head_count": 0},
    **{"ssm.conv_kernel": 3, "ssm.inner_size": 128, "ssm.state_size": 8, "ssm.time_step_rank": 6, "ssm.dt_b_c_rms": False},
    "attention.layer_norm_rms_epsilon": 1e-3,
}
OF_MAMBA = {"vocab_size": LLAMA["vocab_size"], "hidden_size": 64, "num_hidden_layers": 2, "layer_norm_epsilon": 1e-3}
OF_MAMBA |= {"conv_kernel": 3, "state_size": 8, "time_step_rank": 6}
LFM2 = {**SIZES, "attention.head_count_kv": [0, KV_HEADS], "attention.layer_norm_rms_epsilon": 1e-3, "shortconv.l_cache": 4}
QWEN35 = {
    **{**SIZES, "attention.key_length": 16, "attention.value_length": 16, "attention.layer_norm_rms_epsilon": 1e-6},
    **{"rope.dimension_count": 4, "rope.dimension_sections": [1, 1, 0, 0], "rope.freq_base": 9000.0},
    **{"ssm.conv_kernel": 4, "ssm.group_count": 2, "ssm.inner_size": 32, "ssm.state_size": 8, "ssm.time_step_rank": 4},
    **{"attention.recurrent_layers": [True, False], "full_attention_interval": 4},
}
DELTA: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "head_dim": 16,
}
DELTA |= {"layer_types": ["linear_attention", "full_attention"], "rms_norm_eps": 1e-6}
DELTA["rope_parameters"] = {"rope_type": "default", "rope_theta": 9000.0, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0]}
XIELU = {"alpha_n": [-1.0, 0.5], "alpha_p": [0.25, -0.5], "beta": [0.5, 0.5], "eps": [-1e-6, -1e-6]}
APERTUS = {**SIZES, "attention.layer_norm_rms_epsilon": 1e-5} | {f"xielu.{name}": numbers for name, numbers in XIELU.items()}
OF_HEADS = {**SIZES, "attention.key_length": 16, "attention.value_length": 16, "attention.layer_norm_rms_epsilon": 1e-5}
OF_IMAGES = OF_HEADS | {"rope.dimension_count": 16, "rope.dimension_sections": [4, 2, 2, 0], "rope.freq_base": 9000.0}
EXPERTS = {"expert_count": 4, "expert_used_count": 2}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 8.0, "rope.scaling.original_context_length": 8, "rope.freq_base": 9000.0}
YARN |= {"rope.scaling.yarn_beta_fast": 4.0, "rope.scaling.yarn_beta_slow": 1.0, "rope.scaling.yarn_log_multiplier": 1.0}
MINISTRAL3 = {"rope_type": "yarn", "rope_theta": 9000.0, "factor": 8.0, "original_max_position_embeddings": 8, "beta_fast": 4.0}
MINISTRAL3 |= {"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.25}
CASES: dict[str, tuple[str, str, dict[str, Any], Mapping[str, Any], Stored]] = {
    "as they are": ("starcoder2", "Starcoder2", {**BASE, "sliding_window": None, "norm_epsilon": 1e-5}, STARCODER2, as_it_is),
    "pairs, and four scales": (
        "granite",
        "Granite",
        BASE
        | {"rms_norm_eps": 1e-5, "attention_multiplier": 0.3, "embedding_multiplier": 3.0}
        | {"residual_multiplier": 0.5, "logits_scaling": 2.0},
        GRANITE,
        in_pairs,
    ),
    "groups of heads in one matrix": (
        "falcon",
        "Falcon",
        BASE | {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS, "ffn_hidden_size": LLAMA["intermediate_size"]},
        FALCON,
        kinds_apart,
    ),
    "norms, soft caps and windows": (
        "gemma2",
        "Gemma2",
        BASE
        | {"head_dim": 24, "query_pre_attn_scalar": 24, "sliding_window": 9, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
        | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 9.0},
        GEMMA2,
        norms_plus_one,
    ),
    "states": ("mamba", "Mamba", OF_MAMBA, MAMBA, states),
    "states that are normalized": ("mamba", "FalconMamba", {**OF_MAMBA, "mixer_rms_eps": 1e-3}, {**MAMBA, "ssm.dt_b_c_rms": True}, states),
    "values of key heads apart": ("qwen35", "Qwen3_5Text", {**BASE, **DELTA}, QWEN35, values_apart),
    "the text decoder of a model of images": (
        "qwen3vl",
        "Qwen3",
        BASE | {"head_dim": 16, "rms_norm_eps": 1e-5},
        OF_IMAGES | {"n_deepstack_layers": 3},
        as_it_is,
    ),
    "the same with experts": (
        "qwen3vlmoe",
        "Qwen3Moe",
        BASE
        | {"head_dim": 16, "rms_norm_eps": 1e-5, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        | {"norm_topk_prob": True},
        OF_IMAGES | EXPERTS | {"expert_feed_forward_length": 24, "n_deepstack_layers": 3},
        as_it_is,
    ),
    "the same with a bias": ("qwen2vl", "Qwen2", BASE | {"rms_norm_eps": 1e-5}, OF_IMAGES, as_it_is),
    "the same of paddleocr": ("paddleocr", "Llama", BASE | {"head_dim": 16, "rms_norm_eps": 1e-5}, OF_IMAGES, as_it_is),
    "positions of several axes": (
        "glm4",
        "Glm4",
        BASE
        | {"head_dim": 16, "rms_norm_eps": 1e-5, "attention_bias": True}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 9000.0, "partial_rotary_factor": 0.5}},
        OF_IMAGES | {"rope.dimension_count": 8},
        turned_apart,
    ),
    "queries that are scaled by their positions": (
        "mistral3",
        "Ministral3",
        BASE | {"head_dim": 16, "rms_norm_eps": 1e-5, "rope_parameters": MINISTRAL3},
        OF_HEADS | YARN | {"attention.temperature_scale": 0.25},
        in_pairs,
    ),
    "the generation before": (
        "mistral3",
        "Mistral",
        BASE | {"head_dim": 16, "rms_norm_eps": 1e-5, "sliding_window": None},
        OF_HEADS,
        in_pairs,
    ),
    "two experts that are weighed one after the other": (
        "phimoe",
        "Phimoe",
        BASE | {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True, "rms_norm_eps": 1e-5},
        {**SIZES, **EXPERTS, "attention.layer_norm_rms_epsilon": 1e-5, "rope.scaling.original_context_length": 256},
        as_it_is,
    ),
    "layers with a convolution": (
        "lfm2",
        "Lfm2",
        BASE
        | {"norm_eps": 1e-3, "conv_L_cache": 4, "block_auto_adjust_ff_dim": False, "tie_word_embeddings": True}
        | {"layer_types": ["conv", "full_attention"]},
        LFM2,
        states,
    ),
}


def rotary(values: dict[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": keys.get("rope.freq_base", 10000.0)}, **values}


@pytest.mark.parametrize("case", CASES)
def test_the_configuration_and_the_weights_are_those_of_the_model(case: str, tmp_path: Path) -> None:
    architecture, kind, values, keys, stored = CASES[case]
    model, path = make_model(kind, rotary(values, keys)), tmp_path / "model.gguf"
    write(path, architecture, model, keys, stored)
    checkpoint = GgufCheckpoint(path)
    found = architecture_of(checkpoint)
    traced = model_of(path, configuration(checkpoint, found))
    reference = TransformersReference(traced, GgufParameters(traced, checkpoint, architecture, found), whole=True)
    assert relative_error(reference.logits(PROMPT), logits_of(model, PROMPT.tolist())) < 1e-5


def test_parameters_that_a_file_has_among_its_metadata(tmp_path: Path) -> None:
    import torch

    model, path = make_model("Apertus", rotary(BASE | {"rms_norm_eps": 1e-5}, APERTUS)), tmp_path / "model.gguf"
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if ".act_fn." in name:
                value.fill_(XIELU[name.rpartition(".")[2]][int(name.split(".")[2])])
    write(path, "apertus", model, APERTUS)
    checkpoint = GgufCheckpoint(path)
    found = architecture_of(checkpoint)
    traced = model_of(path, configuration(checkpoint, found))
    parameters = GgufParameters(traced, checkpoint, "apertus", found)
    reference = TransformersReference(traced, parameters, whole=True)
    assert relative_error(reference.logits(PROMPT), logits_of(model, PROMPT.tolist())) < 1e-5
    checkpoint.metadata["xielu.beta"] = [0.5]
    with pytest.raises(CorruptModel, match=r"xielu\.beta has no number for model\.layers\.1\.mlp\.act_fn\.beta"):
        parameters.read("model.layers.1.mlp.act_fn.beta")


def test_an_import_computes_what_transformers_reads_from_the_same_file(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers needs it to read GGUF files")
    architecture, kind, values, keys, stored = CASES["as they are"]
    path = tmp_path / "model.gguf"
    write(path, architecture, make_model(kind, rotary(values, keys)), {**keys, "vocab_size": LLAMA["vocab_size"]}, stored)
    manifest = import_model(path, tmp_path / "model")
    assert manifest.source == "gguf" and manifest.architecture == "starcoder2" and manifest.tokenizer is None
    assert manifest.report["made_by"]["way"] == "trace" and manifest.report["source_greedy_equal"] == 1.0
    import torch
    from transformers import AutoConfig, Starcoder2ForCausalLM

    config = AutoConfig.from_pretrained(tmp_path, gguf_file=path.name)
    config.rope_parameters["rope_theta"], config.vocab_size = keys["rope.freq_base"], LLAMA["vocab_size"]  # which their table leaves out
    theirs = Starcoder2ForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, config=config, dtype=torch.float32).eval()
    assert relative_error(Chain(tmp_path / "model", manifest.cache)(PROMPT.tolist()), logits_of(theirs, PROMPT.tolist())) < 1e-4


def test_quantized_matrices_stay_as_they_are_with_their_rows_in_another_order(tmp_path: Path) -> None:
    architecture, kind, values, keys, stored = CASES["pairs, and four scales"]
    model, path = make_model(kind, rotary(values, keys)), tmp_path / "model.gguf"
    write(path, architecture, model, keys, stored, quantized=True)
    manifest = import_model(path, tmp_path / "model")
    assert manifest.weights.kept == "Q8_0"
    q8 = gguf.GGMLQuantizationType.Q8_0
    for value in model.state_dict().values():
        if fits(value):
            value.copy_(value.new_tensor(gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), q8), q8)))
    assert relative_error(Chain(tmp_path / "model", manifest.cache)(PROMPT.tolist()), logits_of(model, PROMPT.tolist())) < 1e-3


def test_quantized_rows_of_value_heads_are_moved_and_columns_of_them_are_read_as_numbers(tmp_path: Path) -> None:
    architecture, kind, values, keys, stored = CASES["values of key heads apart"]
    path = tmp_path / "model.gguf"
    write(path, architecture, make_model(kind, rotary(values, keys)), keys, stored, quantized=True)
    checkpoint = GgufCheckpoint(path)
    found = architecture_of(checkpoint)
    parameters = GgufParameters(model_of(path, configuration(checkpoint, found)), checkpoint, architecture, found)
    inside = "model.layers.0.linear_attn."
    for name in ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"):
        matrix = parameters.matrix(f"{inside}{name}.weight")
        assert matrix is not None and matrix.form is not None and matrix.keep is not None and matrix.form.name == "Q8_0"
        np.testing.assert_allclose(matrix.keep().numbers(), parameters.read(f"{inside}{name}.weight"), rtol=1e-6)
    assert parameters.matrix(f"{inside}out_proj.weight") is None


def test_experts_stay_as_they_are_and_compute_what_their_codes_stand_for(tmp_path: Path) -> None:
    architecture, kind, path = "qwen3moe", "Qwen3Moe", tmp_path / "model.gguf"
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1, "norm_topk_prob": True}
    model = make_model(kind, rotary({**BASE, **experts, "head_dim": 16, "rms_norm_eps": 1e-6}, {}))
    keys = {"attention.key_length": 16, "attention.value_length": 16, "attention.layer_norm_rms_epsilon": 1e-6}
    write(
        path,
        architecture,
        model,
        {**SIZES, **keys, "expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
        quantized=True,
    )
    manifest = import_model(path, tmp_path / "model")
    assert manifest.weights.kept == "Q8_0" and manifest.report["source_greedy_equal"] == 1.0
    held = [each for each in load_block(tmp_path / "model", "layer_001").weights.values() if isinstance(each, ExpertWeight)]
    assert [(each.codes.stored_as, each.codes.group) for each in held] == [("int8", 32)] * 2
    q8 = gguf.GGMLQuantizationType.Q8_0
    for value in model.state_dict().values():
        if fits(value):
            value.copy_(value.new_tensor(gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), q8), q8)))
    assert relative_error(Chain(tmp_path / "model", manifest.cache)(PROMPT.tolist()), logits_of(model, PROMPT.tolist())) < 1e-4


OF_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


class OfExperts:
    """A file with the experts of one layer, as Q4_K."""

    path = "model.gguf"
    kind = gguf.GGMLQuantizationType.Q4_K

    def __init__(self) -> None:
        rng, block = np.random.default_rng(0), gguf.GGML_QUANT_SIZES[self.kind][1]
        self.blocks = {f"blk.0.{name}.weight": rng.integers(0, 256, (4 * 256, 1, block), np.uint8) for name in OF_EXPERTS}
        for blocks in self.blocks.values():
            blocks[..., :4] = rng.standard_normal((4 * 256, 1, 2)).astype(np.float16).view(np.uint8)

    def __contains__(self, name: str) -> bool:
        return name in self.blocks

    def __iter__(self) -> Any:
        return iter(self.blocks)

    def shape(self, name: str) -> tuple[int, ...]:
        return (4, 256, 256)

    def form(self, name: str) -> Any:
        return FORMS[self.kind]

    def kept(self, name: str) -> Any:
        return kept(self.kind, self.blocks[name])

    def read(self, name: str) -> np.ndarray:
        return gguf.quants.dequantize(self.blocks[name].reshape(4 * 256, -1), self.kind).reshape(self.shape(name))


@pytest.mark.parametrize(("architecture", "config", "values"), [
    ("qwen3moe", "Qwen3MoeConfig", {"num_experts": 4, "moe_intermediate_size": 256, "decoder_sparse_step": 1}),
    ("gpt-oss", "GptOssConfig", {"num_local_experts": 4, "intermediate_size": 256, "head_dim": 16}),
    ("llama4", "Llama4TextConfig", {"num_local_experts": 4, "intermediate_size": 256, "interleave_moe_layer_step": 1, "head_dim": 64}),
])  # fmt: skip
def test_experts_are_kept_however_a_model_lays_them_out(architecture: str, config: str, values: dict[str, Any]) -> None:
    """Gates and ups one after the other or in turns, turned or not: codes are those of the numbers."""
    import transformers

    traced = model_of(Path("model.gguf"), getattr(transformers, config)(**{**LLAMA, "hidden_size": 256, "num_hidden_layers": 1, **values}))
    file: Any = OfExperts()
    parameters = GgufParameters(traced, file, architecture, architecture_of(Named(architecture, {})))
    found = [name for name in traced.module.state_dict() if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
    assert len(found) == 2
    for name in found:
        matrix = parameters.matrix(name)
        assert matrix is not None and matrix.keep is not None and matrix.experts is not None
        numbers = parameters.read(name)
        assert matrix.turned == (architecture != "qwen3moe")
        np.testing.assert_array_equal(matrix.keep().numbers().reshape(matrix.experts), numbers.swapaxes(1, 2) if matrix.turned else numbers)


REFUSED: dict[str, tuple[str, Mapping[str, Any], str]] = {
    "a setting that nothing reads": ("starcoder2", {"attention.scale": 0.5}, r"starcoder2\.attention\.scale \(0\.5\) is a setting that"),
    "scaling that a table does not hold": ("starcoder2", {"rope.scaling.type": "longrope"}, r"rotary positions with starcoder2\.rope\.sc"),
    "layers that differ": ("starcoder2", {"attention.head_count_kv": [2, 1]}, r"attention\.head_count_kv differs between layers"),
    "experts that are chosen otherwise": ("dots1", {"expert_gating_func": 1}, r"expert_gating_func is 1 where dots1 of transformers has 2"),
    "recurrent state": ("plamo2", {"ssm.state_size": 16}, r"'plamo2' is not supported: it keeps recurrent .*2\.ssm\.state_size"),
    "heads that turn in part": ("granitehybrid", {"ssm.state_size": 16}, r"granitehybrid without expert_shared.* is Bamba"),
    "queries that are scaled otherwise": (
        "mistral3",
        {"attention.temperature_scale": 0.1},
        r"mistral3\.rope\.scaling\.type is None where ministral3 of transformers has 'yarn' alone",
    ),
    "layers that all carry states": ("lfm2moe", {"expert_gating_func": 1}, r"expert_gating_func is 1 where lfm2_moe of transformers has 2"),
    "an encoder": ("bert", {"attention.causal": False}, r"'bert' is not supported: it is an encoder"),
    "one that is not described": ("grok", {}, r"'grok' is not supported: what its metadata .* any decoder family is traced there"),
    "one that nobody knows": ("bertx", {}, r"'bertx' is not supported: the installed gguf package does not know it"),
}


class Named:
    """A file that says `keys` of its model."""

    path = "model.gguf"

    def __init__(self, architecture: str, keys: Mapping[str, Any]) -> None:
        self.metadata = {"general.architecture": architecture} | {f"{architecture}.{key}": value for key, value in keys.items()}

    def __contains__(self, name: str) -> bool:
        return False

    def __iter__(self) -> Any:
        return iter(())

    def shape(self, name: str) -> tuple[int, ...]:
        return (LLAMA["vocab_size"], LLAMA["hidden_size"])


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_served_is_refused_by_name_from_the_metadata_alone(case: str) -> None:
    architecture, keys, message = REFUSED[case]
    file = Named(architecture, {**STARCODER2, **keys})
    with pytest.raises(UnsupportedModel, match=message):
        configuration(file, architecture_of(file))


def test_a_phimoe_whose_positions_are_scaled_is_refused_since_its_files_lose_by_how_much() -> None:
    file: Any = Holding("rope_factors_short.weight")
    file.metadata = {"general.architecture": "phimoe"}
    with pytest.raises(UnsupportedModel, match=r"files of phimoe lose by how much .* \(short_mscale\): import the Hugging Face directory"):
        architecture_of(file)


@pytest.mark.parametrize("bias", [0.0, 7.5])
def test_an_mpt_whose_positions_are_learned_or_whose_bias_is_no_whole_number_is_refused(bias: float) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "attention.head_count_kv"}
    file = Named("mpt", {**sizes, "attention.layer_norm_epsilon": 1e-5, "attention.max_alibi_bias": bias})
    with pytest.raises(CorruptModel, match=rf"one of the keys of mpt .*max_alibi_bias is {bias}"):
        configuration(file, architecture_of(file))


def test_a_file_that_lacks_a_weight_or_has_one_too_many_is_refused(tmp_path: Path) -> None:
    architecture, kind, values, keys, stored = CASES["as they are"]
    path, out = tmp_path / "model.gguf", tmp_path / "out"
    write(path, architecture, make_model(kind, rotary(values, keys)), keys, stored)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"blk.1.ffn_up.weight", b"blk.1.ffn_uq.weight"))
    with pytest.raises(UnsupportedModel, match=r"no use for the tensor blk\.1\.ffn_uq\.weight"):
        import_model(path, out)
    at = whole.index(b"starcoder2.block_count") + len(b"starcoder2.block_count") + 4
    path.write_bytes(whole[:at] + bytes(4) + whole[at + 4 :])
    with pytest.raises(CorruptModel, match=r"starcoder2\.block_count is 0 where a number from 1"):
        import_model(path, out)
    path.write_bytes(whole[:at] + (1 << 26).to_bytes(4, "little") + whole[at + 4 :])
    with pytest.raises(CorruptModel, match=r"starcoder2\.block_count is 67108864 where a number from 1 to 16,384 is needed"):
        import_model(path, out)
    assert not out.exists()


class Holding:
    """A file that has every tensor that is asked for, and `more`."""

    path = "model.gguf"

    def __init__(self, more: str) -> None:
        self.more = more

    def __contains__(self, name: str) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter((self.more,))


def test_keys_of_a_layer_that_reads_those_of_an_earlier_one_are_left_out() -> None:
    import transformers

    kinds = ["sliding_attention", "full_attention", "full_attention"]
    values = {**LLAMA, "num_kv_shared_layers": 1, "layer_types": kinds, "head_dim": 16, "hidden_size_per_layer_input": 8}
    traced = model_of(Path("model.gguf"), transformers.Gemma4TextConfig(**values))
    gemma4 = architecture_of(Named("gemma4", {}))
    holding: Any = Holding("blk.2.attn_k.weight")
    assert GgufParameters(traced, holding, "gemma4", gemma4).unused == ["blk.2.attn_k.weight"]
    for lost in ("blk.2.attn_x.weight", "blk.0.attn_x.weight"):
        holding = Holding(lost)
        with pytest.raises(UnsupportedModel, match=f"no use for the tensor {lost}"):
            GgufParameters(traced, holding, "gemma4", gemma4)


@pytest.mark.parametrize("counts", [[0, 0], [2, 1]])
def test_a_file_whose_layers_have_no_keys_or_several_numbers_of_them_is_refused(counts: list[int]) -> None:
    file = Named("lfm2", {**LFM2, "attention.head_count_kv": counts})
    with pytest.raises(CorruptModel, match=r"one of the keys of lfm2 that describe its layers .*head_count_kv is \[\d, \d\]"):
        configuration(file, architecture_of(file))


@pytest.mark.parametrize("kind", ["falcon", "gemma3n", "gemma4"])
def test_a_file_without_the_keys_that_describe_its_layers_is_refused(kind: str) -> None:
    keys = {key: value for key, value in SIZES.items() if key != "attention.head_count_kv"}
    epsilon = "attention.layer_norm_epsilon" if kind == "falcon" else "attention.layer_norm_rms_epsilon"
    file = Named(kind, {**keys, epsilon: 1e-5})
    with pytest.raises(CorruptModel, match=f"one of the keys of {kind} that describe its layers is missing"):
        configuration(file, architecture_of(file))
