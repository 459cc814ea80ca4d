"""What the architectures of GGUF files whose layers carry states are in transformers: the part of gguf_table.py for these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.errors import UnsupportedModel
from mesh.importer.trace.gguf_table import (
    BY_SIGMOID,
    GRANITE_MOE,
    IN_TWO,
    KV_B,
    LATENT,
    OF_IMAGES,
    OF_LATENTS,
    SIGMOID,
    Architecture,
    Change,
    Header,
    dense_first,
    latent_widths,
    row,
    rows_joined,
)

__all__ = ["CARRYING"]

Array = npt.NDArray[Any]


def _logarithm(parts: Sequence[Array], config: Any) -> Array:
    """The decay of states, which files have as -exp of what the model keeps."""
    return np.log(-parts[0])


def _flat(parts: Sequence[Array], config: Any) -> Array:
    """The norm of each group of channels, in one line."""
    return parts[0].reshape(-1)


def _mamba_sizes(header: Header, layers: int) -> Mapping[str, Any]:
    return {"expand": header.get("ssm.inner_size") // header.get("embedding_length")}


def _mamba(header: Header) -> Architecture:
    """Two families have one name: one of them normalizes what its states are made of, with the epsilon of its other norms in llama.cpp."""
    normalizes = bool(header.get("ssm.dt_b_c_rms"))
    epsilon = {"mixer_rms_eps": header.get("attention.layer_norm_rms_epsilon")} if normalizes else {}
    return Architecture(
        "falcon_mamba" if normalizes else "mamba",
        fixed=epsilon,
        keys={**KEYS_ALONE, "ssm.inner_size": "intermediate_size", "ssm.time_step_rank": "time_step_rank"},
        implied=(*NO_ATTENTION, "ssm.dt_b_c_rms"),
        settings=_mamba_sizes,
        changes={"A_log": _logarithm},
    )


def _mamba2(header: Header, layers: int) -> Mapping[str, Any]:
    return {**_mamba_sizes(header, layers), "head_dim": header.get("ssm.inner_size") // header.get("ssm.time_step_rank")}


def _attending(header: Header, layers: int) -> list[int]:
    """The layers with attention: those that have keys. ValueError: none has, or their numbers differ."""
    counts = header.get("attention.head_count_kv")[:layers]
    if len({count for count in counts if count}) != 1:
        raise ValueError(f"head_count_kv is {counts}")
    return [layer for layer, count in enumerate(counts) if count]


def _layer_types(other: str) -> Callable[[Header, int], Mapping[str, Any]]:
    """Layers with keys attend; `other` names what the rest are."""

    def settings(header: Header, layers: int) -> Mapping[str, Any]:
        attending = _attending(header, layers)
        return {
            "layer_types": ["full_attention" if layer in attending else other for layer in range(layers)],
            "num_key_value_heads": header.get("attention.head_count_kv")[attending[0]],
        }

    return settings


def _period(found: Sequence[int], layers: int) -> tuple[int, int]:
    """Every how many layers those that are `found` come, and the first. ValueError: they do not come so."""
    first, period = found[0], found[1] - found[0] if len(found) > 1 else layers
    if list(found) != list(range(first, layers, period)):
        raise ValueError(f"layers {list(found)} are no regular part of {layers}")
    return period, first


def _jamba(header: Header, layers: int) -> Mapping[str, Any]:
    attending = _attending(header, layers)
    attention = _period(attending, layers)
    experts = _period([layer for layer in range(layers) if header.has(f"blk.{layer}.ffn_gate_inp.weight")], layers)
    return {
        "attn_layer_period": attention[0],
        "attn_layer_offset": attention[1],
        "expert_layer_period": experts[0],
        "expert_layer_offset": experts[1],
        "mamba_expand": header.get("ssm.inner_size") // header.get("embedding_length"),
        "num_key_value_heads": header.get("attention.head_count_kv")[attending[0]],
        "use_mamba_kernels": False,
    }


def _falcon_h1(header: Header, layers: int) -> Mapping[str, Any]:
    return {
        "mamba_d_head": header.get("ssm.inner_size") // header.get("ssm.time_step_rank"),
        "mamba_rms_norm": header.has("blk.0.ssm_norm.weight"),
    }


def _hybrid_sizes(header: Header, layers: int) -> Mapping[str, Any]:
    inner = header.get("ssm.inner_size")
    return {"mamba_expand": inner // header.get("embedding_length"), "mamba_d_head": inner // header.get("ssm.time_step_rank")}


def _granite_hybrid(header: Header, layers: int) -> Mapping[str, Any]:
    turns = header.get("rope.scaling.finetuned", True)  # as llama.cpp has it
    return {
        **_hybrid_sizes(header, layers),
        **_layer_types("linear_attention")(header, layers),
        "position_embedding_type": "rope" if turns else None,
        "num_local_experts": header.get("expert_count") or 0,
    }


def _hybrid(header: Header) -> Architecture:
    """Two families have one name: Granite's has a network for all tokens beside its experts, or in place of them; Bamba's has none."""
    if header.get("expert_shared_feed_forward_length") is None:
        raise UnsupportedModel(
            f"{header.path}: granitehybrid without expert_shared_feed_forward_length is Bamba, whose files lose how its heads turn: "
            "import the Hugging Face directory that the file was made from"
        )
    dense = {
        "shared_mlp.input_linear.weight": ("blk.{}.ffn_gate.weight", "blk.{}.ffn_up.weight"),
        "shared_mlp.output_linear.weight": ("blk.{}.ffn_down.weight",),
    }
    return Architecture(
        "granitemoehybrid",
        keys=MAMBA_KEYS,
        implied=(*HEADS, "ssm.inner_size"),
        settings=_granite_hybrid,
        pairs=True,
        tensors={**GRANITE_MOE, **DT_BIAS, **({} if header.get("expert_count") else dense)},
        changes={**_STATES, "shared_mlp.input_linear.weight": rows_joined},
    )


def _delta(header: Header, layers: int) -> Mapping[str, Any]:
    """Layers with gated delta rules: as the file lists them, else all but one of every few, as llama.cpp has it."""
    said, every = header.get("attention.recurrent_layers"), header.get("full_attention_interval") or 4
    carrying = [bool(each) for each in said] if isinstance(said, list) else [(layer + 1) % every != 0 for layer in range(layers)]
    return {
        "layer_types": ["linear_attention" if each else "full_attention" for each in carrying[:layers]],
        "linear_value_head_dim": header.get("ssm.inner_size") // header.get("ssm.time_step_rank"),
    }


def _of_keys(array: Array, config: Any) -> Array:
    """Rows of the first value of each key head, of the second and so on -> those of all values of a key head together."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    return array.reshape(values // keys, keys, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)


def _values_of_keys(parts: Sequence[Array], config: Any) -> Array:
    return _of_keys(parts[0], config)


def _after_keys(parts: Sequence[Array], config: Any) -> Array:
    """The same below the rows of queries and keys."""
    before = 2 * config.linear_num_key_heads * config.linear_key_head_dim
    return np.concatenate([parts[0][:before], _of_keys(parts[0][before:], config)])


def _columns_of_keys(parts: Sequence[Array], config: Any) -> Array:
    return _of_keys(parts[0].T, config).T


def _logarithm_of_keys(parts: Sequence[Array], config: Any) -> Array:
    return _of_keys(_logarithm(parts, config), config)


def _each_key_head(parts: Sequence[Array], config: Any) -> Array:
    """Queries, keys and values, then gates -> the four of each key head together."""
    joined, gates = parts
    heads, wide = config.linear_num_key_heads, config.linear_num_key_heads * config.linear_key_head_dim
    kinds = (joined[:wide], joined[wide : 2 * wide], joined[2 * wide :], gates)
    return np.concatenate([each.reshape(heads, -1, joined.shape[1]) for each in kinds], axis=1).reshape(-1, joined.shape[1])


def _as_it_is(parts: Sequence[Array], config: Any) -> Array:
    return parts[0]


def _delta_net(kind: str, **more: Any) -> Architecture:
    return Architecture(
        kind,
        keys=DELTA_KEYS,
        implied=("ssm.inner_size", "attention.recurrent_layers", "full_attention_interval", *OF_IMAGES),
        settings=_delta,
        norm_plus_one=True,
        **more,
    )


def _nemotron_h(header: Header) -> Architecture:
    """Layers are one part each: states, attention, or a network, of experts where the file has them."""
    network = "moe" if header.get("expert_count") else "mlp"

    def settings(header: Header, layers: int) -> Mapping[str, Any]:
        wide, keys = header.get("feed_forward_length")[:layers], header.get("attention.head_count_kv")[:layers]
        kinds = [network if size else "full_attention" if count else "linear_attention" for size, count in zip(wide, keys, strict=True)]
        carrying = kinds.index("linear_attention")
        return {
            "layers_block_type": kinds,
            "num_key_value_heads": max(keys) or header.get("attention.head_count"),
            "mamba_head_dim": header.get("ssm.inner_size") // header.get("ssm.time_step_rank"),
            "use_conv_bias": header.has(f"blk.{carrying}.ssm_conv1d.bias"),
            **({} if network == "moe" else {"intermediate_size": max(wide)}),
        }

    return Architecture(
        "nemotron_h",
        keys=NEMOTRON_KEYS,
        implied=(*HEADS, "block_count", "ssm.inner_size", "feed_forward_length"),
        needs={"expert_gating_func": (SIGMOID, None)},
        settings=settings,
        tensors={**DT_BIAS, **{f"experts.{each}_proj": (f"blk.{{}}.ffn_{each}_exps.weight",) for each in ("up", "down")}},
        changes=_STATES,
    )


def _kimi(header: Header, layers: int) -> Mapping[str, Any]:
    return {
        **latent_widths(header, layers),
        **dense_first(header, layers),
        "layer_types": ["full_attention" if count else "linear_attention" for count in header.get("attention.head_count_kv")[:layers]],
        "linear_num_heads": header.get("attention.head_count"),
        **dict.fromkeys(("n_shared_experts", "num_shared_experts"), header.get("expert_shared_count")),
    }


def _one_convolution(parts: Sequence[Array], config: Any) -> Array:
    """Those of queries, keys and values -> one, [channels, taps]."""
    return np.concatenate([each.reshape(-1, each.shape[-1]) for each in parts])


HEADS = ("attention.head_count_kv",)
NO_ATTENTION = ("attention.head_count", "context_length", "feed_forward_length")
KEYS_ALONE = {
    "attention.layer_norm_rms_epsilon": "layer_norm_epsilon",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.state_size": "state_size",
}
"""Of Mambas without attention."""
MAMBA_KEYS = {
    "ssm.conv_kernel": "mamba_d_conv",
    "ssm.group_count": "mamba_n_groups",
    "ssm.state_size": "mamba_d_state",
    "ssm.time_step_rank": "mamba_n_heads",
}
DELTA_KEYS = {
    "ssm.conv_kernel": "linear_conv_kernel_dim",
    "ssm.group_count": "linear_num_key_heads",
    "ssm.state_size": "linear_key_head_dim",
    "ssm.time_step_rank": "linear_num_value_heads",
}
NEMOTRON_KEYS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
    "moe_latent_size": "moe_latent_size",
    "ssm.conv_kernel": "conv_kernel",
    "ssm.group_count": "n_groups",
    "ssm.state_size": "ssm_state_size",
    "ssm.time_step_rank": "mamba_num_heads",
}
DT_BIAS = {".dt_bias": ("blk.{}.ssm_dt.bias",)}
_STATES: Mapping[str, Change] = {"A_log": _logarithm, "mixer.norm.weight": _flat, "mamba.norm.weight": _flat}
_GROUPED = {
    "tensors": DT_BIAS,
    "changes": {
        "linear_attn.norm.weight": _as_it_is,
        "A_log": _logarithm_of_keys,
        "conv1d.weight": _after_keys,
        "out_proj.weight": _columns_of_keys,
        "shared_expert_gate.weight": row,
    },
    "moves": {
        "in_proj_qkv.weight": _after_keys,
        **dict.fromkeys(("in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight", "dt_bias"), _values_of_keys),
    },
}
"""Of Qwen 3.5, whose files have the values of a key head apart."""

CARRYING: Mapping[str, Architecture | Callable[[Header], Architecture]] = {
    "falcon-h1": Architecture(
        "falcon_h1",
        fixed={"mamba_norm_before_gate": False},
        keys={**MAMBA_KEYS, "ssm.inner_size": "mamba_d_ssm"},
        settings=_falcon_h1,
        tensors={**DT_BIAS, "pre_ff_layernorm.weight": ("blk.{}.ffn_norm",)},  # the converter writes that one without its kind
        changes=_STATES,
    ),
    "granitehybrid": _hybrid,
    "jamba": Architecture(
        "jamba",
        keys={"ssm.conv_kernel": "mamba_d_conv", "ssm.state_size": "mamba_d_state", "ssm.time_step_rank": "mamba_dt_rank"},
        implied=(*HEADS, "ssm.inner_size"),
        settings=_jamba,
        tensors=IN_TWO,
        changes={"A_log": _logarithm},
    ),
    "kimi-linear": Architecture(
        "kimi_linear",
        fixed={"norm_topk_prob": True},
        keys={"kda.head_dim": "linear_head_dim", "ssm.conv_kernel": "linear_conv_kernel_dim"},
        implied=(*LATENT, "expert_shared_count", "leading_dense_block_count"),
        needs=BY_SIGMOID,
        settings=_kimi,
        tensors={
            **KV_B,
            **DT_BIAS,
            "forget_gate.A_log": ("blk.{}.ssm_a",),
            "forget_gate.f_a_proj.weight": ("blk.{}.ssm_f_a.weight",),
            "forget_gate.f_b_proj.weight": ("blk.{}.ssm_f_b.weight",),
            "conv1d.weight": tuple(f"blk.{{}}.ssm_conv1d_{each}.weight" for each in "qkv"),
            "o_norm.weight": ("blk.{}.ssm_norm.weight",),
        },
        changes={"A_log": _logarithm, "conv1d.weight": _one_convolution, **OF_LATENTS},
    ),
    "lfm2": Architecture(
        "lfm2",
        fixed={"block_auto_adjust_ff_dim": False, "conv_bias": False},
        keys={"shortconv.l_cache": "conv_L_cache"},
        implied=HEADS,
        settings=_layer_types("conv"),
    ),
    "lfm2moe": Architecture(
        "lfm2_moe",
        fixed={"conv_bias": False, "norm_topk_prob": True, "use_expert_bias": True},
        keys={"shortconv.l_cache": "conv_L_cache"},
        implied=HEADS,
        needs=BY_SIGMOID,
        settings=_layer_types("conv"),
        tensors={**IN_TWO, "feed_forward.expert_bias": ("blk.{}.exp_probs_b.bias",)},
    ),
    "mamba": _mamba,
    "mamba2": Architecture(
        "mamba2",
        keys={**KEYS_ALONE, "ssm.group_count": "n_groups", "ssm.time_step_rank": "num_heads"},
        implied=(*NO_ATTENTION, "ssm.inner_size"),
        settings=_mamba2,
        tensors=DT_BIAS,
        changes=_STATES,
    ),
    "nemotron_h": _nemotron_h,
    "nemotron_h_moe": _nemotron_h,
    "qwen35": _delta_net("qwen3_5_text", **_GROUPED),
    "qwen35moe": _delta_net("qwen3_5_moe_text", **_GROUPED),
    "qwen3next": _delta_net(
        "qwen3_next",
        fixed={"norm_topk_prob": True},
        tensors={**DT_BIAS, "in_proj_qkvz.weight": ("blk.{}.attn_qkv.weight", "blk.{}.attn_gate.weight")},
        changes={
            "linear_attn.norm.weight": _as_it_is,
            "A_log": _logarithm,
            "in_proj_qkvz.weight": _each_key_head,
            "shared_expert_gate.weight": row,
        },
    ),
}
"""By the name in the file. A function chooses by what the file says."""
