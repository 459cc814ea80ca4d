"""The configuration that transformers needs for the model of a GGUF file.

Every key of the file's architecture has to be understood: one that is not would be a setting that the import loses, so the file is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from mesh.errors import CorruptModel, UnsupportedModel, short
from mesh.importer.trace.gguf_carrying import CARRYING
from mesh.importer.trace.gguf_table import ARCHITECTURES, Architecture
from mesh.importer.trace.library import quiet, torch_and_transformers

__all__ = ["LARGEST", "MOST_LAYERS", "architecture_of", "configuration"]

COMMON: Mapping[str, tuple[str, ...]] = {
    "attention.clamp_kqv": ("clip_qkv",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.key_length": ("head_dim",),
    "attention.kv_lora_rank": ("kv_lora_rank",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.q_lora_rank": ("q_lora_rank",),
    "attention.scale": ("attention_multiplier",),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "embedding_scale": ("embedding_multiplier",),
    "expert_count": ("num_experts", "num_local_experts", "n_routed_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size", "intermediate_size"),
    "expert_group_count": ("n_group",),
    "expert_group_used_count": ("topk_group",),
    "expert_shared_count": ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size", "shared_intermediate_size"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_weights_norm": ("norm_topk_prob",),
    "expert_weights_scale": ("routed_scaling_factor", "route_scale"),
    "feed_forward_length": ("intermediate_size", "n_inner", "ffn_hidden_size"),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "leading_dense_block_count": ("first_k_dense_replace", "num_dense_layers"),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "residual_scale": ("residual_multiplier",),
    "use_parallel_residual": ("use_parallel_residual",),
}
"""The settings that a key of any architecture may be, where the configuration has one of them."""

UNSAID: Mapping[str, Any] = {
    "clip_qkv": None,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "n_shared_experts": 0,
    "norm_topk_prob": False,
    "num_dense_layers": 0,
    "num_shared_experts": 0,
    "q_lora_rank": None,
    "route_scale": 1.0,
    "routed_scaling_factor": 1.0,
    "shared_intermediate_size": 0,
    "sliding_window": None,
    "topk_group": 1,
    "use_parallel_residual": True,
}
"""What llama.cpp takes where a file does not say it. The libraries' own defaults are those of one model."""

ROTARY = "rope."
SEEN_ELSEWHERE = ("vocab_size", "attention.value_length", "attention.sliding_window_pattern", "nextn_predict_layers")
"""Keys that are read by name: the rows of the embedding count, values are as wide as keys, and the table reads the rest."""

BIASES: Mapping[str, tuple[str, ...]] = {
    "attention_bias": ("attn_q.bias", "attn_qkv.bias"),
    "attention_out_bias": ("attn_output.bias",),
    "mlp_bias": ("ffn_up.bias",),
    "qkv_bias": ("attn_q.bias", "attn_qkv.bias"),
    "use_bias": ("attn_q.bias", "attn_qkv.bias"),
    "use_qk_norm": ("attn_q_norm.weight",),
    "qk_layernorm": ("attn_q_norm.weight",),
    "use_qkv_bias": ("attn_q.bias",),
}
"""Settings that say whether tensors are there: the tensors of the first layer that say it."""

STATE = ("ssm.", "wkv.", "kda.", "shortconv.", "token_shift_count")
LARGEST = 1 << 27
"""A count or a size in the metadata: the longest contexts have 10 million positions."""
MOST_LAYERS = 1 << 14
"""Lists are made as long as a model has layers, before any tensor is missed."""


class GgufFile(Protocol):
    """A file's metadata, and its tensors' names and shapes."""

    path: Any
    metadata: dict[str, Any]

    def __contains__(self, name: str) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...


class _Header:
    """See gguf_table.Header. `keys`: all that the file has for its architecture."""

    def __init__(self, file: GgufFile) -> None:
        self.path, self.file = file.path, file
        self.name = str(file.metadata.get("general.architecture"))
        before = f"{self.name}."
        self.keys = {key.removeprefix(before): value for key, value in file.metadata.items() if key.startswith(before)}

    def get(self, key: str, default: Any = None) -> Any:
        return self.keys.get(key, default)

    def has(self, tensor: str) -> bool:
        return tensor in self.file

    def shape(self, tensor: str) -> tuple[int, ...]:
        return self.file.shape(tensor)

    def number(self, key: str, most: int = LARGEST) -> int:
        """A positive integer that the file must have."""
        value = self.get(key)
        if not isinstance(value, int) or not 0 < value <= most:
            raise CorruptModel(f"{self.path}: {self.name}.{key} is {short(repr(value))} where a number from 1 to {most:,} is needed")
        return value


def architecture_of(file: GgufFile) -> Architecture:
    """What the file's model is. UnsupportedModel names the architecture and why it is not served."""
    from gguf import MODEL_ARCH_NAMES

    header = _Header(file)
    found = ARCHITECTURES.get(header.name) or CARRYING.get(header.name)
    if found is not None:
        return found if isinstance(found, Architecture) else found(header)
    state = sorted(key for key in header.keys if key.startswith(STATE))
    if header.name not in MODEL_ARCH_NAMES.values():
        why = "the installed gguf package does not know it: is it spelled so, or newer than the package?"
    elif state:
        why = (
            f"it keeps recurrent or convolution state ({header.name}.{state[0]}) in a way that is not described here. Import the Hugging "
            "Face directory that the file was made from: most such families are traced there"
        )
    elif header.get("attention.causal") is False or header.get("decoder_start_token_id") is not None or "t5" in header.name:
        why = "it is an encoder, or has one: only decoders alone are served"
    else:
        why = (
            "what its metadata and tensors mean in transformers is not described here. Import the Hugging Face directory that the file was "
            "made from: any decoder family is traced there"
        )
    raise UnsupportedModel(f"{header.path}: the GGUF architecture {short(header.name)!r} is not supported: {why}")


def configuration(file: GgufFile, architecture: Architecture) -> Any:
    """transformers' configuration. CorruptModel: a value is impossible. UnsupportedModel: a key has no place in it."""
    _, transformers = torch_and_transformers()
    header = _Header(file)
    with quiet():
        kind = transformers.CONFIG_MAPPING[architecture.kind]
        known = kind()
    values = _values(header, architecture, {*known.to_dict(), *getattr(kind, "attribute_map", {})})
    values |= _rotary(header, known, values, architecture)
    values |= _of_several(header, architecture, _layers(header)) | dict(architecture.fixed)
    values["vocab_size"] = header.shape("token_embd.weight")[0]
    values["tie_word_embeddings"] = not header.has("output.weight")
    try:
        with quiet():
            config = kind(**values)
    except Exception as error:  # the library raises whatever a wrong value leads to
        text = " ".join(str(error).split())[:300]
        raise CorruptModel(
            f"{header.path}: transformers refuses what the file says of its model ({type(error).__name__}: {text})"
        ) from None
    _check(header, config, values, architecture)
    return config


def _values(header: _Header, architecture: Architecture, known: set[str]) -> dict[str, Any]:
    """Settings by name, of those that the configuration has (`known`)."""
    values: dict[str, Any] = {}
    for key, good in architecture.needs.items():
        if header.get(key) not in good:
            raise UnsupportedModel(
                f"{header.path}: {header.name}.{key} is {short(repr(header.get(key)))} "
                f"where {architecture.kind} of transformers has {good[0]!r} alone"
            )
    for key, value in header.keys.items():
        name = architecture.keys.get(key) or next((each for each in COMMON.get(key, ()) if each in {*known, "head_dim"}), None)
        if key in architecture.implied or key in architecture.needs or key in SEEN_ELSEWHERE:
            continue
        if name is not None:
            values[name] = _alike(header, key, value)
        elif not key.startswith(ROTARY):
            raise UnsupportedModel(
                f"{header.path}: {header.name}.{key} ({str(value)[:40]}) is a setting that {architecture.kind} of transformers lacks"
            )
    values["num_hidden_layers"] = _layers(header)
    values["sliding_window"] = values.get("sliding_window") or None
    unsaid = dict(UNSAID)
    if "attention.head_count" not in architecture.implied:
        heads, hidden = header.number("attention.head_count"), header.number("embedding_length")
        unsaid |= {"num_key_value_heads": heads, "head_dim": hidden // heads}
    values = {name: value for name, value in unsaid.items() if name in known} | values
    for name, tensors in BIASES.items():
        if name in known:
            values[name] = any(header.has(f"blk.0.{tensor}") for tensor in tensors)
    return {name: value for name, value in values.items() if name in {*known, "head_dim"}} | {"pad_token_id": None}


def _layers(header: _Header) -> int:
    """Without those that guess tokens ahead."""
    return header.number("block_count", MOST_LAYERS) - int(header.get("nextn_predict_layers") or 0)


def _alike(header: _Header, key: str, value: Any) -> Any:
    """One value for all layers."""
    if not isinstance(value, list):
        return value
    if not value or any(each != value[0] for each in value):
        raise UnsupportedModel(f"{header.path}: {header.name}.{key} differs between layers, which is not supported")
    return value[0]


def _rotary(header: _Header, known: Any, values: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    """The rotary positions: base, how much of a head they turn, and scaling; of layers with a window apart where the family has them so."""
    default = getattr(known, "rope_parameters", None)
    if not isinstance(default, dict):
        return {}  # a family without them
    read = (*architecture.keys, *architecture.implied)
    said = {key: value for key, value in header.keys.items() if key.startswith(ROTARY) and key not in read}
    apart = "full_attention" in default
    settings = _turning(header, said, values, partial=not apart and "partial_rotary_factor" in default)
    base = float(said.pop("rope.freq_base_swa", settings["rope_theta"]))
    if said or (not apart and base != settings["rope_theta"]):
        keys = ", ".join(f"{header.name}.{key}" for key in said or ["rope.freq_base_swa"])
        raise UnsupportedModel(
            f"{header.path}: rotary positions with {keys} are not supported in GGUF: import the Hugging Face directory of the model"
        )
    settings |= architecture.rotary
    return {
        "rope_parameters": settings
        if not apart
        else {"full_attention": settings, "sliding_attention": {"rope_type": "default", "rope_theta": base}}
    }


def _turning(header: _Header, said: dict[str, Any], values: Mapping[str, Any], *, partial: bool) -> dict[str, Any]:
    """The settings of one kind of layer; takes out of `said` what it has read."""
    head = values.get("head_dim") or header.number("embedding_length") // header.number("attention.head_count")
    turned = said.pop("rope.dimension_count", head)
    settings: dict[str, Any] = {"rope_type": "default", "rope_theta": float(said.pop("rope.freq_base", 10000.0))}
    if partial or (turned != head and "qk_rope_head_dim" not in values):
        settings["partial_rotary_factor"] = turned / head
    kind = said.pop("rope.scaling.type", "none")
    factor, trained = said.pop("rope.scaling.factor", 1.0), said.pop("rope.scaling.original_context_length", None)
    if kind in ("linear", "yarn"):
        settings |= {"rope_type": kind, "factor": float(factor)}
    elif kind != "none" or factor != 1.0:
        said["rope.scaling.type"] = kind
    if kind == "yarn":
        settings["original_max_position_embeddings"] = int(trained or header.number("context_length"))
        names = {"beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow", "attention_factor": "yarn_attn_factor"}
        settings |= {name: float(said.pop(f"rope.scaling.{key}")) for name, key in names.items() if f"rope.scaling.{key}" in said}
    said.pop("rope.scaling.finetuned", None)
    return settings


def _of_several(header: _Header, architecture: Architecture, layers: int) -> dict[str, Any]:
    """The settings that the table makes of several values. CorruptModel: one of these is missing, or of another form."""
    try:
        return dict(architecture.settings(header, layers))
    except (TypeError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CorruptModel(
            f"{header.path}: one of the keys of {header.name} that describe its layers is missing, or has another form than llama.cpp's "
            f"converter gives it ({type(error).__name__}: {short(str(error))})"
        ) from None


def _check(header: _Header, config: Any, values: Mapping[str, Any], architecture: Architecture) -> None:
    """UnsupportedModel: the library has put another value in place of one that the file says, or the file has values of another width."""
    for name, value in values.items():
        if name not in ("rope_parameters", *architecture.spread) and (getattr(config, name, None) or None) != (value or None):
            raise UnsupportedModel(
                f"{header.path}: transformers makes {name} {getattr(config, name, None)!r} of the file's {short(repr(value))}"
            )
    keys, wide = header.get("attention.key_length"), header.get("attention.value_length")
    if wide is not None and wide != keys and "attention.key_length" not in architecture.implied:
        raise UnsupportedModel(f"{header.path}: keys of {keys} and values of {wide} numbers are not supported")
