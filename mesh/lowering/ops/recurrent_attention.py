"""Linear attention and the stateful convolution beside it (opset 27): recurrences over tokens with a state carried between calls."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mesh.errors import UnsupportedModel
from mesh.lowering.op_helpers import Array, wide
from mesh.lowering.ops.attention import join_heads, split_heads
from mesh.lowering.registry import register


@register(since=27, allowed={"update_rule": ("linear", "gated", "delta", "gated_delta")})
def LinearAttention(
    query: Array, key: Array, value: Array, past_state: Array | None = None, decay: Array | None = None, beta: Array | None = None,
    *, q_num_heads: int, kv_num_heads: int, chunk_size: int = 64, scale: float = 0.0, update_rule: str = "gated_delta",
) -> tuple[Array, Array]:  # fmt: skip
    """Output [B, T, Hq * Dv] and present_state [B, Hkv, Dk, Dv], computed in float32.

    query [B, T, Hq * Dk], key [B, T, Hkv * Dk], value [B, T, Hkv * Dv]; decay [B, T, Hkv] or [B, T, Hkv * Dk], in logarithms;
    beta [B, T, Hkv] or [B, T, 1]. One step of lax.scan a token: `chunk_size` is a hint that is not needed.
    """
    gated, delta = update_rule in ("gated", "gated_delta"), update_rule in ("delta", "gated_delta")
    if gated != (decay is not None) or delta != (beta is not None):
        raise UnsupportedModel(
            f"update rule {update_rule} {'needs' if gated else 'forbids'} decay and {'needs' if delta else 'forbids'} beta"
        )
    kind = wide(query.dtype)
    b, t = query.shape[:2]
    q, k, v = (
        jnp.moveaxis(split_heads(x, heads).astype(kind), 2, 0)  # [T, B, H, D]
        for x, heads in ((query, q_num_heads), (key, kv_num_heads), (value, kv_num_heads))
    )
    q = q.reshape(t, b, kv_num_heads, q_num_heads // kv_num_heads, -1)  # [T, B, Hkv, G, Dk]
    state = jnp.zeros((b, kv_num_heads, k.shape[-1], v.shape[-1]), kind) if past_state is None else past_state.astype(kind)
    factor = scale or 1 / math.sqrt(k.shape[-1])
    steps = {"q": q, "k": k, "v": v}
    if decay is not None:
        steps["decay"] = jnp.exp(jnp.moveaxis(decay.astype(kind).reshape(b, t, kv_num_heads, -1), 1, 0))  # [T, B, Hkv, Dk or 1]
    if beta is not None:
        steps["beta"] = jnp.moveaxis(beta.astype(kind), 1, 0)[..., None]  # [T, B, Hkv or 1, 1]

    def step(state: Array, now: dict[str, Array]) -> tuple[Array, Array]:
        if "decay" in now:
            state = state * now["decay"][..., None]
        new = now["v"]  # [B, Hkv, Dv]
        if "beta" in now:
            new = now["beta"] * (new - jnp.einsum("bhkv,bhk->bhv", state, now["k"]))
        state = state + now["k"][..., None] * new[..., None, :]
        return state, jnp.einsum("bhgk,bhkv->bhgv", now["q"], state) * factor

    state, y = jax.lax.scan(step, state, steps)  # y [T, B, Hkv, G, Dv]
    y = jnp.moveaxis(y.reshape(t, b, q_num_heads, -1), 0, 2)  # [B, Hq, T, Dv]
    return join_heads(y).astype(query.dtype), state.astype(query.dtype if past_state is None else past_state.dtype)


@register(since=27, allowed={"activation": ("none", "silu", "swish")})
def CausalConvWithState(
    input: Array, weight: Array, bias: Array | None = None, past_state: Array | None = None, *, activation: str = "none"
) -> tuple[Array, Array]:
    """Depthwise causal convolution: input [B, C, T], weight [C, 1, W], bias [C], states [B, C, W - 1]."""
    width = weight.shape[2]
    if past_state is None:
        past_state = jnp.zeros((*input.shape[:2], width - 1), input.dtype)
    padded = jnp.concatenate([past_state, input], axis=2)  # [B, C, W - 1 + T]
    length = input.shape[2]
    kind = wide(input.dtype)
    y = sum(padded[:, :, i : i + length].astype(kind) * weight[:, 0, i, None].astype(kind) for i in range(width))
    if bias is not None:
        y = y + bias[:, None].astype(kind)
    if activation != "none":
        y = jax.nn.silu(y)
    return jnp.asarray(y).astype(input.dtype), padded[:, :, padded.shape[2] - (width - 1) :]
