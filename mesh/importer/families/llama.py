"""Llama and its relatives, from Hugging Face names: Llama, Mistral, Mixtral, Qwen2, Qwen3, Phi-3, Gemma-3 (text)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mesh.errors import UnsupportedModel
from mesh.importer.families.config import Config
from mesh.importer.families.rotary import rope_settings, rotary_from_config, shorter_context, trained_context
from mesh.importer.families.spec import DecoderSpec, EmbedWeights, Experts, HeadWeights, LayerWeights, Linear, Rotary
from mesh.importer.families.tensors import Tensors

__all__ = ["LlamaWeights", "spec_of"]

# Defaults of each architecture for the keys that its config.json may leave out.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6},
    "mistral": {"rms_norm_eps": 1e-6, "num_key_value_heads": 8, "sliding_window": 4096},
    "mixtral": {"rms_norm_eps": 1e-5, "num_key_value_heads": 8, "rope_theta": 1e6},
    "qwen2": {"rms_norm_eps": 1e-6},
    "qwen3": {"rms_norm_eps": 1e-6, "head_dim": 128},
    "phi3": {"rms_norm_eps": 1e-5},
    "gemma3_text": {
        "rms_norm_eps": 1e-6,
        "vocab_size": 262208,
        "hidden_size": 2304,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
}


def spec_of(config: Config) -> DecoderSpec:
    """CorruptModel or UnsupportedModel where the configuration makes no decoder."""
    config = config.with_defaults(DEFAULTS[config.model_type])
    gemma = config.model_type == "gemma3_text"
    if config.get("use_bidirectional_attention"):
        raise UnsupportedModel(f"{config.path}: use_bidirectional_attention makes it an encoder: only decoders are supported")
    layers, hidden, heads = config.integer("num_hidden_layers"), config.integer("hidden_size"), config.integer("num_attention_heads")
    head_dim = config.optional_integer("head_dim") or hidden // heads
    windows = [_window(config, index) for index in range(layers)]
    context = config.integer("max_position_embeddings")
    rotary: list[Rotary | None] = []
    limits = [context]
    for window in windows:
        settings = _rope(config, sliding=window is not None)
        rotary.append(rotary_from_config(settings, head_dim=head_dim, context_length=context))
        limits.append(trained_context(settings, context))
    scale = config.number("query_pre_attn_scalar") if gemma else head_dim
    experts = config.integer("num_local_experts", 8) if config.model_type == "mixtral" else 0
    return DecoderSpec(
        architecture=config.model_type,
        layers=layers,
        hidden_size=hidden,
        vocab_size=config.integer("vocab_size"),
        context_length=min(limits),
        context_note=shorter_context(min(limits), context),
        heads=heads,
        kv_heads=config.optional_integer("num_key_value_heads") or heads,
        head_dim=head_dim,
        norm="rms",
        norm_eps=config.number("rms_norm_eps"),
        activation=config.activation("hidden_activation", "hidden_act", default="gelu_pytorch_tanh" if gemma else "silu"),
        scale=[scale**-0.5] * layers,
        window=windows,
        rotary=rotary,
        # attn_logit_softcapping stands in Gemma-3's config.json but is not applied
        logit_softcap=float(config.get("final_logit_softcapping") or 0.0),
        embed_scale=float(hidden**0.5) if gemma else 1.0,
        experts=Experts(experts, config.integer("num_experts_per_tok", 2)) if experts else None,
    )


def _window(config: Config, index: int) -> int | None:
    """Tokens that layer `index` sees, or None for all. Architectures differ in which layers slide."""
    window = config.optional_integer("sliding_window")
    kind = config.model_type
    if window is None or kind == "llama" or (kind in ("qwen2", "qwen3") and not config.get("use_sliding_window")):
        return None
    kinds = config.get("layer_types") if kind in ("qwen2", "qwen3", "gemma3_text") else None
    if kinds:
        slides = kinds[index] == "sliding_attention"
    elif kind == "gemma3_text":
        pattern = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
        slides = (index + 1) % pattern != 0
    elif kind in ("qwen2", "qwen3"):
        slides = index >= config.integer("max_window_layers", 28)
    else:
        slides = True
    return window if slides else None


def _rope(config: Config, *, sliding: bool) -> dict[str, Any]:
    if config.model_type != "gemma3_text":
        return rope_settings(config.values, theta=float(config.get("rope_theta") or 10000.0))
    layer_type = "sliding_attention" if sliding else "full_attention"
    values = dict(config.values)
    if sliding and not isinstance((values.get("rope_parameters") or {}).get(layer_type), Mapping):
        # older configurations: the scaling and the base are those of full attention only
        values |= {"rope_parameters": None, "rope_scaling": None, "rope_theta": config.get("rope_local_base_freq") or 1e4}
    return rope_settings(values, layer_type=layer_type, theta=1e4 if sliding else 1e6)


class LlamaWeights:
    """Tensors as Hugging Face names them, fused or not."""

    def __init__(self, spec: DecoderSpec, tensors: Tensors, *, head: Tensors, tied: bool) -> None:
        self.spec, self.tensors, self.tied = spec, tensors, tied
        self._head = head  # lm_head stands outside the prefix of the decoder
        self._plus_one = spec.architecture == "gemma3_text"

    def release(self) -> None:
        self.tensors.checkpoint.release()

    def embed(self) -> EmbedWeights:
        return EmbedWeights(self.tensors.matrix("embed_tokens.weight"))

    def head(self) -> HeadWeights:
        norm = self.tensors.norm("norm", plus_one=self._plus_one)
        if self.tied:
            return HeadWeights(Linear(self.tensors.matrix("embed_tokens.weight")), norm)
        return HeadWeights(self._head.linear("lm_head"), norm)

    def layer(self, index: int) -> LayerWeights:
        spec, tensors = self.spec, self.tensors
        layer, plus_one = f"layers.{index}.", self._plus_one
        attention, mlp = layer + "self_attn.", layer + "mlp."
        if attention + "qkv_proj.weight" in tensors:
            q_end, k_end = spec.query_size, spec.query_size + spec.key_size
            fused = (k_end + spec.key_size, spec.hidden_size)
            parts = (slice(q_end), slice(q_end, k_end), slice(k_end, None))
            q, k, v = (tensors.linear(attention + "qkv_proj", part, shape=fused) for part in parts)
        else:
            sizes = {"q": spec.query_size, "k": spec.key_size, "v": spec.key_size}
            q, k, v = (tensors.linear(f"{attention}{name}_proj", shape=(size, spec.hidden_size)) for name, size in sizes.items())
        gate, up, down, router = self._experts(layer) if spec.experts else self._mlp(mlp)
        sandwich = layer + "pre_feedforward_layernorm.weight" in tensors
        after_attention = layer + "post_attention_layernorm"
        return LayerWeights(
            q=q,
            k=k,
            v=v,
            o=tensors.linear(attention + "o_proj", shape=(spec.hidden_size, spec.query_size)),
            up=up,
            down=down,
            gate=gate,
            router=router,
            attention_norm=tensors.norm(layer + "input_layernorm", plus_one=plus_one),
            # the name says "post attention" either way: with four norms it is applied to what attention gave
            attention_out_norm=tensors.norm(after_attention, plus_one=plus_one) if sandwich else None,
            mlp_norm=tensors.norm(layer + "pre_feedforward_layernorm" if sandwich else after_attention, plus_one=plus_one),
            mlp_out_norm=tensors.norm(layer + "post_feedforward_layernorm", plus_one=plus_one) if sandwich else None,
            q_norm=tensors.optional_norm(attention + "q_norm", plus_one=plus_one),
            k_norm=tensors.optional_norm(attention + "k_norm", plus_one=plus_one),
        )

    def _mlp(self, mlp: str) -> tuple[Linear, Linear, Linear, None]:
        tensors = self.tensors
        if mlp + "gate_up_proj.weight" in tensors:
            half = tensors.shape(mlp + "gate_up_proj.weight")[0] // 2
            gate, up = (tensors.linear(mlp + "gate_up_proj", part) for part in (slice(half), slice(half, None)))
        else:
            gate, up = tensors.linear(mlp + "gate_proj"), tensors.linear(mlp + "up_proj")
        return gate, up, tensors.linear(mlp + "down_proj"), None

    def _experts(self, layer: str) -> tuple[Linear, Linear, Linear, Linear]:
        tensors = self.tensors
        assert self.spec.experts is not None
        block = layer + "block_sparse_moe."
        if block + "gate.weight" in tensors:
            count = self.spec.experts.count
            gate, up, down = (
                Linear(tensors.stack([f"{block}experts.{i}.{name}.weight" for i in range(count)])) for name in ("w1", "w3", "w2")
            )
            return gate, up, down, tensors.linear(block + "gate")
        # one tensor for all experts, [experts, out, in]
        mlp = layer + "mlp."
        half = tensors.shape(mlp + "experts.gate_up_proj")[1] // 2
        gate = Linear(tensors.tensor(mlp + "experts.gate_up_proj", _experts_part(slice(half))))
        up = Linear(tensors.tensor(mlp + "experts.gate_up_proj", _experts_part(slice(half, None))))
        down = Linear(tensors.tensor(mlp + "experts.down_proj", _experts_part(slice(None))))
        return gate, up, down, tensors.linear(mlp + "gate")


def _experts_part(rows: slice) -> Callable[[Any], Any]:
    return lambda array: array[:, rows].transpose(0, 2, 1)
