"""The com.microsoft ops of onnxruntime-genai's decoder graphs, as onnxruntime's CPU kernels have them."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from mesh.errors import UnsupportedModel
from mesh.lowering.op_helpers import Array, wide
from mesh.lowering.ops.attention import exponentials, grouped_scores, join_heads, rotate, split_heads, weighted_values
from mesh.lowering.ops.indexing import TensorScatter
from mesh.lowering.ops.quant import DequantizeLinear, QuantizeLinear
from mesh.lowering.registry import MICROSOFT, register

register("DequantizeLinear", domain=MICROSOFT)(DequantizeLinear)
register("QuantizeLinear", domain=MICROSOFT)(QuantizeLinear)


@register("RotaryEmbedding", domain=MICROSOFT, allowed={"is_packed_batching": (0,)})
def RotaryEmbedding_microsoft(
    input: Array, position_ids: Array, cos_cache: Array, sin_cache: Array,
    *, interleaved: int = 0, is_packed_batching: int = 0, num_heads: int = 0, rotary_embedding_dim: int = 0, scale: float = 1.0,
) -> Array:  # fmt: skip
    """input [B, T, H * D] or [B, H, T, D]; caches [positions, R / 2]; position_ids [B, T], or [1]: that of the first token."""
    if input.ndim == 3 and rotary_embedding_dim and not num_heads:
        raise UnsupportedModel("rotary_embedding_dim of a 3-D input needs num_heads")
    x = split_heads(input, num_heads or input.shape[-1] // (2 * cos_cache.shape[-1]))
    if position_ids.size == 1 and position_ids.ndim == 1:
        position_ids = position_ids.reshape(1, 1) + np.arange(x.shape[2])
    cos, sin = (jnp.take(cache, position_ids, axis=0, mode="clip")[:, None] for cache in (cos_cache, sin_cache))
    y = rotate(x, cos, sin, bool(interleaved), rotary_embedding_dim or x.shape[3])
    if scale != 1.0:
        y = (y * scale).astype(y.dtype)
    return join_heads(y) if input.ndim == 3 else y


@register(
    domain=MICROSOFT,
    allowed={"qk_output": (0,), "kv_cache_bit_width": (0,), "k_quant_type": ("NONE",), "v_quant_type": ("NONE",)},
    static=(6,),
)
def GroupQueryAttention(
    query: Array, key: Array | None, value: Array | None, past_key: Array | None, past_value: Array | None, seqlens_k: Array,
    total_sequence_length: Array, cos_cache: Array | None = None, sin_cache: Array | None = None, position_ids: Array | None = None,
    attention_bias: Array | None = None, head_sink: Array | None = None, *, num_heads: int, kv_num_heads: int, do_rotary: int = 0,
    rotary_interleaved: int = 0, local_window_size: int = -1, scale: float = 0.0, softcap: float = 0.0, smooth_softmax: int = 0,
    qk_output: int = 0, kv_cache_bit_width: int = 0, k_quant_type: str = "NONE", v_quant_type: str = "NONE",
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Output [B, T, Hq * D], present_key and present_value [B, Hkv, S, D].

    query [B, T, Hq * D], key and value [B, T, Hkv * D] (or all three side by side in query); pasts [B, Hkv, P, D]; seqlens_k [B]:
    tokens of a row, the new ones included, less one; total_sequence_length: the longest row's tokens; S = max(P, that).
    """
    if key is None or value is None:
        size = query.shape[-1] // (num_heads + 2 * kv_num_heads)
        query, key, value = jnp.split(query, [num_heads * size, (num_heads + kv_num_heads) * size], axis=-1)
    q, k, v = split_heads(query, num_heads), split_heads(key, kv_num_heads), split_heads(value, kv_num_heads)
    t, d = q.shape[2], q.shape[3]
    total = int(np.asarray(total_sequence_length).reshape(()))
    rows = seqlens_k.reshape(-1).astype(np.int32) + 1  # [B] tokens of each row
    past = jnp.zeros_like(rows) if t == total else jnp.maximum(rows - t, 0)  # [B]
    positions = past[:, None] + np.arange(t, dtype=np.int32)  # [B, T]
    if do_rotary:
        if cos_cache is None or sin_cache is None:
            raise UnsupportedModel("do_rotary without cos_cache and sin_cache")
        at = positions if position_ids is None else position_ids
        cos, sin = (jnp.take(cache, at, axis=0, mode="clip")[:, None] for cache in (cos_cache, sin_cache))
        width = 2 * cos_cache.shape[-1]
        q, k = rotate(q, cos, sin, bool(rotary_interleaved), width), rotate(k, cos, sin, bool(rotary_interleaved), width)

    length = max(total, 0 if past_key is None else past_key.shape[2])
    present_key, present_value = (_appended(old, new, past, length) for old, new in ((past_key, k), (past_value, v)))

    scores = grouped_scores(q, present_key, scale or 1 / math.sqrt(d))  # [B, Hq, T, S]
    if softcap > 0:
        scores = softcap * jnp.tanh(scores / softcap)
    if attention_bias is not None:
        missing = length - attention_bias.shape[-1]
        if missing > 0:
            attention_bias = jnp.pad(attention_bias, [(0, 0)] * 3 + [(0, missing)])
        scores = scores + attention_bias.astype(scores.dtype)
    slots = np.arange(length, dtype=np.int32)
    allowed = slots <= positions[:, None, :, None]
    if local_window_size > 0:
        allowed = allowed & (slots > positions[:, None, :, None] - local_window_size)
    sink = head_sink.astype(scores.dtype).reshape(1, -1, 1, 1) if head_sink is not None else 0.0 if smooth_softmax == 1 else None
    e, total_weight = exponentials(scores, allowed, sink)
    return join_heads(weighted_values(e, total_weight, present_value)), present_key, present_value


def _appended(past: Array | None, new: Array, at: Array, length: int) -> Array:
    """The cache [B, H, length, D] with `new` [B, H, T, D] written at each row's position."""
    if past is None:
        past = jnp.zeros((new.shape[0], new.shape[1], length, new.shape[3]), new.dtype)
    elif past.shape[2] < length:
        past = jnp.pad(past, [(0, 0), (0, 0), (0, length - past.shape[2]), (0, 0)])
    return TensorScatter(past, new, at)


def _codes(packed: Array, bits: int, count: int) -> Array:
    """Bytes [..., n] -> the first `count` codes of `bits` bits, uint8 [..., count], the lowest bits first."""
    if bits == 8:
        return packed[..., :count]
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    fields = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return fields.reshape(*packed.shape[:-1], -1)[..., :count]


@register(domain=MICROSOFT, allowed={"bits": (2, 4, 8)})
def MatMulNBits(
    A: Array, B: Array, scales: Array, zero_points: Array | None = None, g_idx: Array | None = None, bias: Array | None = None,
    *, K: int, N: int, bits: int = 4, block_size: int, accuracy_level: int = 0, weight_prepacked: int = 0,
) -> Array:  # fmt: skip
    """A [..., K] times a weight [N, K] quantized in blocks along K, transposed -> [..., N].

    B uint8 [N, blocks, block_size * bits / 8]; scales [N, blocks]; zero_points: packed uint8, or of the scales' type.
    """
    if weight_prepacked:
        raise UnsupportedModel("weight_prepacked = 1 is a layout of one machine; export the model without it")
    blocks = -(-K // block_size)
    work = wide(A.dtype)
    codes = _codes(B.reshape(N, blocks, -1), bits, block_size).astype(work)  # [N, blocks, block_size]
    scale = scales.reshape(N, blocks, 1).astype(work)
    if zero_points is None:
        zero: Any = float(1 << (bits - 1))
    elif zero_points.dtype == np.uint8:
        zero = _codes(zero_points.reshape(N, -1), bits, blocks)[..., None].astype(work)
    else:
        zero = zero_points.reshape(N, blocks, 1).astype(work)
    if g_idx is None:
        weight = ((codes - zero) * scale).reshape(N, -1)[:, :K]
    else:
        group = g_idx[:K]
        weight = codes.reshape(N, -1)[:, :K]
        offset = zero if isinstance(zero, float) else jnp.take(zero[..., 0], group, axis=1)
        weight = (weight - offset) * jnp.take(scale[..., 0], group, axis=1)
    y = jnp.matmul(A, weight.T.astype(A.dtype))
    return y if bias is None else y + bias
