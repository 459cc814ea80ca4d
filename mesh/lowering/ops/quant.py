"""Linear quantization: per tensor, per axis, and in blocks along an axis."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mesh.lowering.op_helpers import Array, is_float, positive_axis, type_of, wide
from mesh.lowering.ops.cast import convert
from mesh.lowering.registry import register

_LIMITS = {
    np.dtype(ml_dtypes.int4): (-8, 7),
    np.dtype(ml_dtypes.uint4): (0, 15),
    np.dtype(ml_dtypes.int2): (-2, 1),
    np.dtype(ml_dtypes.uint2): (0, 3),
}


def integer_limits(dtype: Any) -> tuple[int, int]:
    dtype = np.dtype(dtype)
    if dtype in _LIMITS:
        return _LIMITS[dtype]
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def _spread(parameter: Array, x: Array, axis: int, block_size: int) -> Array:
    """A scale or zero point so that it broadcasts against `x`: scalar, [size of the axis], or one for each block along it."""
    if parameter.size == 1 and parameter.ndim <= 1:
        return parameter.reshape(())
    axis = positive_axis(axis, x.ndim)
    if parameter.ndim == 1 and not block_size:
        return parameter.reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    block = block_size or -(-x.shape[axis] // parameter.shape[axis])
    count = parameter.shape[axis]
    expanded = jnp.broadcast_to(jnp.expand_dims(parameter, axis + 1), (*parameter.shape[: axis + 1], block, *parameter.shape[axis + 1 :]))
    whole = expanded.reshape(*parameter.shape[:axis], count * block, *parameter.shape[axis + 1 :])
    return whole[(slice(None),) * axis + (slice(0, x.shape[axis]),)]


def divided(x: Array, scale: Array) -> Array:
    """x / scale, rounded once. XLA would multiply by the reciprocal of a broadcast divisor, and move ties."""
    whole: Array = jax.lax.optimization_barrier(jnp.broadcast_to(scale, x.shape))
    return x / whole


@register()
def DequantizeLinear(
    x: Array, x_scale: Array, x_zero_point: Array | None = None, *, axis: int = 1, block_size: int = 0, output_dtype: int = 0
) -> Array:
    """(x - zero point) * scale, in the scale's type or `output_dtype`. Packed 4-bit weights arrive here as int8 (see Lowered)."""
    kind = type_of(output_dtype, jnp) if output_dtype else x_scale.dtype
    work = wide(x_scale.dtype) if x_scale.dtype != ml_dtypes.float8_e8m0fnu else np.dtype(np.float32)
    values = x.astype(work)
    if x.dtype == jnp.int32 and x_zero_point is not None:
        values = (x - _spread(x_zero_point, x, axis, block_size)).astype(work)
    elif x_zero_point is not None:
        values = values - _spread(x_zero_point.astype(work), x, axis, block_size)
    return (values * _spread(x_scale.astype(work), x, axis, block_size)).astype(kind)


@register()
def QuantizeLinear(
    x: Array, y_scale: Array, y_zero_point: Array | None = None,
    *, axis: int = 1, block_size: int = 0, output_dtype: int = 0, precision: int = 0, saturate: int = 1,
) -> Array:  # fmt: skip
    """Rounded half to even, then saturated to the type of the zero point, or `output_dtype`, or uint8."""
    kind = np.dtype(y_zero_point.dtype) if y_zero_point is not None else type_of(output_dtype or 2, jnp)
    work = type_of(precision, jnp) if precision else wide(y_scale.dtype if y_scale.dtype != ml_dtypes.float8_e8m0fnu else np.float32)
    scaled = divided(x.astype(work), _spread(y_scale.astype(work), x, axis, block_size))
    zero = None if y_zero_point is None else _spread(y_zero_point.astype(work), x, axis, block_size)
    if is_float(kind):
        return convert(scaled if zero is None else scaled + zero, kind, saturate=bool(saturate))
    rounded = jnp.rint(scaled) if zero is None else jnp.rint(scaled) + zero
    low, high = integer_limits(kind)
    return jnp.clip(rounded, low, high).astype(np.int32).astype(kind)


@register()
def DynamicQuantizeLinear(x: Array) -> tuple[Array, Array, Array]:
    """uint8, its scale and zero point, from the range of x with zero included."""
    low, high = jnp.minimum(jnp.min(x), 0), jnp.maximum(jnp.max(x), 0)
    scale = jnp.where(high == low, jnp.ones((), x.dtype), divided(high - low, np.asarray(255, x.dtype)))
    zero = jnp.clip(jnp.rint(-low / scale), 0, 255).astype(np.uint8)
    y = jnp.clip(jnp.rint(divided(x, scale)) + zero.astype(x.dtype), 0, 255).astype(np.uint8)
    return y, scale.astype(x.dtype), zero


@register()
def QLinearMatMul(
    a: Array, a_scale: Array, a_zero_point: Array, b: Array, b_scale: Array, b_zero_point: Array, y_scale: Array, y_zero_point: Array
) -> Array:
    """Scales and zero points: scalar, [M] for a and y, [N] for b."""

    def rows(parameter: Array) -> Array:
        return parameter[:, None] if parameter.ndim == 1 and parameter.size > 1 else parameter

    left = a.astype(np.int32) - rows(a_zero_point.astype(np.int32))
    right = b.astype(np.int32) - b_zero_point.astype(np.int32)
    product = jnp.matmul(left, right).astype(np.float32)
    scale = rows(a_scale.astype(np.float32)) * b_scale.astype(np.float32) / rows(y_scale.astype(np.float32))
    low, high = integer_limits(y_zero_point.dtype)
    rounded = jnp.rint(product * scale) + rows(y_zero_point.astype(np.float32))
    return jnp.clip(rounded, low, high).astype(np.int32).astype(y_zero_point.dtype)
