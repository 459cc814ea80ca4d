"""GGUF files of tiny random models: the tensors of a transformers model under llama.cpp's names, as its converter stores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np

MERGES = ["a b", "Ġ a"]
ARCHITECTURES = {"llama": "LLAMA", "mixtral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma3_text": "GEMMA3"}


def byte_vocabulary(size: int) -> list[str]:
    """Byte-level tokens, what MERGES make of them, and control tokens up to `size`."""
    visible = [chr(c) for c in range(33, 127)] + [chr(c) for c in range(161, 173)] + [chr(c) for c in range(174, 256)]
    letters = visible + [chr(256 + n) for n in range(256 - len(visible))]
    merged = [merge.replace(" ", "") for merge in MERGES]
    return (letters + merged + [f"<pad{n}>" for n in range(size)])[:size]


def write_gguf(
    path: Path,
    model: Any,
    kind: gguf.GGMLQuantizationType | None = None,
    *,
    extra: dict[str, np.ndarray] | None = None,
) -> None:
    """`kind` is the type of the 2-D weights (None: float32); norms and biases stay float32."""
    config = model.config
    name = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[name]])
    layers, heads, kv_heads = config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_block_count(layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    parameters = config.rope_parameters.get("full_attention", config.rope_parameters)
    writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(parameters["rope_type"]))
        writer.add_rope_scaling_factor(parameters["factor"])
        writer.add_rope_scaling_orig_ctx_len(parameters.get("original_max_position_embeddings", config.max_position_embeddings))
    if config.model_type == "gemma3_text":
        writer.add_sliding_window(config.sliding_window)
    if config.model_type == "mixtral":
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(byte_vocabulary(config.vocab_size))
    writer.add_token_types([1 if n < 256 + len(MERGES) else 3 for n in range(config.vocab_size)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[name], layers)
    tied = config.tie_word_embeddings
    state = model.state_dict()
    for key, value in state.items():
        array = value.float().numpy()
        if key == "lm_head.weight" and tied:
            continue
        if "self_attn.rotary" in key:
            continue
        if name == "LLAMA" and key.endswith(("q_proj.weight", "k_proj.weight")):
            n = heads if "q_proj" in key else kv_heads
            array = array.reshape(n, 2, array.shape[0] // n // 2, -1).swapaxes(1, 2).reshape(array.shape)
        if name == "GEMMA3" and key.endswith("norm.weight"):
            array = array + 1
        if key.endswith("experts.gate_up_proj"):
            layer, half = key.split(".")[2], array.shape[1] // 2
            _add(writer, f"blk.{layer}.ffn_gate_exps.weight", array[:, :half], kind)
            _add(writer, f"blk.{layer}.ffn_up_exps.weight", array[:, half:], kind)
        elif key.endswith("experts.down_proj"):
            _add(writer, f"blk.{key.split('.')[2]}.ffn_down_exps.weight", array, kind)
        elif key.endswith("mlp.gate.weight"):
            _add(writer, f"blk.{key.split('.')[2]}.ffn_gate_inp.weight", array, None)
        else:
            theirs = names.get_name(key, try_suffixes=(".weight", ".bias"))
            assert theirs is not None, key
            _add(writer, theirs, array, kind)
    for key, array in (extra or {}).items():
        _add(writer, key, array, None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: gguf.GGUFWriter, name: str, array: np.ndarray, kind: gguf.GGMLQuantizationType | None) -> None:
    array = np.ascontiguousarray(array, np.float32)
    if kind is None or array.ndim < 2:
        writer.add_tensor(name, array)
    else:
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
