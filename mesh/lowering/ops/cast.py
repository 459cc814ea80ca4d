"""Conversions between types, the 8- and 4-bit floating-point ones with ONNX's saturation included."""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np

from mesh.lowering.op_helpers import Array, array_namespace, is_float, type_of
from mesh.lowering.registry import register

_FLOAT8 = {
    np.dtype(kind) for kind in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz, ml_dtypes.float8_e5m2, ml_dtypes.float8_e5m2fnuz)
}
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_E8M0 = np.dtype(ml_dtypes.float8_e8m0fnu)
_SMALL_INTEGERS = {
    np.dtype(kind): bits for kind, bits in ((ml_dtypes.int4, 4), (ml_dtypes.uint4, 4), (ml_dtypes.int2, 2), (ml_dtypes.uint2, 2))
}


def convert(x: Array, dtype: Any, *, saturate: bool = True, round_mode: str = "up") -> Array:
    """`x` as `dtype`, in numpy or JAX as `x` is."""
    xp, dtype = array_namespace(x), np.dtype(dtype)
    if xp is np and "O" in (x.dtype.kind, dtype.kind):
        return _strings(x, dtype)
    if dtype in _FLOAT8:
        return _to_float8(xp, x, dtype, saturate)
    if dtype == _E8M0:
        return _to_e8m0(xp, x, saturate, round_mode)
    if dtype in _SMALL_INTEGERS:
        # Like C, the low bits are kept; XLA and ml_dtypes differ on what lies outside, so keep them here.
        return _low_bits(xp, x.astype(xp.int32), dtype)
    if dtype.kind == "b":
        return x != 0
    if xp is not np and dtype == _BFLOAT16 and x.dtype == np.float32:
        x = jax.lax.reduce_precision(x, 8, 7)  # XLA leaves out a conversion there and back: it takes more precise numbers for as good
    return x.astype(dtype)


def _low_bits(xp: Any, x: Array, dtype: np.dtype[Any]) -> Array:
    bits = _SMALL_INTEGERS[dtype]
    low = x & ((1 << bits) - 1)
    if dtype in (np.dtype(ml_dtypes.int4), np.dtype(ml_dtypes.int2)):
        low = (low ^ (1 << (bits - 1))) - (1 << (bits - 1))
    return low.astype(xp.int8).astype(dtype)


def _to_float8(xp: Any, x: Array, dtype: np.dtype[Any], saturate: bool) -> Array:
    """Saturating: what is too large becomes the largest number, infinities too. Otherwise NaN, or infinity where the type has it."""
    x = x.astype(np.float32) if x.dtype != np.float64 else x
    if saturate:
        limits = ml_dtypes.finfo(dtype)
        largest = np.asarray(float(limits.max), x.dtype)
        x = xp.where(xp.isnan(x), x, xp.clip(x, -largest, largest))
    return x.astype(dtype)


def _to_e8m0(xp: Any, x: Array, saturate: bool, round_mode: str) -> Array:
    """To a power of two: its biased exponent, rounded as asked. Zero and the sign are lost; NaN is 255."""
    bits = x.astype(np.float32).view(np.uint32)
    exponent = ((bits >> np.uint32(23)) & np.uint32(0xFF)).astype(np.int32)
    mantissa = (bits & np.uint32(0x7FFFFF)).astype(np.int32)
    if round_mode == "up":
        more = mantissa > 0
    elif round_mode == "nearest":
        more = mantissa >= 0x400000
    else:
        more = xp.zeros_like(mantissa, dtype=bool)
    special = exponent == 255
    rounded = exponent + more.astype(np.int32)
    rounded = xp.where(rounded > 254, 254 if saturate else 255, rounded)
    return xp.where(special, xp.where((mantissa == 0) & saturate, 254, 255), rounded).astype(np.uint8).view(_E8M0)


def _strings(x: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    if dtype.kind == "O":
        return np.asarray([str(item) for item in x.ravel()], object).reshape(x.shape)
    return np.asarray([float(item) if is_float(dtype) else int(item) for item in x.ravel()]).astype(dtype).reshape(x.shape)


@register(numpy=True, since=6, same_shape=True)
def Cast(input: Array, *, to: int, saturate: int = 1, round_mode: str = "up") -> Array:
    return convert(input, type_of(to, array_namespace(input)), saturate=bool(saturate), round_mode=round_mode)


@register(numpy=True, type_only=(1,), same_shape=True)
def CastLike(input: Array, target_type: Array, *, saturate: int = 1, round_mode: str = "up") -> Array:
    return convert(input, target_type.dtype, saturate=bool(saturate), round_mode=round_mode)
