"""The blocks of a decoder, from its spec and weights: embed, one layer, head. See docs/model-format.md."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from mesh.importer.families.spec import (
    DecoderSpec,
    DecoderWeights,
    EmbedWeights,
    Experts,
    HeadWeights,
    LayerWeights,
    Linear,
    Norm,
    Rotary,
    alibi_slopes,
)
from mesh.importer.options import ImportOptions
from mesh.importer.write.blocks import BlockWriter, GraphBuilder, attention_block, tensor_type
from mesh.model.manifest import BlockInfo, block_name
from mesh.types import Progress

__all__ = ["build_embed", "build_head", "build_layer", "write_decoder"]

BATCH, CHUNK, CACHE = "batch", "chunk", "cache"
INT64 = int(TensorProto.INT64)


def write_decoder(
    writer: BlockWriter, spec: DecoderSpec, weights: DecoderWeights, options: ImportOptions, progress: Progress
) -> tuple[BlockInfo, ...]:
    """Build and write every block in order; at most one block's weights are being read at a time."""
    total = spec.layers + 2
    infos: list[BlockInfo] = []
    for index in range(-1, spec.layers + 1):
        if index < 0:
            builder = build_embed(spec, weights.embed(), options)
        elif index < spec.layers:
            builder = build_layer(spec, index, weights.layer(index), options)
        else:
            builder = build_head(spec, weights.head(), options)
        progress(builder.name, len(infos), total)
        infos.append(builder.write(writer))
        weights.release()
    progress("done", total, total)
    return tuple(infos)


def build_embed(spec: DecoderSpec, weights: EmbedWeights, options: ImportOptions) -> GraphBuilder:
    """input_ids [B, T] (and position_ids, where positions are learned) -> hidden_out [B, T, D]."""
    builder = GraphBuilder(block_name("embed"), options)
    ids = builder.input("input_ids", [BATCH, CHUNK], INT64)
    hidden = builder.embedding(ids, "tokens", weights.tokens)
    if spec.embed_scale != 1.0:
        hidden = builder.op("Mul", hidden, builder.const(spec.embed_scale))
    if weights.project is not None:
        hidden = _linear(builder, hidden, "project", weights.project)
    if weights.positions is not None:
        positions = builder.input("position_ids", [BATCH, CHUNK], INT64)
        if weights.position_offset:
            positions = builder.op("Add", positions, builder.const(weights.position_offset))
        hidden = builder.op("Add", hidden, builder.embedding(positions, "positions", weights.positions))
    if weights.norm is not None:
        hidden = _norm(builder, spec, hidden, "norm", weights.norm)
    _finish(builder, hidden, "hidden_out", spec.hidden_size)
    return builder


def build_layer(spec: DecoderSpec, index: int, weights: LayerWeights, options: ImportOptions) -> GraphBuilder:
    """hidden_in [B, T, D] and the layer's cache -> hidden_out [B, T, D] and the cache."""
    builder = GraphBuilder(block_name(index), options)
    hidden = builder.input("hidden_in", [BATCH, CHUNK, spec.hidden_size])
    builder.input("position_ids", [BATCH, CHUNK], INT64)
    builder.input("write_indices", [BATCH], INT64)
    cache_shape: list[int | str] = [BATCH, spec.kv_heads, CACHE, spec.head_dim]
    builder.input("past_key", cache_shape)
    builder.input("past_value", cache_shape)

    before = spec.placement == "pre"
    normed = _norm(builder, spec, hidden, "attention_norm", weights.attention_norm) if before else hidden
    attended = _attention(builder, spec, index, normed, weights)
    if weights.attention_out_norm is not None:
        attended = _norm(builder, spec, attended, "attention_out_norm", weights.attention_out_norm)
    if spec.parallel:
        fed = _feed_forward(builder, spec, _norm(builder, spec, hidden, "mlp_norm", weights.mlp_norm), weights)
        result = builder.op("Add", builder.op("Add", attended, fed), hidden)
    else:
        middle = builder.op("Add", attended, normed if spec.residual_after_norm else hidden)
        if not before:
            middle = _norm(builder, spec, middle, "attention_norm", weights.attention_norm)
        normed = _norm(builder, spec, middle, "mlp_norm", weights.mlp_norm) if before else middle
        fed = _feed_forward(builder, spec, normed, weights)
        if weights.mlp_out_norm is not None:
            fed = _norm(builder, spec, fed, "mlp_out_norm", weights.mlp_out_norm)
        result = builder.op("Add", fed, normed if spec.residual_after_norm else middle)
        if not before:
            result = _norm(builder, spec, result, "mlp_norm", weights.mlp_norm)
    _finish(builder, result, "hidden_out", spec.hidden_size)
    builder.output("present_key", cache_shape)
    builder.output("present_value", cache_shape)
    return builder


def build_head(spec: DecoderSpec, weights: HeadWeights, options: ImportOptions) -> GraphBuilder:
    """hidden_in [B, T, D] -> logits [B, T, V]."""
    builder = GraphBuilder(block_name("head"), options)
    hidden = builder.input("hidden_in", [BATCH, CHUNK, spec.hidden_size])
    if weights.norm is not None:
        hidden = _norm(builder, spec, hidden, "norm", weights.norm)
    if weights.project is not None:
        hidden = _linear(builder, hidden, "project", weights.project)
    logits = _linear(builder, hidden, "logits", weights.logits)
    if spec.logit_scale != 1.0:
        logits = builder.op("Mul", logits, builder.const(spec.logit_scale))
    if spec.logit_softcap:
        cap = builder.const(spec.logit_softcap)
        logits = builder.op("Mul", builder.op("Tanh", builder.op("Div", logits, cap)), cap)
    _finish(builder, logits, "logits", spec.vocab_size)
    return builder


def _attention(builder: GraphBuilder, spec: DecoderSpec, index: int, hidden: str, weights: LayerWeights) -> str:
    q = _heads(builder, spec, _linear(builder, hidden, "q", weights.q), spec.heads)
    k = _heads(builder, spec, _linear(builder, hidden, "k", weights.k), spec.kv_heads)
    v = _heads(builder, spec, _linear(builder, hidden, "v", weights.v), spec.kv_heads)
    if weights.q_norm is not None:
        q = _norm(builder, spec, q, "q_norm", weights.q_norm)
    if weights.k_norm is not None:
        k = _norm(builder, spec, k, "k_norm", weights.k_norm)
    rotary = spec.rotary[index]
    if rotary is not None:
        q, k = _rotate(builder, rotary, spec.head_dim, q, k)
    context, _, _ = attention_block(
        builder,
        q,
        k,
        v,
        scale=spec.scale[index],
        softcap=spec.attention_softcap,
        window=spec.window[index],
        alibi_slopes=alibi_slopes(spec.heads) if spec.alibi else None,
    )
    merged = builder.op("Reshape", builder.op("Transpose", context, perm=[0, 2, 1, 3]), builder.const([0, 0, spec.heads * spec.head_dim]))
    return _linear(builder, merged, "o", weights.o)


def _heads(builder: GraphBuilder, spec: DecoderSpec, x: str, heads: int) -> str:
    """[B, T, heads * head_dim] -> [B, heads, T, head_dim]"""
    return builder.op("Transpose", builder.op("Reshape", x, builder.const([0, 0, heads, spec.head_dim])), perm=[0, 2, 1, 3])


def _rotate(builder: GraphBuilder, rotary: Rotary, head_dim: int, q: str, k: str) -> tuple[str, str]:
    """Angles in float32 whatever the compute type: a position times a frequency needs the precision."""
    positions = builder.op("Unsqueeze", builder.op("Cast", "position_ids", to=TensorProto.FLOAT), builder.const([2]))
    angles = builder.op("Mul", positions, builder.const(rotary.inverse_frequencies, np.float32))  # [B, T, rotary_dim / 2]
    tables = []
    for function in ("Cos", "Sin"):
        table = builder.op(function, angles)
        if rotary.factor != 1.0:
            table = builder.op("Mul", table, builder.const(rotary.factor, np.float32))
        if builder.options.dtype != "float32":
            table = builder.op("Cast", table, to=tensor_type(builder.options.dtype))
        tables.append(table)
    partial = rotary.dim if rotary.dim < head_dim else 0
    q, k = (builder.op("RotaryEmbedding", x, *tables, rotary_embedding_dim=partial) for x in (q, k))
    return q, k


def _feed_forward(builder: GraphBuilder, spec: DecoderSpec, hidden: str, weights: LayerWeights) -> str:
    if spec.experts is not None:
        return _experts(builder, spec, spec.experts, hidden, weights)
    up = _linear(builder, hidden, "up", weights.up)
    if weights.gate is None:
        active = _activate(builder, spec.activation, up)
    else:
        active = builder.op("Mul", _activate(builder, spec.activation, _linear(builder, hidden, "gate", weights.gate)), up)
    return _linear(builder, active, "down", weights.down)


def _experts(builder: GraphBuilder, spec: DecoderSpec, experts: Experts, hidden: str, weights: LayerWeights) -> str:
    """Each token goes through the experts that its router has chosen: their weights are gathered, which the runtime does without a copy."""
    if weights.router is None or weights.gate is None:
        raise ValueError(f"{spec.architecture}: a mixture of experts needs a router and gated experts")
    tokens = builder.op("Reshape", hidden, builder.const([-1, spec.hidden_size]))  # [N, D]
    scores = builder.op("MatMul", tokens, builder.parameter("router.weight", weights.router.weight))
    if weights.router.bias is not None:
        scores = builder.op("Add", scores, builder.parameter("router.bias", weights.router.bias))
    shares = builder.op("Softmax", builder.op("Cast", scores, to=TensorProto.FLOAT), axis=-1)  # [N, E]
    best, chosen = builder.ops("TopK", shares, builder.const([experts.active]), out=2, axis=-1)  # [N, active]
    if experts.normalize:
        best = builder.op("Div", best, builder.op("ReduceSum", best, builder.const([-1]), keepdims=1))
    best = builder.op("Cast", builder.op("Unsqueeze", best, builder.const([-1])), to=tensor_type(builder.options.dtype))  # [N, active, 1]

    each = builder.op("Expand", builder.op("Unsqueeze", tokens, builder.const([1])), builder.const([1, experts.active, 1]))
    each = builder.op("Reshape", each, builder.const([-1, 1, spec.hidden_size]))  # [N * active, 1, D]
    chosen = builder.op("Reshape", chosen, builder.const([-1]))
    gate = _activate(builder, spec.activation, _expert_linear(builder, each, chosen, "gate", weights.gate))
    active = builder.op("Mul", gate, _expert_linear(builder, each, chosen, "up", weights.up))
    output = _expert_linear(builder, active, chosen, "down", weights.down)  # [N * active, 1, D]
    output = builder.op("Reshape", output, builder.const([-1, experts.active, spec.hidden_size]))
    summed = builder.op("ReduceSum", builder.op("Mul", output, best), builder.const([1]), keepdims=0)  # [N, D]
    return builder.op("Reshape", summed, builder.op("Shape", hidden))


def _expert_linear(builder: GraphBuilder, x: str, chosen: str, name: str, linear: Linear) -> str:
    """x [S, 1, in] through the weights of the experts `chosen` [S] -> [S, 1, out]."""
    table, outputs_first = builder.experts(name, linear.weight)
    each = builder.op("Gather", table, chosen)
    return builder.op("MatMul", x, builder.op("Transpose", each, perm=[0, 2, 1]) if outputs_first else each)


def _activate(builder: GraphBuilder, activation: str, x: str) -> str:
    if activation in ("gelu", "gelu_tanh"):
        return builder.op("Gelu", x, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == "silu":
        return builder.op("Mul", x, builder.op("Sigmoid", x))
    if activation == "quick_gelu":
        return builder.op("Mul", x, builder.op("Sigmoid", builder.op("Mul", x, builder.const(1.702))))
    if activation == "relu2":
        positive = builder.op("Relu", x)
        return builder.op("Mul", positive, positive)
    return builder.op({"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}[activation], x)


def _linear(builder: GraphBuilder, x: str, name: str, linear: Linear) -> str:
    return builder.linear(x, name, linear.weight, linear.bias)


def _norm(builder: GraphBuilder, spec: DecoderSpec, x: str, name: str, norm: Norm) -> str:
    weight = builder.parameter(f"{name}.weight", norm.weight)
    if spec.norm == "rms":
        return builder.op("RMSNormalization", x, weight, axis=-1, epsilon=spec.norm_eps)
    bias = [builder.parameter(f"{name}.bias", norm.bias)] if norm.bias is not None else []
    return builder.op("LayerNormalization", x, weight, *bias, axis=-1, epsilon=spec.norm_eps)


def _finish(builder: GraphBuilder, value: str, name: str, size: int) -> None:
    """Make `value` the output `name` of the block. The node that produces it is renamed if possible, else an Identity is added."""
    last = builder.nodes[-1]
    if len(last.output) == 1 and last.output[0] == value:
        last.output[0] = name
    else:
        builder.op("Identity", value, out=name)
    builder.output(name, [BATCH, CHUNK, size])
