"""What the architectures of GGUF files are in transformers, and what llama.cpp fixes that no file says.

Names come from the libraries: those of tensors from the gguf package's tables (gguf_weights.py), those of most numbers from the keys that
all architectures share (gguf_config.py). Here stands the rest. An architecture is added when bench/gguf_families.py has found its tokens
equal to those of the model that was converted, and to llama.cpp's, or when it is known why the latter are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import erf, sqrt
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mesh.errors import UnsupportedModel

__all__ = [
    "ARCHITECTURES",
    "BY_SIGMOID",
    "GRANITE_MOE",
    "IN_TWO",
    "KV_B",
    "LATENT",
    "OF_IMAGES",
    "OF_LATENTS",
    "SIGMOID",
    "TURNED_EXPERTS",
    "Architecture",
    "Change",
    "Header",
    "dense_first",
    "halves",
    "latent_widths",
    "row",
    "rows_joined",
]

Array = npt.NDArray[Any]
Change = Callable[[Sequence[Array], Any], Array]
"""What makes a parameter of its tensors, with the configuration."""
Settings = Callable[["Header", int], Mapping[str, Any]]
"""Settings that take more than one value of the file, which has that many layers."""


class Header(Protocol):
    """What a file says of its model: a key without the architecture's name before it, and the shapes of its tensors."""

    path: Any

    def get(self, key: str, default: Any = None) -> Any: ...
    def has(self, tensor: str) -> bool: ...
    def shape(self, tensor: str) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Architecture:
    """What one name means.

    kind: transformers' model_type.
    fixed, rotary: settings of its configuration, and of its rotary positions, that hold for every file.
    keys: which setting a key is, where other architectures call it otherwise.
    implied: keys that say what others say already.
    needs: what a key has to be (None: it may be left out), since transformers has nothing else.
    settings: those of several values of the file.
    pairs: queries and keys are stored with rotary pairs side by side.
    norm_plus_one: norms are stored as the multiplier, of which the model keeps one less.
    spread: settings that the library takes and keeps under other names, layer by layer.
    tensors: the tensors of a parameter, {} for its layer, by the end of its name.
    changes: what makes a parameter of its tensors, by the end of its name.
    moves: the same where it puts the rows of one matrix in another order and does no more.
    numbers: whole keys that have a number for each layer, of the parameters whose names end so.
    """

    kind: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    rotary: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    implied: tuple[str, ...] = ()
    needs: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    settings: Settings = lambda header, layers: {}
    spread: tuple[str, ...] = ()
    pairs: bool = False
    norm_plus_one: bool = False
    tensors: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    changes: Mapping[str, Change] = field(default_factory=dict)
    moves: Mapping[str, Change] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)


def halves(parts: Sequence[Array], config: Any) -> Array:
    """Rows of a query or key with the two of a rotary pair side by side -> the first of all pairs, then the second."""
    (array,) = parts
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return array.reshape(-1, width // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _windows(every: int) -> Settings:
    """Layers with a window: as the file lists them, else all but each `every`th, as llama.cpp has it; none where there is no window."""

    def layer_types(header: Header, layers: int) -> Mapping[str, Any]:
        said = header.get("attention.sliding_window_pattern")
        windowed = [bool(each) for each in said] if isinstance(said, list) else [(layer + 1) % every != 0 for layer in range(layers)]
        there = bool(header.get("attention.sliding_window"))
        return {"layer_types": ["sliding_attention" if there and each else "full_attention" for each in windowed[:layers]]}

    return layer_types


def dense_first(header: Header, layers: int) -> Mapping[str, Any]:
    """Which layers have experts, for configurations that list them."""
    dense = int(header.get("leading_dense_block_count") or 0)
    return {"mlp_layer_types": ["dense" if layer < dense else "sparse" for layer in range(layers)]}


def _both(*settings: Settings) -> Settings:
    return lambda header, layers: {name: value for each in settings for name, value in each(header, layers).items()}


def _scaled_by_head(header: Header, layers: int) -> Mapping[str, Any]:
    """Queries of Gemma 2 are divided by the root of a head's width; in the largest one by that of the hidden size's share of a head."""
    share = header.get("embedding_length") // header.get("attention.head_count")
    return {"query_pre_attn_scalar": share if layers == GEMMA2_27B_LAYERS else header.get("attention.key_length")}


def latent_widths(header: Header, layers: int) -> Mapping[str, Any]:
    """Widths of the parts of heads whose keys and values are made of latents."""
    turned = header.get("rope.dimension_count")
    key = header.get("attention.key_length_mla") or header.get("attention.key_length")
    share = header.get("embedding_length") // header.get("attention.head_count")
    value = header.get("attention.value_length_mla") or header.get("attention.value_length") or share
    heads = header.get("attention.head_count")  # the file counts one head of latents
    return {
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": key - turned,
        "v_head_dim": value,
        "num_key_value_heads": heads,
        "head_dim": turned,
    }


def _groups(header: Header, layers: int) -> Mapping[str, Any]:
    return {"topk_method": "group_limited_greedy" if (header.get("expert_group_count") or 1) > 1 else "greedy"}


def _ernie(header: Header, layers: int) -> Mapping[str, Any]:
    return {"moe_layer_end_index": layers - 1}


def _one_key(header: Header, layers: int) -> Mapping[str, Any]:
    return {"multi_query": header.get("attention.head_count_kv") == 1}


def _falcon(header: Header, layers: int) -> Mapping[str, Any]:
    """The first generation has one key for all heads; the second has several, and one norm or two."""
    groups = header.get("attention.head_count_kv")
    norms = 2 if header.has("blk.0.attn_norm_2.weight") else 1
    second = {"new_decoder_architecture": True, "num_ln_in_parallel_attn": norms}
    first = {"num_kv_heads": groups, "multi_query": groups == 1, "bias": header.has("blk.0.attn_qkv.bias")}
    return {**first, **(second if groups > 1 else {})}


def _llama4(header: Header, layers: int) -> Mapping[str, Any]:
    return {"use_qk_norm": header.get("expert_count") != LLAMA4_MAVERICK_EXPERTS}


def _of_each(header: Header, key: str, layers: int) -> list[int]:
    """A setting of each layer, which the file may say once."""
    said = header.get(key)
    return said[:layers] if isinstance(said, list) else [said] * layers


def _gemma3n(header: Header, layers: int) -> Mapping[str, Any]:
    scales = header.get("activation_sparsity_scale")
    return {
        "vocab_size_per_layer_input": header.shape("per_layer_token_embd.weight")[0],
        "laurel_rank": header.shape("blk.0.laurel_l.weight")[0],
        "intermediate_size": _of_each(header, "feed_forward_length", layers),
        "activation_sparsity_pattern": [(1 + erf(each / sqrt(2))) / 2 for each in scales[:layers]],
    }


def _gemma4(header: Header, layers: int) -> Mapping[str, Any]:
    """Layers without a window have heads of another width, may have another number of keys, and may take their keys as values."""
    windowed = [bool(each) for each in header.get("attention.sliding_window_pattern")[:layers]]
    heads, wide = _of_each(header, "attention.head_count_kv", layers), _of_each(header, "feed_forward_length", layers)
    whole = [layer for layer, each in enumerate(windowed) if not each]
    own = {"head_dim": header.get("attention.key_length"), "num_key_value_heads": heads[whole[0]]}
    tables = "per_layer_token_embd.weight"
    return {
        "layer_types": ["sliding_attention" if each else "full_attention" for each in windowed],
        "num_key_value_heads": heads[windowed.index(True)] if any(windowed) else heads[0],
        "intermediate_size": wide[0],
        "use_double_wide_mlp": wide[-1] != wide[0],
        "attention_k_eq_v": not header.has(f"blk.{whole[0]}.attn_v.weight"),
        "enable_moe_block": header.has("blk.0.ffn_gate_inp.weight"),
        "per_layer_config": dict.fromkeys(whole, own),
        **({"vocab_size_per_layer_input": header.shape(tables)[0]} if header.has(tables) else {}),
    }


def _deepseek(header: Header) -> Architecture:
    """Three generations have one name: the last has no experts, and the middle one chooses them by sigmoids."""
    if header.get("expert_count") is None:
        return Architecture("youtu", implied=(*LATENT, *EXPERTS), settings=latent_widths, tensors=KV_B, changes=OF_LATENTS)
    if header.get("expert_gating_func") == SIGMOID:
        return Architecture("deepseek_v3", implied=LATENT, needs=BY_SIGMOID, settings=latent_widths, tensors=KV_B, changes=OF_LATENTS)
    return Architecture(
        "deepseek_v2",
        implied=LATENT,
        needs={"expert_gating_func": (SOFTMAX, None)},
        settings=_both(latent_widths, _groups),
        tensors=KV_B,
        changes=OF_LATENTS,
    )


def _olmo(header: Header) -> Architecture:
    """Two generations have one name: the last has windows."""
    return Architecture("olmo3", settings=_windows(4)) if header.get("attention.sliding_window") else Architecture("olmo2")


def _glm4(header: Header) -> Architecture:
    """The text decoder of a model of images: its rows are sorted for positions of several axes, which text has only one of."""
    if header.get("rope.dimension_sections") is None:
        return Architecture("glm4")
    turned = ("q_proj.weight", "k_proj.weight", "q_proj.bias", "k_proj.bias")
    return Architecture("glm4", implied=OF_IMAGES, moves=dict.fromkeys(turned, _pairs))


def _mistral3(header: Header) -> Architecture:
    """Two generations have one name: the last scales its queries by their positions. The converter leaves out mscale, which is 1."""
    scale = header.get("attention.temperature_scale")
    if scale is None:
        return Architecture("mistral", pairs=True)
    return Architecture(
        "ministral3",
        rotary={"llama_4_scaling_beta": scale, "mscale": 1.0, "mscale_all_dim": header.get("rope.scaling.yarn_log_multiplier", 1.0)},
        implied=("attention.temperature_scale", "rope.scaling.yarn_log_multiplier"),
        needs={"rope.scaling.type": ("yarn",)},
        pairs=True,
    )


def _phimoe(header: Header) -> Architecture:
    """transformers weighs the two experts of a token by its sparse mixer, and its norms subtract the mean; llama.cpp does neither."""
    if header.has("rope_factors_short.weight"):
        raise UnsupportedModel(
            f"{header.path}: files of phimoe lose by how much longer rotary positions scale what they turn (short_mscale): import the "
            "Hugging Face directory that the file was made from"
        )
    return Architecture(
        "phimoe",
        fixed={"router_jitter_noise": 0.01, "lm_head_bias": header.has("output.bias")},
        implied=("rope.scaling.original_context_length",),
        tensors=IN_TWO,
    )


def _dbrx(header: Header, layers: int) -> Mapping[str, Any]:
    return {
        "attn_config": {
            "kv_n_heads": header.get("attention.head_count_kv"),
            "clip_qkv": header.get("attention.clamp_kqv"),
            "rope_theta": header.get("rope.freq_base"),
        },
        "ffn_config": {
            "ffn_hidden_size": header.get("feed_forward_length"),
            "moe_num_experts": header.get("expert_count"),
            "moe_top_k": header.get("expert_used_count"),
        },
    }


def _mpt(header: Header, layers: int) -> Mapping[str, Any]:
    """transformers has no MPT whose positions are learned, which files have as a bias of 0. ValueError: it is that, or no whole number."""
    bias = header.get("attention.max_alibi_bias")
    if bias <= 0 or bias != int(bias):
        raise ValueError(f"max_alibi_bias is {bias}")
    return {
        "attn_config": {"clip_qkv": header.get("attention.clamp_kqv"), "alibi_bias_max": int(bias)},
        "expansion_ratio": header.get("feed_forward_length") // header.get("embedding_length"),
    }


def _pairs(parts: Sequence[Array], config: Any) -> Array:
    """Rows of a query or key, of whose turned part the first of all pairs come first -> the two of a pair side by side."""
    (array,) = parts
    rows = array.reshape(-1, config.head_dim, *array.shape[1:])
    turned = int(config.head_dim * config.rope_parameters["partial_rotary_factor"])
    pairs = rows[:, :turned].reshape(len(rows), 2, turned // 2, *array.shape[1:]).swapaxes(1, 2)
    return np.concatenate([pairs.reshape(len(rows), turned, *array.shape[1:]), rows[:, turned:]], axis=1).reshape(array.shape)


def _expanding(parts: Sequence[Array], config: Any) -> Array:
    """Keys [heads, latent, width] and values [heads, width, latent] -> one matrix that makes both of latents, head by head."""
    keys, values = parts
    return np.concatenate([keys.swapaxes(1, 2), values], axis=1).reshape(-1, keys.shape[1])


def _turned(parts: Sequence[Array], config: Any) -> Array:
    """A matrix of GPT-2, which its module keeps [in, out]."""
    return parts[0].T


def _turned_experts(parts: Sequence[Array], config: Any) -> Array:
    return parts[0].swapaxes(1, 2)


def _of_heads(parts: Sequence[Array], config: Any) -> Array:
    """Queries, keys and values one after the other -> those of each head together."""
    (array,) = parts
    return array.reshape(3, config.num_attention_heads, -1, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)


def _of_groups(parts: Sequence[Array], config: Any) -> Array:
    """All queries, then all keys and all values -> those of each group of heads together."""
    (array,) = parts
    heads, groups = config.num_attention_heads, config.num_kv_heads
    rows = array.reshape(heads + 2 * groups, -1, *array.shape[1:])
    queries, keys, values = rows[:heads], rows[heads : heads + groups], rows[heads + groups :]
    each = queries.reshape(groups, -1, *rows.shape[1:])
    return np.concatenate([each, keys[:, None], values[:, None]], axis=1).reshape(array.shape)


def _side_by_side(parts: Sequence[Array], config: Any) -> Array:
    """Gates and ups of experts [experts, wide, in] -> [experts, in, 2 wide], the gates first."""
    return np.concatenate(list(parts), axis=1).swapaxes(1, 2)


def _taking_turns(parts: Sequence[Array], config: Any) -> Array:
    """Gates and ups of experts [experts, wide, ...] -> [experts, ..., 2 wide], one of each in turn."""
    both = np.stack(list(parts), axis=2).reshape(len(parts[0]), -1, *parts[0].shape[2:])
    return both if both.ndim == 2 else both.swapaxes(1, 2)


TURNED_EXPERTS: frozenset[Change] = frozenset((_turned_experts, _side_by_side, _taking_turns))
"""Changes that give [experts, in, out]: what they do to rows they do to anything that each output has."""


def _one_of(place: int) -> Change:
    """One matrix of several that the file has in one tensor."""
    return lambda parts, config: parts[0][place]


def _flat_experts(parts: Sequence[Array], config: Any) -> Array:
    """Matrices of experts, one below the other."""
    return parts[0].reshape(-1, parts[0].shape[-1])


def _flat_turned_experts(parts: Sequence[Array], config: Any) -> Array:
    return _flat_experts([parts[0].swapaxes(1, 2)], config)


def row(parts: Sequence[Array], config: Any) -> Array:
    return parts[0].reshape(1, -1)


def rows_joined(parts: Sequence[Array], config: Any) -> Array:
    """One linear layer of two, one after the other."""
    return np.concatenate(list(parts))


SOFTMAX, SIGMOID = 1, 2
BY_SIGMOID: Mapping[str, tuple[Any, ...]] = {"expert_gating_func": (SIGMOID,)}
GEMMA2_27B_LAYERS = 46
LLAMA4_MAVERICK_EXPERTS = 128
OF_IMAGES = ("rope.dimension_sections", "n_deepstack_layers")
"""What text decoders of models of images say of images: which axis each rotary pair turns by, and where features are added."""
LATENT = ("attention.key_length", "attention.key_length_mla", "attention.value_length_mla", "attention.head_count_kv")
EXPERTS = ("expert_feed_forward_length", "expert_shared_count", "leading_dense_block_count")
KV_B = {"kv_b_proj.weight": ("blk.{}.attn_k_b.weight", "blk.{}.attn_v_b.weight")}
OF_LATENTS: Mapping[str, Change] = {"kv_b_proj.weight": _expanding}
_CONV1D: Mapping[str, Change] = dict.fromkeys(("c_attn.weight", "attn.c_proj.weight", "c_fc.weight", "mlp.c_proj.weight"), _turned)
_QKV: Mapping[str, Change] = {"query_key_value.weight": _of_heads, "query_key_value.bias": _of_heads}
IN_TWO = {
    "experts.gate_up_proj": ("blk.{}.ffn_gate_exps.weight", "blk.{}.ffn_up_exps.weight"),
    "experts.down_proj": ("blk.{}.ffn_down_exps.weight",),
}
"""The weights of experts as most families have them."""
_GPT_OSS = {
    **IN_TWO,
    "experts.gate_up_proj_bias": ("blk.{}.ffn_gate_exps.bias", "blk.{}.ffn_up_exps.bias"),
    "experts.down_proj_bias": ("blk.{}.ffn_down_exps.bias",),
    "self_attn.sinks": ("blk.{}.attn_sinks.weight",),
}
GRANITE_MOE = {
    **{f"block_sparse_moe.{name}": tensors for name, tensors in IN_TWO.items()},
    "block_sparse_moe.router.weight": ("blk.{}.ffn_gate_inp.weight",),
    "shared_mlp.input_linear.weight": ("blk.{}.ffn_gate_shexp.weight", "blk.{}.ffn_up_shexp.weight"),
    "shared_mlp.output_linear.weight": ("blk.{}.ffn_down_shexp.weight",),
}
XIELU = ("alpha_n", "alpha_p", "beta", "eps")
"""What the activation of Apertus has of each layer, as numbers of the file's metadata."""
_ALTUP = (("altup_projections", "altup_proj.weight"), ("altup_unembed_projections", "altup_unembd_proj.weight"))

ARCHITECTURES: Mapping[str, Architecture | Callable[[Header], Architecture]] = {
    "afmoe": Architecture(
        "afmoe",
        fixed={"mup_enabled": True},
        needs={"expert_gating_func": (SIGMOID, None), "expert_weights_norm": (True,)},
        settings=_windows(4),
    ),
    "apertus": Architecture(
        "apertus",
        numbers={f"act_fn.{each}": f"xielu.{each}" for each in XIELU},
    ),
    "arcee": Architecture("arcee", pairs=True),
    "bloom": Architecture("bloom", implied=("context_length", "feed_forward_length", "attention.head_count_kv"), changes=_QKV),
    "chatglm": Architecture("glm"),
    "cohere2": Architecture("cohere2", settings=_windows(4)),
    "command-r": Architecture("cohere"),
    "dbrx": Architecture(
        "dbrx",
        keys={"context_length": "max_seq_len", "embedding_length": "d_model"},
        implied=(
            *("attention.head_count_kv", "attention.clamp_kqv"),
            *("feed_forward_length", "expert_count", "expert_used_count"),
        ),
        needs={"attention.layer_norm_epsilon": (np.float32(1e-5),)},
        settings=_dbrx,
        spread=("attn_config", "ffn_config"),
        tensors={f"mlp.{name}": (f"blk.{{}}.ffn_{each}_exps.weight",) for name, each in (("w1", "gate"), ("v1", "up"), ("w2", "down"))},
        changes={"mlp.w1": _flat_experts, "mlp.v1": _flat_experts, "mlp.w2": _flat_turned_experts},
    ),
    "deepseek2": _deepseek,
    "dots1": Architecture("dots1", needs=BY_SIGMOID),
    "ernie4_5": Architecture("ernie4_5"),
    "ernie4_5-moe": Architecture(
        "ernie4_5_moe",
        keys={
            "expert_count": "moe_num_experts",
            "expert_used_count": "moe_k",
            "interleave_moe_layer_step": "moe_layer_interval",
            "leading_dense_block_count": "moe_layer_start_index",
        },
        implied=("expert_shared_feed_forward_length",),
        settings=_ernie,
        tensors={"moe_statics.e_score_correction_bias": ("blk.{}.exp_probs_b.bias",)},
    ),
    "exaone4": Architecture("exaone4", settings=_windows(4)),
    "exaone-moe": Architecture(
        "exaone_moe",
        implied=("expert_shared_feed_forward_length",),
        needs=BY_SIGMOID,
        settings=_both(_windows(4), dense_first),
    ),
    "falcon": Architecture(
        "falcon",
        fixed={"parallel_attn": True, "alibi": False},
        needs={"tensor_data_layout": ("jploski", None)},
        settings=_falcon,
        changes=dict.fromkeys(("query_key_value.weight", "query_key_value.bias"), _of_groups),
    ),
    "gemma": Architecture("gemma", norm_plus_one=True),
    "gemma2": Architecture("gemma2", norm_plus_one=True, settings=_both(_windows(2), _scaled_by_head)),
    "gemma3n": Architecture(
        "gemma3n_text",
        keys={
            "altup.active_idx": "altup_active_idx",
            "altup.num_inputs": "altup_num_inputs",
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": "hidden_size_per_layer_input",
        },
        implied=("activation_sparsity_scale", "feed_forward_length"),
        settings=_both(_windows(5), _gemma3n),
        tensors={f"{name}.{i}.weight": (tensor,) for i in range(3) for name, tensor in _ALTUP},
        changes={f"{name}.{i}.weight": _one_of(i) for i in range(3) for name, _ in _ALTUP},
    ),
    "gemma4": Architecture(
        "gemma4_text",
        keys={
            "attention.key_length_swa": "head_dim",
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": "hidden_size_per_layer_input",
            "expert_used_count": "top_k_experts",
        },
        implied=(
            *("attention.key_length", "attention.value_length", "attention.value_length_swa", "attention.head_count_kv"),
            *("feed_forward_length", "rope.dimension_count", "rope.dimension_count_swa"),
        ),
        settings=_gemma4,
        spread=("per_layer_config", "head_dim", "num_key_value_heads"),
        tensors={"router.scale": ("blk.{}.ffn_gate_inp.scale",), "router.per_expert_scale": ("blk.{}.ffn_down_exps.scale",)},
    ),
    "glm4": _glm4,
    "glm4moe": Architecture("glm4_moe", implied=OF_IMAGES, needs={"expert_gating_func": (SIGMOID, None)}),
    "gpt2": Architecture("gpt2", changes=_CONV1D, implied=("attention.head_count_kv",)),
    "gpt-oss": Architecture(
        "gpt_oss",
        rotary={"truncate": False},
        settings=_windows(2),
        tensors=_GPT_OSS,
        changes={
            "experts.gate_up_proj": _taking_turns,
            "experts.gate_up_proj_bias": _taking_turns,
            "experts.down_proj": _turned_experts,
        },
    ),
    "gptneox": Architecture("gpt_neox", changes=_QKV),
    "granite": Architecture("granite", pairs=True),
    "granitemoe": Architecture(
        "granitemoeshared", pairs=True, tensors=GRANITE_MOE, changes={"shared_mlp.input_linear.weight": rows_joined}
    ),
    "hunyuan-dense": Architecture("hunyuan_v1_dense"),
    "hunyuan-moe": Architecture(
        "hunyuan_v1_moe",
        keys={"expert_used_count": "moe_topk"},
        implied=("expert_feed_forward_length", "expert_shared_feed_forward_length", "expert_shared_count"),
    ),
    "jais2": Architecture("jais2"),
    "llama4": Architecture(
        "llama4_text",
        fixed={"attention_chunk_size": 8192, "floor_scale": 8192, "attn_scale": 0.1, "attn_temperature_tuning": True},
        keys={"feed_forward_length": "intermediate_size_mlp", "interleave_moe_layer_step": "interleave_moe_layer_step"},
        settings=_llama4,
        tensors=IN_TWO,
        changes={"experts.gate_up_proj": _side_by_side, "experts.down_proj": _turned_experts},
    ),
    "minicpm3": Architecture(
        "minicpm3",
        fixed={"scale_emb": 12, "dim_model_base": 256, "scale_depth": 1.4},
        implied=("attention.key_length", "attention.head_count_kv"),
        settings=latent_widths,
    ),
    "minimax-m2": Architecture("minimax_m2", needs=BY_SIGMOID),
    "mistral3": _mistral3,
    "mpt": Architecture(
        "mpt",
        keys={"context_length": "max_seq_len", "embedding_length": "d_model"},
        implied=("feed_forward_length", "attention.clamp_kqv", "attention.max_alibi_bias"),
        settings=_mpt,
        spread=("attn_config",),
    ),
    "nemotron": Architecture("nemotron", norm_plus_one=True),
    "olmo": Architecture("olmo", pairs=True, needs={"attention.layer_norm_epsilon": (np.float32(1e-5),)}),
    "olmo2": _olmo,
    "olmoe": Architecture("olmoe", fixed={"norm_topk_prob": False}),
    "paddleocr": Architecture("llama", implied=OF_IMAGES),
    "phi2": Architecture("phi"),
    "phi3": Architecture("phi3", keys={"rope.scaling.original_context_length": "original_max_position_embeddings"}),
    "phimoe": _phimoe,
    "qwen2moe": Architecture(
        "qwen2_moe",
        fixed={"norm_topk_prob": False, "use_sliding_window": False},
        changes={"shared_expert_gate.weight": row},
    ),
    "qwen2vl": Architecture("qwen2", fixed={"use_sliding_window": False}, implied=OF_IMAGES),
    "qwen3moe": Architecture("qwen3_moe", fixed={"norm_topk_prob": True, "use_sliding_window": False}),
    "qwen3vl": Architecture("qwen3", fixed={"use_sliding_window": False}, implied=OF_IMAGES),
    "qwen3vlmoe": Architecture("qwen3_moe", fixed={"norm_topk_prob": True, "use_sliding_window": False}, implied=OF_IMAGES),
    "seed_oss": Architecture("seed_oss"),
    "smollm3": Architecture("smollm3", fixed={"no_rope_layer_interval": 4, "use_sliding_window": False}, pairs=True),
    "stablelm": Architecture("stablelm"),
    "starcoder": Architecture("gpt_bigcode", settings=_one_key),
    "starcoder2": Architecture("starcoder2"),
}
"""By the name in the file. A function chooses by what the file says."""
