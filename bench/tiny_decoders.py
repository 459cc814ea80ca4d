"""Tiny models with random weights of any decoder family that the installed transformers has, from its own list of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mesh.importer.trace.library import quiet, torch_and_transformers

__all__ = ["configuration", "families", "make"]

LAYERS = 2
SAME: Mapping[int, tuple[str, ...]] = {
    96: ("vocab_size", "text_vocab_size", "vocab_size_per_layer_input"),
    32: ("hidden_size", "d_model", "n_embd", "model_dim", "embedding_size", "word_embed_proj_dim", "embed_dim", "emb_dim", "embedding_dim"),
    56: ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "dff", "n_inner", "ffn_hidden_size", "dim_ff"),
    LAYERS: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers", "num_blocks"),
        *("num_key_value_heads", "num_kv_heads", "n_head_kv"),
        *("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "num_experts_per_token"),
    ),
    4: (
        *("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads"),
        *("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
        *("laurel_rank", "rotary_dim", "video_token_id"),
    ),
    8: (
        *("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "swa_head_dim", "global_head_dim", "index_head_dim"),
        "hidden_size_per_layer_input",
    ),
    320: ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "max_sequence_length", "max_seq_length"),
    12: ("sliding_window", "window_size", "attention_window_size", "sliding_window_size", "attention_chunk_size"),
    24: (
        *("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
        "q_lora_rank",
    ),
    16: ("kv_lora_rank", "qk_head_dim"),
    1: (
        *("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_kv_shared_layers"),
        *("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers", "bos_token_id"),
    ),
    0: ("pad_token_id", "attn_pdrop"),
    3: ("image_token_id",),
}
SIZES: Mapping[str, Any] = {
    **{key: size for size, keys in SAME.items() for key in keys},
    "eos_token_id": 2,
    "is_decoder": True,
    "tie_word_embeddings": False,
}
"""What a configuration gets for each of these keys that it has."""
_KEYED = {each: {"rope_type": "default", "rope_theta": 10000.0} for each in ("full_attention", "sliding_attention")}
_LAST = ["linear_attention", "full_attention"]
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_chunk_size": 16}
_ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"], "attention_hidden_size": 64, "attention_head_dim": 16}
_SHARING = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2}
_INDEXED = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 2}
_DELTA = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 6}
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
_NGRAMS = {"ngram_vocab_size_base": 100, "make_ngram_vocab_size_divisible_by": 8, "split_ngram_parts": 2, "ple_embed_dim": 32}
OWN: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": {"qk_rope_head_dim": 4, "head_dim": 8, "num_expert_group": 1, "linear_head_dim": 8, "linear_num_heads": 4}
    | {"layer_types": _LAST},
    "bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "bloom": {"hidden_size": 36, "n_head": 6},
    "cohere_compass_text": {"rope_parameters": _KEYED, "logit_scale": 0.5},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}}
    | {"ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}},
    "dory": {"num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2}
    | {"layer_types": ["sliding_attention", "mlp", "sliding_attention", "mlp", "full_attention", "mlp"]},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 16},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "gemma3n_text": {**_SHARING, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": _SHARING,
    "gemma4_unified_text": _SHARING,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": LAYERS},
    "falcon_h1": {**_MAMBA, "mamba_d_ssm": 64},
    "glm4v_text": _SECTIONS,
    "glm4v_moe_text": _SECTIONS,
    "granitemoehybrid": {**_MAMBA, "layer_types": ["mamba", "attention"]},
    "inkling2_loop_text": {"unpadded_vocab_size": 96, "num_hidden_layers": 3, "n_layers_per_attn_res_block": 1}
    | {"loop_layer_index_start": 1, "loop_layer_index_end": 2, "layer_types": ["hybrid_sliding", "hybrid", "hybrid_sliding"]},
    "inkling2_text": {"unpadded_vocab_size": 96},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "mamba_d_state": 8, "use_mamba_kernels": False},
    "kimi_linear": {"linear_num_heads": 4, "linear_head_dim": 8},
    "lara_mini": _DELTA,
    "lfm2": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 16},
    "nemotron_h": {"chunk_size": 16, "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 8},
    "olmo_hybrid": _DELTA,
    "paddleocr_vl_text": _SECTIONS,
    "qwen2_5_vl_text": _SECTIONS,
    "qwen2_vl_text": _SECTIONS,
    "qwen3_5_moe_text": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_next": _DELTA,
    "qwen3_vl_moe_text": _SECTIONS,
    "qwen3_vl_text": _SECTIONS,
    "qwen4_exp_text": {**_INDEXED, **_DELTA, **_NGRAMS, "hc_lowrank": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"], "attention_head_size": 8, "feed_forward_size": 56},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**_ZAMBA, "mamba_dt_rank": 4, "mamba_d_state": 8, "use_mamba_kernels": False},
    "zamba2": {**_ZAMBA, "mamba_headdim": 8, "mamba_d_state": 8, "hybrid_layer_ids": [1], "kv_channels": 8, "use_mamba_kernels": False}
    | {"chunk_size": 16},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single families need besides."""


def families(multimodal: bool = False) -> list[str]:
    """The model_types that transformers maps to a causal language model, or those that it maps to another model of images and text."""
    from transformers.models.auto import modeling_auto as auto

    causal, both = dict(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), dict(auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)
    return sorted(kind for kind in both if causal.get(kind) != both[kind]) if multimodal else sorted(causal)


def configuration(kind: str, more: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """That of a tiny model of `kind`, with `more` settings."""
    _, transformers = torch_and_transformers()
    with quiet():
        return _config(transformers.CONFIG_MAPPING[kind], {**OWN.get(kind, {}), **more})


def make(kind: str, out: Path, more: Mapping[str, Any] = MappingProxyType({}), *, multimodal: bool = False) -> Any:
    """Write a random model of `kind`, with `more` settings, to `out` as transformers saves it; returns the model. `multimodal`: the model
    of images and text, where there is one."""
    torch, transformers = torch_and_transformers()
    config = configuration(kind, more)
    with quiet():
        torch.manual_seed(sum(kind.encode()))
        mapping = (transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText)
        auto = next(each for each in mapping[:: -1 if multimodal else 1] if type(config) in each._model_mapping)
        model = auto.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                _randomize(name, parameter)
        model.generation_config.eos_token_id = None
        model.save_pretrained(out)
    return model


def _config(kind: Any, own: Mapping[str, Any]) -> Any:
    default = kind()
    given = {**SIZES, **own}
    if "kv_lora_rank" in default.to_dict():  # latent attention: its head sizes follow from the parts
        follow = {"head_dim", "qk_head_dim"} - set(own)
        given = {key: value for key, value in given.items() if key not in follow} | {"num_key_value_heads": 4}
    values = {key: value for key, value in given.items() if key in default.to_dict() or key in own}
    if "layer_types" not in own and (kinds := list(dict.fromkeys(default.to_dict().get("layer_types") or ()))):
        values["layer_types"] = [kinds[layer % len(kinds)] for layer in range(LAYERS)]  # one layer of each kind
    for key, inner in _inner(default):
        values[key] = _config(type(inner), {**OWN.get(inner.model_type, {}), **own.get(key, {})}).to_dict()
    return kind(**values)


def _inner(config: Any) -> Iterator[tuple[str, Any]]:
    for key in getattr(type(config), "sub_configs", {}) or {}:
        inner = getattr(config, key, None)
        if inner is not None and hasattr(inner, "to_dict"):
            yield key, inner


def _randomize(name: str, parameter: Any) -> None:
    """Large enough that greedy decoding does not settle on one token; norms and biases are random too."""
    torch, _ = torch_and_transformers()
    if not parameter.is_floating_point():
        return
    if parameter.ndim > 1:
        table = any(part in name for part in ("emb", "wte", "wpe"))
        parameter.normal_(0, 0.6 if table else 1.4 / parameter.shape[-1] ** 0.5)
    elif "bias" in name:
        parameter.normal_(0, 0.1)
    else:
        parameter.add_(torch.randn_like(parameter) * 0.2)
