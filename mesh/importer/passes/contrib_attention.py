"""Rules for com.microsoft's attentions and rotary embedding: each becomes the ONNX operator, with the cache as its own inputs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from mesh.importer.graph.decoder import attribute, input_of, producer
from mesh.importer.graph.edit import new_constant
from mesh.importer.passes.contrib_rewriter import Result, Rewriter, Rule, optional, refuse

__all__ = ["ATTENTIONS", "WINDOW"]

WINDOW = "mesh.window"
"""Key in the meta of an Attention that was made here: its sliding window in tokens."""


def _rotary(r: Rewriter, node: ir.Node) -> Result:
    x, given, cos, sin = (input_of(node, place) for place in range(4))
    if attribute(node, "scale", 1.0) != 1.0 or attribute(node, "is_packed_batching", 0):
        raise refuse(node, "a scaled or packed rotary embedding")
    # an offset of one element stands for offset, offset + 1, ...: the positions of the chunk
    positions = given if given.shape is None or len(given.shape) == 2 else r.positions()
    heads, width = int(attribute(node, "num_heads", 0)), int(attribute(node, "rotary_embedding_dim", 0))
    return [_rotate(r, node, x, positions, cos, sin, heads, width, bool(attribute(node, "interleaved", 0)))]


def _rotate(
    r: Rewriter,
    at: ir.Node,
    x: ir.Value,
    positions: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    heads: int,
    rotary: int,
    interleaved: bool,
) -> ir.Value:
    common = {"interleaved": int(interleaved), "rotary_embedding_dim": rotary}
    if heads:
        return r.one(at, "RotaryEmbedding", x, cos, sin, positions, num_heads=heads, **common)
    if x.shape is not None and len(x.shape) == 4:
        return r.one(at, "RotaryEmbedding", x, cos, sin, positions, **common)
    # merged heads of unknown number: the whole head is rotated, so its width is twice the table's
    half = int(cos.shape[-1]) if cos.shape is not None and isinstance(cos.shape[-1], int) else 0
    if not half or rotary:
        raise refuse(at, "a partial rotary embedding without num_heads")
    split = r.one(at, "Transpose", r.one(at, "Reshape", x, r.ints(0, 0, -1, 2 * half)), perm=[0, 2, 1, 3])
    turned = r.one(at, "RotaryEmbedding", split, cos, sin, positions, **common)
    return r.one(at, "Reshape", r.one(at, "Transpose", turned, perm=[0, 2, 1, 3]), r.ints(0, 0, -1))


def _group_query_attention(r: Rewriter, node: ir.Node) -> Result:
    heads, kv_heads = int(attribute(node, "num_heads")), int(attribute(node, "kv_num_heads"))
    past_key, past_value = optional(node, 3), optional(node, 4)
    if attribute(node, "smooth_softmax", 0) == 1 or optional(node, 11) is not None:
        raise refuse(node, "a smooth softmax or an attention sink")
    if attribute(node, "k_quant_type", "NONE") != "NONE" or attribute(node, "v_quant_type", "NONE") != "NONE":
        raise refuse(node, "a quantized cache")
    if any(optional(node, place) is not None for place in range(12, len(node.inputs))):
        raise refuse(node, "a norm of queries and keys, or another part, inside the attention (build the model for the CPU): it")
    query, key, value = input_of(node, 0), optional(node, 1), optional(node, 2)
    cos, sin = optional(node, 7), optional(node, 8)
    width = _head_width(node, heads, kv_heads)
    for past in (past_key, past_value):
        _fix_width(past, width)
    if key is None or value is None:
        query, key, value = r.op(node, "Split", query, r.ints(heads * width, kv_heads * width, kv_heads * width), outputs=3, axis=-1)
    if attribute(node, "do_rotary", 0):
        if cos is None or sin is None:
            raise refuse(node, "do_rotary without cos_cache and sin_cache")
        given = optional(node, 9)
        positions = given if given is not None else r.positions()
        interleaved = bool(attribute(node, "rotary_interleaved", 0))
        half = cos.shape[-1] if cos.shape is not None else None
        rotary = 2 * half if isinstance(half, int) and 2 * half != width else 0
        query = _rotate(r, node, query, positions, cos, sin, heads, rotary, interleaved)
        key = _rotate(r, node, key, positions, cos, sin, kv_heads, rotary, interleaved)
    window = int(attribute(node, "local_window_size", -1))
    outputs = r.op(
        node,
        "Attention",
        query,
        key,
        value,
        optional(node, 10),
        past_key,
        past_value,
        outputs=3,
        q_num_heads=heads,
        kv_num_heads=kv_heads,
        scale=attribute(node, "scale", 0.0) or None,
        softcap=attribute(node, "softcap", 0.0) or None,
        is_causal=1,
    )
    if window > 0:
        producer(outputs[0]).meta[WINDOW] = window
    return outputs


def _head_width(node: ir.Node, heads: int, kv_heads: int) -> int:
    """The size of a head: the past key's last axis, or, where that has only a name, what the keys' or all projections' size says."""
    key = optional(node, 1)
    for value, count in ((optional(node, 3), 1), (key, kv_heads), (input_of(node, 0), heads if key is not None else heads + 2 * kv_heads)):
        size = value.shape[-1] if value is not None and value.shape is not None else None
        if isinstance(size, int) and size % count == 0:
            return size // count
    raise refuse(node, "a past key of unknown head size")


def _fix_width(past: ir.Value | None, width: int) -> None:
    """Say the size of a head in the shape of a past that has a name in its place."""
    if past is not None and past.shape is not None and not isinstance(past.shape[-1], int):
        past.shape = ir.Shape([*past.shape[:-1], width])


def _multi_head_attention(r: Rewriter, node: ir.Node) -> Result:
    query, key, value = input_of(node, 0), optional(node, 1), optional(node, 2)
    heads, bias = int(attribute(node, "num_heads")), optional(node, 3)
    if key is None or value is None:
        raise refuse(node, "a packed query, key and value")
    if bias is not None:
        size = bias.shape[0] // 3 if bias.shape is not None and isinstance(bias.shape[0], int) else 0
        if not size:
            raise refuse(node, "a bias of unknown size")
        parts = r.op(node, "Split", bias, r.ints(size, size, size), outputs=3, axis=0)
        query, key, value = (r.one(node, "Add", x, part) for x, part in zip((query, key, value), parts, strict=True))
    mask = optional(node, 5)
    return r.op(
        node,
        "Attention",
        query,
        key,
        value,
        mask,
        optional(node, 6),
        optional(node, 7),
        outputs=3,
        q_num_heads=heads,
        kv_num_heads=heads,
        scale=attribute(node, "scale", 0.0) or None,
        is_causal=int(attribute(node, "unidirectional", 0)),
    )


def _fused_attention(r: Rewriter, node: ir.Node) -> Result:
    """com.microsoft's Attention includes the projection to queries, keys and values, and stacks keys and values in one cache."""
    heads = int(attribute(node, "num_heads"))
    if attribute(node, "do_rotary", 0):
        raise refuse(node, "do_rotary")
    weights, bias, past = input_of(node, 1), optional(node, 2), optional(node, 4)
    width = weights.shape[-1] if weights.shape is not None else None
    if not isinstance(width, int):
        raise refuse(node, "a weight of unknown size")
    sizes = attribute(node, "qkv_hidden_sizes") or [width // 3] * 3
    packed = r.one(node, "MatMul", input_of(node, 0), weights)
    if bias is not None:
        packed = r.one(node, "Add", packed, bias)
    query, key, value = r.op(node, "Split", packed, r.ints(*sizes), outputs=3, axis=-1)
    cache = [r.one(node, "Gather", past, new_constant(r.graph, np.array(i)), axis=0) for i in (0, 1)] if past is not None else [None, None]
    outputs = r.op(
        node,
        "Attention",
        query,
        key,
        value,
        optional(node, 5),
        *cache,
        outputs=3,
        q_num_heads=heads,
        kv_num_heads=heads,
        scale=attribute(node, "scale", 0.0) or None,
        is_causal=int(attribute(node, "unidirectional", 0)),
    )
    return [outputs[0]]


ATTENTIONS: Mapping[str, Rule] = {
    "RotaryEmbedding": _rotary,
    "GroupQueryAttention": _group_query_attention,
    "MultiHeadAttention": _multi_head_attention,
    "Attention": _fused_attention,
}
