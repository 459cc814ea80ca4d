"""Activation functions and the softmax family."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from mesh.lowering.op_helpers import Array, positive_axis, wide
from mesh.lowering.registry import MICROSOFT, register


@register()
def Celu(X: Array, *, alpha: float = 1.0) -> Array:
    return jnp.maximum(X, 0) + jnp.minimum(0, alpha * jnp.expm1(X / alpha)).astype(X.dtype)


@register(same_shape=True)
def Elu(X: Array, *, alpha: float = 1.0) -> Array:
    return jnp.where(X < 0, alpha * jnp.expm1(X), X)


@register(allowed={"approximate": ("none", "tanh")}, same_shape=True)
def Gelu(X: Array, *, approximate: str = "none") -> Array:
    return jax.nn.gelu(X, approximate=approximate == "tanh")


@register("Gelu", domain=MICROSOFT)
def Gelu_microsoft(X: Array) -> Array:
    return jax.nn.gelu(X, approximate=False)


@register(domain=MICROSOFT)
def FastGelu(X: Array, bias: Array | None = None) -> Array:
    return jax.nn.gelu(X if bias is None else X + bias, approximate=True)


@register(domain=MICROSOFT)
def BiasGelu(A: Array, B: Array) -> Array:
    return jax.nn.gelu(A + B, approximate=False)


@register(domain=MICROSOFT)
def QuickGelu(X: Array, *, alpha: float = 1.702) -> Array:
    return X * jax.nn.sigmoid(alpha * X)


@register()
def HardSigmoid(X: Array, *, alpha: float = 0.2, beta: float = 0.5) -> Array:
    return jnp.clip(alpha * X + beta, 0, 1)


@register(same_shape=True)
def HardSwish(X: Array) -> Array:
    return X * HardSigmoid(X, alpha=1 / 6, beta=0.5)


@register(since=13)
def Hardmax(input: Array, *, axis: int = -1) -> Array:
    first = jnp.argmax(input, axis=axis)
    return jax.nn.one_hot(first, input.shape[axis], axis=axis, dtype=input.dtype)


@register(same_shape=True)
def LeakyRelu(X: Array, *, alpha: float = 0.01) -> Array:
    return jnp.where(X < 0, alpha * X, X)


@register(since=13, same_shape=True)
def LogSoftmax(input: Array, *, axis: int = -1) -> Array:
    return jax.nn.log_softmax(input.astype(wide(input.dtype)), axis=axis).astype(input.dtype)


@register()
def Mish(X: Array) -> Array:
    return X * jnp.tanh(jax.nn.softplus(X))


@register(since=7)
def PRelu(X: Array, slope: Array) -> Array:
    return jnp.where(X < 0, slope * X, X)


@register(same_shape=True)
def Relu(X: Array) -> Array:
    return jnp.maximum(X, jnp.zeros((), X.dtype))


@register()
def Selu(X: Array, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Array:
    return gamma * jnp.where(X > 0, X, alpha * jnp.expm1(X))


@register()
def Shrink(input: Array, *, bias: float = 0.0, lambd: float = 0.5) -> Array:
    shrunk = jnp.where(input < -lambd, input + bias, jnp.where(input > lambd, input - bias, 0))
    return shrunk.astype(input.dtype)


@register(same_shape=True)
def Sigmoid(X: Array) -> Array:
    return jax.nn.sigmoid(X)


@register(since=13, same_shape=True)
def Softmax(input: Array, *, axis: int = -1) -> Array:
    """Computed in float32 for 16-bit types. A row of -inf alone is NaN, as ONNX has it."""
    return jax.nn.softmax(input.astype(wide(input.dtype)), axis=axis).astype(input.dtype)


def _flattened(function, input: Array, axis: int) -> Array:  # type: ignore[no-untyped-def]
    """Before opset 13 the axes from `axis` on are one."""
    lead = math.prod(input.shape[: positive_axis(axis, input.ndim)])
    return function(input.reshape(lead, -1), axis=1).reshape(input.shape)


@register("Softmax", same_shape=True)
def Softmax_1(input: Array, *, axis: int = 1) -> Array:
    return _flattened(Softmax, input, axis)


@register("LogSoftmax", same_shape=True)
def LogSoftmax_1(input: Array, *, axis: int = 1) -> Array:
    return _flattened(LogSoftmax, input, axis)


@register("Hardmax")
def Hardmax_1(input: Array, *, axis: int = 1) -> Array:
    return _flattened(Hardmax, input, axis)


@register(same_shape=True)
def Softplus(X: Array) -> Array:
    return jax.nn.softplus(X)


@register()
def Softsign(input: Array) -> Array:
    return jax.nn.soft_sign(input)


@register(same_shape=True)
def Swish(X: Array, *, alpha: float = 1.0) -> Array:
    return X * jax.nn.sigmoid(alpha * X)


@register()
def ThresholdedRelu(X: Array, *, alpha: float = 1.0) -> Array:
    return jnp.where(alpha < X, X, jnp.zeros((), X.dtype))
