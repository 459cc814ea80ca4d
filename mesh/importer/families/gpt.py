"""The older families, each with names of its own, from Hugging Face checkpoints: GPT-2, GPT-NeoX, OPT, BLOOM."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from mesh.errors import UnsupportedModel
from mesh.importer.families.config import Config
from mesh.importer.families.rotary import rope_settings, rotary_from_config
from mesh.importer.families.spec import DecoderSpec, EmbedWeights, HeadWeights, LayerWeights, Linear, Norm, Rotary
from mesh.importer.families.tensors import Tensors

__all__ = ["BloomWeights", "Gpt2Weights", "GptNeoxWeights", "OptWeights", "bloom_spec", "gpt2_spec", "gpt_neox_spec", "opt_spec"]

Array = npt.NDArray[Any]

OPT_POSITION_OFFSET = 2  # its table begins with two rows that no position reads


def _spec(config: Config, *, layers: str, hidden: str, heads: str, context: int, **rest: Any) -> DecoderSpec:
    layer_count, size, head_count = config.integer(layers), config.integer(hidden), config.integer(heads)
    if size % head_count:
        raise UnsupportedModel(f"{config.path}: {hidden} {size} is no multiple of {heads} {head_count}")
    head_dim = size // head_count
    given: dict[str, Any] = {
        "scale": [1 / math.sqrt(head_dim)] * layer_count,
        "rotary": [None] * layer_count,
        "norm_eps": 1e-5,
        **rest,
    }
    return DecoderSpec(
        architecture=config.model_type,
        layers=layer_count,
        hidden_size=size,
        vocab_size=config.integer("vocab_size"),
        context_length=context,
        heads=head_count,
        kv_heads=head_count,
        head_dim=head_dim,
        norm="layer",
        window=[None] * layer_count,
        **given,
    )


def gpt2_spec(config: Config) -> DecoderSpec:
    layers, head_dim = config.integer("n_layer"), config.integer("n_embd") // config.integer("n_head")
    scale = 1 / math.sqrt(head_dim) if config.get("scale_attn_weights", True) else 1.0
    by_layer = config.get("scale_attn_by_inverse_layer_idx", False)
    return _spec(
        config,
        layers="n_layer",
        hidden="n_embd",
        heads="n_head",
        context=config.integer("n_positions", 1024),
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        activation=config.activation("activation_function", default="gelu_new"),
        scale=[scale / (index + 1) if by_layer else scale for index in range(layers)],
    )


def gpt_neox_spec(config: Config) -> DecoderSpec:
    context = config.integer("max_position_embeddings", 2048)
    values = dict(config.values)
    values.setdefault("rope_theta", config.get("rotary_emb_base"))
    values.setdefault("partial_rotary_factor", config.get("rotary_pct", 0.25))
    settings = rope_settings(values)
    head_dim = config.integer("hidden_size") // config.integer("num_attention_heads")
    rotary: list[Rotary | None] = [rotary_from_config(settings, head_dim=head_dim, context_length=context)]
    return _spec(
        config,
        layers="num_hidden_layers",
        hidden="hidden_size",
        heads="num_attention_heads",
        context=context,
        norm_eps=config.number("layer_norm_eps", 1e-5),
        activation=config.activation("hidden_act", default="gelu"),
        rotary=rotary * config.integer("num_hidden_layers"),
        parallel=bool(config.get("use_parallel_residual", True)),
    )


def opt_spec(config: Config) -> DecoderSpec:
    return _spec(
        config,
        layers="num_hidden_layers",
        hidden="hidden_size",
        heads="num_attention_heads",
        context=config.integer("max_position_embeddings", 2048),
        activation=config.activation("activation_function", default="relu"),
        placement="pre" if config.get("do_layer_norm_before", True) else "post",
        final_norm=bool(config.get("do_layer_norm_before", True)) and not config.get("_remove_final_layer_norm", False),
    )


def bloom_spec(config: Config) -> DecoderSpec:
    renamed = {
        "n_layer": config.get("num_hidden_layers"),
        "hidden_size": config.get("n_embed"),
        "n_head": config.get("num_attention_heads"),
    }
    config = config.with_defaults({key: value for key, value in renamed.items() if value is not None})
    return _spec(
        config,
        layers="n_layer",
        hidden="hidden_size",
        heads="n_head",
        # ALiBi has no length of its own; seq_length is what the model was trained with
        context=config.integer("seq_length", 2048),
        norm_eps=config.number("layer_norm_epsilon", 1e-5),
        activation="gelu_tanh",
        alibi=True,
        residual_after_norm=bool(config.get("apply_residual_connection_post_layernorm", False)),
    )


class _Weights:
    def __init__(self, spec: DecoderSpec, tensors: Tensors, *, head: Tensors, tied: bool) -> None:
        self.spec, self.tensors, self.tied = spec, tensors, tied
        self._head = head  # the output projection stands outside the prefix of the decoder

    def release(self) -> None:
        self.tensors.checkpoint.release()

    def _logits(self, table: str, name: str) -> Linear:
        if self.tied:
            return Linear(self.tensors.matrix(table))
        return self._head.linear(name)

    def _fused_heads(self, name: str) -> tuple[Linear, Linear, Linear]:
        """Query, key and value of a projection whose rows are [heads, 3, head_dim]."""
        heads, head_dim = self.spec.heads, self.spec.head_dim

        def part(which: int) -> Callable[[Array], Array]:
            return lambda array: array.reshape(heads, 3, head_dim, -1)[:, which].reshape(heads * head_dim, *array.shape[1:])

        shape = (3 * heads * head_dim, self.spec.hidden_size)
        q, k, v = (self.tensors.linear(name, part(which), shape=shape) for which in range(3))
        return q, k, v


class Gpt2Weights(_Weights):
    def embed(self) -> EmbedWeights:
        shape = (self.spec.context_length, self.spec.hidden_size)
        return EmbedWeights(self.tensors.matrix("wte.weight"), self.tensors.matrix("wpe.weight", shape=shape))

    def head(self) -> HeadWeights:
        return HeadWeights(self._logits("wte.weight", "lm_head"), self.tensors.norm("ln_f"))

    def layer(self, index: int) -> LayerWeights:
        name, tensors, size = f"h.{index}.", self.tensors, self.spec.hidden_size
        parts = (slice(part * size, (part + 1) * size) for part in range(3))
        q, k, v = (self._conv1d(name + "attn.c_attn", part, outputs=3 * size) for part in parts)
        return LayerWeights(
            q=q,
            k=k,
            v=v,
            o=self._conv1d(name + "attn.c_proj"),
            up=self._conv1d(name + "mlp.c_fc"),
            down=self._conv1d(name + "mlp.c_proj"),
            attention_norm=tensors.norm(name + "ln_1"),
            mlp_norm=tensors.norm(name + "ln_2"),
        )

    def _conv1d(self, name: str, part: slice = slice(None), *, outputs: int | None = None) -> Linear:
        """A projection of GPT-2, which stores its weight as [in, out]."""
        weight = self.tensors.matrix(f"{name}.weight", shape=(None, outputs))
        return Linear(weight.transposed(lambda array: array[part]), self.tensors.tensor(f"{name}.bias", lambda array: array[part]))


class GptNeoxWeights(_Weights):
    def embed(self) -> EmbedWeights:
        return EmbedWeights(self.tensors.matrix("embed_in.weight"))

    def head(self) -> HeadWeights:
        return HeadWeights(self._logits("embed_in.weight", "embed_out"), self.tensors.norm("final_layer_norm"))

    def layer(self, index: int) -> LayerWeights:
        name, tensors = f"layers.{index}.", self.tensors
        q, k, v = self._fused_heads(name + "attention.query_key_value")
        return LayerWeights(
            q=q,
            k=k,
            v=v,
            o=tensors.linear(name + "attention.dense"),
            up=tensors.linear(name + "mlp.dense_h_to_4h"),
            down=tensors.linear(name + "mlp.dense_4h_to_h"),
            attention_norm=tensors.norm(name + "input_layernorm"),
            mlp_norm=tensors.norm(name + "post_attention_layernorm"),
        )


class OptWeights(_Weights):
    def embed(self) -> EmbedWeights:
        rows = self.spec.context_length + OPT_POSITION_OFFSET
        return EmbedWeights(
            tokens=self.tensors.matrix("embed_tokens.weight"),
            positions=self.tensors.matrix("embed_positions.weight", shape=(rows, self.spec.hidden_size)),
            position_offset=OPT_POSITION_OFFSET,
            project=self.tensors.linear("project_in") if "project_in.weight" in self.tensors else None,
        )

    def head(self) -> HeadWeights:
        return HeadWeights(
            logits=self._logits("embed_tokens.weight", "lm_head"),
            norm=self._norm("final_layer_norm") if self.spec.final_norm else None,
            project=self.tensors.linear("project_out") if "project_out.weight" in self.tensors else None,
        )

    def layer(self, index: int) -> LayerWeights:
        name, tensors = f"layers.{index}.", self.tensors
        square = (self.spec.hidden_size, self.spec.hidden_size)
        return LayerWeights(
            q=tensors.linear(name + "self_attn.q_proj", shape=square),
            k=tensors.linear(name + "self_attn.k_proj", shape=square),
            v=tensors.linear(name + "self_attn.v_proj", shape=square),
            o=tensors.linear(name + "self_attn.out_proj"),
            up=tensors.linear(name + "fc1"),
            down=tensors.linear(name + "fc2"),
            attention_norm=self._norm(name + "self_attn_layer_norm"),
            mlp_norm=self._norm(name + "final_layer_norm"),
        )

    def _norm(self, name: str) -> Norm:
        """Some OPT norms have no weights and only standardize: their weights are ones."""
        return self.tensors.optional_norm(name) or Norm(np.ones(self.spec.hidden_size, np.float32))


class BloomWeights(_Weights):
    def embed(self) -> EmbedWeights:
        return EmbedWeights(self.tensors.matrix("word_embeddings.weight"), norm=self.tensors.norm("word_embeddings_layernorm"))

    def head(self) -> HeadWeights:
        return HeadWeights(self._logits("word_embeddings.weight", "lm_head"), self.tensors.norm("ln_f"))

    def layer(self, index: int) -> LayerWeights:
        name, tensors = f"h.{index}.", self.tensors
        q, k, v = self._fused_heads(name + "self_attention.query_key_value")
        return LayerWeights(
            q=q,
            k=k,
            v=v,
            o=tensors.linear(name + "self_attention.dense"),
            up=tensors.linear(name + "mlp.dense_h_to_4h"),
            down=tensors.linear(name + "mlp.dense_4h_to_h"),
            attention_norm=tensors.norm(name + "input_layernorm"),
            mlp_norm=tensors.norm(name + "post_attention_layernorm"),
        )
