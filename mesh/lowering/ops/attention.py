"""Attention and rotary embeddings of the ONNX standard.

Grouped queries share their key and value heads by a reshape of the queries; keys are never repeated in memory.
"""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from mesh.errors import UnsupportedModel
from mesh.lowering.op_helpers import Array, type_of, wide
from mesh.lowering.registry import register

_RAW, _, _BIASED, _PROBABILITIES = range(4)  # qk_matmul_output_mode


def split_heads(x: Array, heads: int | None) -> Array:
    """[B, T, H * D] -> [B, H, T, D]; 4-D is returned as it is."""
    if x.ndim == 4:
        return x
    if not heads:
        raise UnsupportedModel("a 3-D input needs q_num_heads and kv_num_heads")
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(0, 2, 1, 3)


def join_heads(x: Array) -> Array:
    """[B, H, T, D] -> [B, T, H * D]."""
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def grouped_scores(q: Array, k: Array, scale: float) -> Array:
    """q [B, Hq, T, D], k [B, Hkv, S, D] -> q k^T * scale [B, Hq, T, S], in float32 or wider; Hkv divides Hq."""
    b, hq, t, d = q.shape
    hkv = k.shape[1]
    if hq % hkv:
        raise UnsupportedModel(f"{hq} query heads do not divide among {hkv} key heads")
    grouped = q.reshape(b, hkv, hq // hkv, t, d)
    scores = jnp.einsum("bhgtd,bhsd->bhgts", grouped, k, preferred_element_type=wide(q.dtype))
    return scores.reshape(b, hq, t, k.shape[2]) * np.asarray(scale, scores.dtype)


def exponentials(scores: Array, allowed: Array | None, sink: Array | float | None = None) -> tuple[Array, Array]:
    """Softmax over the last axis, not yet divided: exponentials [B, H, T, S] and their sums [B, H, T, 1].

    A row in which nothing is allowed has exponentials 0 and sum 1: its probabilities are zeros, never NaN. `sink` is one more
    logit that takes its share and has no value ([1, H, 1, 1], or one number).
    """
    if allowed is not None:
        scores = jnp.where(allowed, scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    if sink is not None:
        peak = jnp.maximum(peak, sink)
    peak = jnp.where(jnp.isneginf(peak), jnp.zeros((), scores.dtype), peak)
    e = jnp.exp(scores - peak)
    total = jnp.sum(e, axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(sink - peak)
    return e, jnp.where(total == 0, jnp.ones((), scores.dtype), total)


def weighted_values(e: Array, total: Array, v: Array) -> Array:
    """Exponentials [B, Hq, T, S] and sums [B, Hq, T, 1] with v [B, Hkv, S, Dv] -> [B, Hq, T, Dv] in v's type.

    The division comes last: it is over Dv numbers instead of S, and the result is rounded once. Small exponentials would be lost
    in float16, which has the bits but not the range, so that type is multiplied as float32.
    """
    b, hq, t, s = e.shape
    hkv, kind = v.shape[1], v.dtype
    if kind == np.float16:
        v = v.astype(e.dtype)
    grouped = e.astype(v.dtype).reshape(b, hkv, hq // hkv, t, s)
    y = jnp.einsum("bhgts,bhsd->bhgtd", grouped, v, preferred_element_type=e.dtype)
    return (y.reshape(b, hq, t, v.shape[3]) / total).astype(kind)


@register()
def Attention(
    Q: Array, K: Array, V: Array, attn_mask: Array | None = None, past_key: Array | None = None, past_value: Array | None = None,
    nonpad_kv_seqlen: Array | None = None, *, is_causal: int = 0, kv_num_heads: int | None = None, q_num_heads: int | None = None,
    qk_matmul_output_mode: int = _RAW, scale: float | None = None, softcap: float = 0.0, softmax_precision: int | None = None,
    left_window_size: int = -1, right_window_size: int = -1, n_outputs: int = 1,
) -> tuple[Array | None, ...]:  # fmt: skip
    """Y, present_key, present_value, qk_matmul_output, as opsets 23 to 25 have them.

    Q [B, Hq, T, D] or [B, T, Hq * D]; K, V likewise with Hkv; pasts [B, Hkv, P, D]; nonpad_kv_seqlen [B]. The mask (bool: True
    attends; else added) broadcasts to [B, Hq, T, S], a shorter last axis hides the rest. A query that may attend nothing gives zeros.
    """
    if (past_key is None) != (past_value is None):
        raise UnsupportedModel("past_key and past_value go together")
    q, k, v = split_heads(Q, q_num_heads), split_heads(K, kv_num_heads), split_heads(V, kv_num_heads)
    past = 0
    if past_key is not None and past_value is not None:
        past = past_key.shape[2]
        k, v = jnp.concatenate([past_key, k], axis=2), jnp.concatenate([past_value, v], axis=2)
    t, s = q.shape[2], k.shape[2]

    bias, allowed = None, None  # added to the scores / bool; both broadcast to [B, Hq, T, S]
    if attn_mask is not None:
        if attn_mask.shape[-1] < s:
            hidden = False if attn_mask.dtype == bool else -np.inf
            attn_mask = jnp.pad(attn_mask, [(0, 0)] * (attn_mask.ndim - 1) + [(0, s - attn_mask.shape[-1])], constant_values=hidden)
        if attn_mask.dtype == bool:
            allowed = attn_mask
        else:
            bias = attn_mask

    offset = past if nonpad_kv_seqlen is None else (nonpad_kv_seqlen - t).reshape(-1, 1, 1, 1)  # position of the first query
    ahead = np.arange(s)[None, :] - np.arange(t)[:, None] - offset  # key position - query position, [T, S] or [B, 1, T, S]
    rules = []
    if is_causal:
        rules.append(ahead <= 0)
    if left_window_size >= 0:
        rules.append(ahead >= -left_window_size)
    if right_window_size >= 0:
        rules.append(ahead <= right_window_size)
    if nonpad_kv_seqlen is not None:
        rules.append(np.arange(s) < nonpad_kv_seqlen.reshape(-1, 1, 1, 1))
    for rule in rules:
        allowed = rule if allowed is None else allowed & rule

    scores = grouped_scores(q, k, 1 / math.sqrt(q.shape[3]) if scale is None else scale)
    if softcap > 0:
        scores = softcap * jnp.tanh(scores / softcap)
    shown = scores  # ONNX's reference shows capped scores in mode 0 (raw) too
    if bias is not None:
        scores = scores + bias.astype(scores.dtype)
        # Whatever the scores are (even NaN), what the bias hides is hidden.
        visible = ~jnp.isneginf(bias)
        allowed = visible if allowed is None else allowed & visible
    if softmax_precision is not None:
        scores = scores.astype(jnp.promote_types(type_of(softmax_precision, jnp), scores.dtype))
    e, total = exponentials(scores, allowed)
    y = weighted_values(e, total, v)
    if n_outputs > 3 and qk_matmul_output_mode == _BIASED:
        shown = scores if allowed is None else jnp.where(allowed, scores, -jnp.inf)
    elif n_outputs > 3 and qk_matmul_output_mode == _PROBABILITIES:
        shown = e / total
    if Q.ndim == 3:
        y = join_heads(y)
    return y, k, v, shown.astype(q.dtype)


def rotate(x: Array, cos: Array, sin: Array, interleaved: bool, rotary_dim: int) -> Array:
    """x [B, H, T, D]; cos, sin [B or 1, 1, T, rotary_dim / 2]. Rotates the first `rotary_dim` of D."""
    part, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        a, b = part[..., 0::2], part[..., 1::2]
    else:
        a, b = part[..., : rotary_dim // 2], part[..., rotary_dim // 2 :]
    real, imaginary = a * cos - b * sin, a * sin + b * cos
    if interleaved:
        turned = jnp.stack([real, imaginary], axis=-1).reshape(part.shape)
    else:
        turned = jnp.concatenate([real, imaginary], axis=-1)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


@register()
def RotaryEmbedding(
    X: Array, cos_cache: Array, sin_cache: Array, position_ids: Array | None = None,
    *, interleaved: int = 0, num_heads: int = 0, rotary_embedding_dim: int = 0,
) -> Array:  # fmt: skip
    """X [B, H, T, D] or [B, T, H * D]. Caches [positions, R / 2] with position_ids [B, T], or [B, T, R / 2] without."""
    x = split_heads(X, num_heads)
    if position_ids is not None:
        cos_cache = jnp.take(cos_cache, position_ids, axis=0, mode="clip")
        sin_cache = jnp.take(sin_cache, position_ids, axis=0, mode="clip")
    y = rotate(x, cos_cache[:, None], sin_cache[:, None], bool(interleaved), rotary_embedding_dim or x.shape[3])
    return join_heads(y) if X.ndim == 3 else y
