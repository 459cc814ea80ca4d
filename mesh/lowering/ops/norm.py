"""Normalisations. Statistics of 16-bit inputs are taken in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh.lowering.op_helpers import Array, positive_axis, type_of, wide
from mesh.lowering.registry import MICROSOFT, register


def _normalized_axes(x: Array, axis: int) -> tuple[int, ...]:
    return tuple(range(positive_axis(axis, x.ndim), x.ndim))


def _stash(x: Array, stash_type: int) -> Array:
    """Input in the type that statistics are taken in; never narrower than the input."""
    return x.astype(jnp.promote_types(x.dtype, type_of(stash_type, jnp)) if stash_type else wide(x.dtype))


@register()
def LayerNormalization(
    X: Array, Scale: Array, B: Array | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Array, Array, Array]:
    """Y [X's shape], Mean and InvStdDev [..., 1 ...]. Normalises over `axis` and all after it."""
    axes = _normalized_axes(X, axis)
    x = _stash(X, stash_type)
    mean = jnp.mean(x, axes, keepdims=True)
    centered = x - mean
    inverse = jax.lax.rsqrt(jnp.mean(centered * centered, axes, keepdims=True) + epsilon)
    y = (centered * inverse).astype(X.dtype) * Scale
    return y if B is None else y + B, mean, inverse


@register(same_shape=True)
def RMSNormalization(X: Array, scale: Array, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Array:
    return _rms(X, axis, epsilon, stash_type)[0] * scale


def _rms(X: Array, axis: int, epsilon: float, stash_type: int) -> tuple[Array, Array]:
    x = _stash(X, stash_type)
    inverse = jax.lax.rsqrt(jnp.mean(x * x, _normalized_axes(X, axis), keepdims=True) + epsilon)
    return (x * inverse).astype(X.dtype), inverse


def _simplified(X: Array, scale: Array, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> tuple[Array, Array]:
    """onnxruntime's RMS normalisation: Y and InvStdDev."""
    y, inverse = _rms(X, axis, epsilon, stash_type)
    return y * scale, inverse


# onnxruntime writes it into either domain.
register("SimplifiedLayerNormalization")(_simplified)
register("SimplifiedLayerNormalization", domain=MICROSOFT)(_simplified)


@register(domain=MICROSOFT)
def SkipSimplifiedLayerNormalization(
    input: Array, skip: Array, gamma: Array, bias: Array | None = None, *, epsilon: float = 1e-12
) -> tuple[Array, Array | None, Array, Array]:
    """Output, mean (never given), InvStdDev, and the sum that was normalised: input + skip + bias."""
    total = input + skip if bias is None else input + skip + bias
    y, inverse = _rms(total, -1, epsilon, 1)
    return y * gamma, None, inverse, total


@register(domain=MICROSOFT)
def SkipLayerNormalization(
    input: Array, skip: Array, gamma: Array, beta: Array | None = None, bias: Array | None = None, *, epsilon: float = 1e-12
) -> tuple[Array, Array, Array, Array]:
    """Output, mean, InvStdDev, and the sum that was normalised: input + skip + bias."""
    total = input + skip if bias is None else input + skip + bias
    y, mean, inverse = LayerNormalization(total, gamma, beta, epsilon=epsilon)
    return y, mean, inverse, total


def _over_channels(values: Array, rank: int) -> Array:
    return values.reshape([1, -1] + [1] * (rank - 2))


@register(since=14)
def BatchNormalization(
    X: Array, scale: Array, B: Array, input_mean: Array, input_var: Array,
    *, epsilon: float = 1e-5, momentum: float = 0.9, training_mode: int = 0,
) -> tuple[Array, ...]:  # fmt: skip
    """X [N, C, ...]. In training mode also the running mean and variance [C]."""
    mean, variance, running = input_mean, input_var, ()
    if training_mode:
        axes = tuple(i for i in range(X.ndim) if i != 1)
        mean, variance = jnp.mean(X, axes), jnp.var(X, axes)
        running = tuple(
            (old * momentum + new * (1 - momentum)).astype(old.dtype) for old, new in ((input_mean, mean), (input_var, variance))
        )
    rank = X.ndim
    y = (X - _over_channels(mean, rank)) * jax.lax.rsqrt(_over_channels(variance, rank) + epsilon)
    return ((y * _over_channels(scale, rank) + _over_channels(B, rank)).astype(X.dtype), *running)


@register("BatchNormalization", since=9)
def BatchNormalization_9(
    X: Array, scale: Array, B: Array, mean: Array, var: Array, *, epsilon: float = 1e-5, momentum: float = 0.9
) -> tuple[Array, ...]:
    return BatchNormalization(X, scale, B, mean, var, epsilon=epsilon)


@register(since=6)
def InstanceNormalization(input: Array, scale: Array, B: Array, *, epsilon: float = 1e-5) -> Array:
    axes = tuple(range(2, input.ndim))
    x = input.astype(wide(input.dtype))
    y = (x - jnp.mean(x, axes, keepdims=True)) * jax.lax.rsqrt(jnp.var(x, axes, keepdims=True) + epsilon)
    return y.astype(input.dtype) * _over_channels(scale, input.ndim) + _over_channels(B, input.ndim)


@register(since=21)
def GroupNormalization(X: Array, scale: Array, bias: Array, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1) -> Array:
    """X [N, C, ...], scale and bias [C]."""
    y = _by_group(X, num_groups, epsilon, stash_type).reshape(X.shape)
    return y * _over_channels(scale, X.ndim) + _over_channels(bias, X.ndim)


@register("GroupNormalization", since=18)
def GroupNormalization_18(X: Array, scale: Array, bias: Array, *, num_groups: int, epsilon: float = 1e-5) -> Array:
    """scale and bias [num_groups]."""
    y = _by_group(X, num_groups, epsilon, 1)
    return (y * _over_channels(scale, y.ndim) + _over_channels(bias, y.ndim)).reshape(X.shape)


def _by_group(X: Array, groups: int, epsilon: float, stash_type: int) -> Array:
    x = _stash(X, stash_type).reshape(X.shape[0], groups, -1)
    return ((x - jnp.mean(x, 2, keepdims=True)) * jax.lax.rsqrt(jnp.var(x, 2, keepdims=True) + epsilon)).astype(X.dtype)


@register()
def LRN(X: Array, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Array:
    """X [N, C, ...]: each channel divided by the energy of `size` channels around it."""
    before, after = (size - 1) // 2, size // 2
    window: Any = [1, size] + [1] * (X.ndim - 2)
    pads = [(0, 0), (before, after)] + [(0, 0)] * (X.ndim - 2)
    energy = jax.lax.reduce_window(X * X, np.zeros((), X.dtype), jax.lax.add, window, [1] * X.ndim, pads)
    return (X / (bias + alpha / size * energy) ** beta).astype(X.dtype)


@register()
def MeanVarianceNormalization(X: Array, *, axes: Sequence[int] = (0, 2, 3)) -> Array:
    deviation = jnp.std(X, tuple(axes), keepdims=True)
    return (X - jnp.mean(X, tuple(axes), keepdims=True)) / (deviation + np.asarray(1e-9, X.dtype))


@register()
def LpNormalization(input: Array, *, axis: int = -1, p: int = 2) -> Array:
    size = jnp.sum(jnp.abs(input), axis, keepdims=True) if p == 1 else jnp.sqrt(jnp.sum(input * input, axis, keepdims=True))
    return jnp.where(size == 0, jnp.zeros((), input.dtype), input / size)
