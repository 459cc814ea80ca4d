"""Attention and rotary embeddings of the ONNX standard.

Grouped queries share their key and value heads by a reshape of the queries; keys are never repeated in memory.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from mesh.errors import UnsupportedModel
from mesh.lowering.basis import Array, numpy_type, wide
from mesh.lowering.registry import register

_RAW, _CAPPED, _BIASED, _PROBABILITIES = range(4)  # qk_matmul_output_mode


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
    """q [B, Hq, T, D], k [B, Hkv, S, D] -> [B, Hq, T, S] in q's type; Hkv divides Hq.

    Each side is scaled by the square root, which keeps 16-bit products in range.
    """
    b, hq, t, d = q.shape
    hkv = k.shape[1]
    if hq % hkv:
        raise UnsupportedModel(f"{hq} query heads do not divide among {hkv} key heads")
    root = np.asarray(math.sqrt(scale), q.dtype)
    scores = jnp.einsum("bhgtd,bhsd->bhgts", (q * root).reshape(b, hkv, hq // hkv, t, d), k * root)
    return scores.reshape(b, hq, t, k.shape[2])


def grouped_values(p: Array, v: Array) -> Array:
    """p [B, Hq, T, S], v [B, Hkv, S, Dv] -> [B, Hq, T, Dv]."""
    b, hq, t, s = p.shape
    hkv = v.shape[1]
    y = jnp.einsum("bhgts,bhsd->bhgtd", p.reshape(b, hkv, hq // hkv, t, s), v)
    return y.reshape(b, hq, t, v.shape[3])


def masked_softmax(scores: Array, allowed: Array | None, precision: np.dtype[Any] | None = None) -> Array:
    """Softmax over the last axis, in float32 or `precision`; a row with nothing allowed is zeros, never NaN."""
    x = scores.astype(precision or wide(scores.dtype))
    if allowed is not None:
        x = jnp.where(allowed, x, -jnp.inf)
    peak = jnp.max(x, axis=-1, keepdims=True)
    e = jnp.exp(x - jnp.where(jnp.isneginf(peak), jnp.zeros((), x.dtype), peak))
    total = jnp.sum(e, axis=-1, keepdims=True)
    return (e / jnp.where(total == 0, jnp.ones((), x.dtype), total)).astype(scores.dtype)


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
    if past_key is not None:
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
            bias = attn_mask.astype(q.dtype)

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
    shown = scores
    if softcap > 0:
        scores = (softcap * jnp.tanh(scores / softcap)).astype(q.dtype)
        shown = scores  # ONNX's reference shows the capped scores in mode 0 too
    if bias is not None:
        scores = scores + bias
        # Whatever the scores are (even NaN), what the bias hides is hidden.
        visible = ~jnp.isneginf(bias)
        allowed = visible if allowed is None else allowed & visible
    if qk_matmul_output_mode == _BIASED and n_outputs > 3:
        shown = scores if allowed is None else jnp.where(allowed, scores, -jnp.inf)
    precision = None if softmax_precision is None else numpy_type(softmax_precision)
    p = masked_softmax(scores, allowed, precision)
    if qk_matmul_output_mode == _PROBABILITIES:
        shown = p
    y = grouped_values(p, v)
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
