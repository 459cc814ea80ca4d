"""What the architectures of GGUF files whose layers carry states are in transformers: the part of gguf_table.py for these."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.errors import UnsupportedModel
from mesh.importer.trace.gguf_table import BY_SIGMOID, GRANITE_MOE, IN_TWO, Architecture, Change, Header, rows_joined

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
DT_BIAS = {".dt_bias": ("blk.{}.ssm_dt.bias",)}
_STATES: Mapping[str, Change] = {"A_log": _logarithm, "mixer.norm.weight": _flat, "mamba.norm.weight": _flat}

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
}
"""By the name in the file. A function chooses by what the file says."""
