"""Element-wise arithmetic and comparison, with numpy's broadcasting. Each takes numpy and traced values alike."""

from __future__ import annotations

import jax
import numpy as np

from mesh.lowering.op_helpers import Array, array_namespace, is_float
from mesh.lowering.registry import register
from mesh.lowering.static import is_traced


@register(numpy=True, same_shape=True)
def Abs(X: Array) -> Array:
    return array_namespace(X).abs(X)


@register(numpy=True)
def Acos(input: Array) -> Array:
    return array_namespace(input).arccos(input)


@register(numpy=True)
def Acosh(input: Array) -> Array:
    return array_namespace(input).arccosh(input)


@register(numpy=True, since=7, broadcasts=True)
def Add(A: Array, B: Array) -> Array:
    return array_namespace(A, B).add(A, B)


@register(numpy=True, since=7, broadcasts=True, to_bool=True)
def And(A: Array, B: Array) -> Array:
    return array_namespace(A, B).logical_and(A, B)


@register(numpy=True)
def Asin(input: Array) -> Array:
    return array_namespace(input).arcsin(input)


@register(numpy=True)
def Asinh(input: Array) -> Array:
    return array_namespace(input).arcsinh(input)


@register(numpy=True)
def Atan(input: Array) -> Array:
    return array_namespace(input).arctan(input)


@register(numpy=True)
def Atanh(input: Array) -> Array:
    return array_namespace(input).arctanh(input)


@register(numpy=True, allowed={"direction": ("LEFT", "RIGHT")})
def BitShift(X: Array, Y: Array, *, direction: str) -> Array:
    """A shift by a negative amount, or by the width or more, leaves the sign alone: 0 or (to the right, of a negative number) -1."""
    xp = array_namespace(X, Y)
    width = X.dtype.itemsize * 8
    outside = (Y < 0) | (width - 1 < Y)
    amount = xp.where(outside, 0, Y).astype(X.dtype)
    if direction == "LEFT":
        return xp.where(outside, 0, xp.left_shift(X, amount)).astype(X.dtype)
    return xp.where(outside, xp.where(X < 0, -1, 0) if X.dtype.kind == "i" else 0, xp.right_shift(X, amount)).astype(X.dtype)


@register(numpy=True)
def BitwiseAnd(A: Array, B: Array) -> Array:
    return array_namespace(A, B).bitwise_and(A, B)


@register(numpy=True)
def BitwiseNot(X: Array) -> Array:
    return array_namespace(X).bitwise_not(X)


@register(numpy=True)
def BitwiseOr(A: Array, B: Array) -> Array:
    return array_namespace(A, B).bitwise_or(A, B)


@register(numpy=True)
def BitwiseXor(A: Array, B: Array) -> Array:
    return array_namespace(A, B).bitwise_xor(A, B)


@register(numpy=True, same_shape=True)
def Ceil(X: Array) -> Array:
    return array_namespace(X).ceil(X)


@register(numpy=True, since=11, same_shape=True)
def Clip(input: Array, min: Array | None = None, max: Array | None = None) -> Array:
    xp = array_namespace(input, min, max)
    if min is not None:
        input = xp.maximum(input, min)
    return input if max is None else xp.minimum(input, max)


@register("Clip", numpy=True, since=6, same_shape=True)
def Clip_6(input: Array, *, min: float | None = None, max: float | None = None) -> Array:
    return Clip(input, None if min is None else np.asarray(min, input.dtype), None if max is None else np.asarray(max, input.dtype))


@register(numpy=True, same_shape=True)
def Cos(input: Array) -> Array:
    return array_namespace(input).cos(input)


@register(numpy=True)
def Cosh(input: Array) -> Array:
    return array_namespace(input).cosh(input)


@register(numpy=True, since=7, broadcasts=True)
def Div(A: Array, B: Array) -> Array:
    """Integers are divided as C does: towards zero."""
    xp = array_namespace(A, B)
    if is_float(A.dtype):
        return xp.divide(A, B)
    if xp is not np:
        return jax.lax.div(*xp.broadcast_arrays(A, B))
    if A.dtype.kind == "u":
        return np.floor_divide(A, B)
    quotient = np.floor_divide(A, B)
    return (quotient + ((np.remainder(A, B) != 0) & ((A < 0) != (B < 0)))).astype(A.dtype)


@register(numpy=True, since=7, broadcasts=True, to_bool=True)
def Equal(A: Array, B: Array) -> Array:
    return array_namespace(A, B).equal(A, B)


@register(same_shape=True)
def Erf(input: Array) -> Array:
    return jax.lax.erf(input)


@register(numpy=True, same_shape=True)
def Exp(input: Array) -> Array:
    return array_namespace(input).exp(input)


@register(numpy=True, same_shape=True)
def Floor(X: Array) -> Array:
    return array_namespace(X).floor(X)


@register(numpy=True, since=7, broadcasts=True, to_bool=True)
def Greater(A: Array, B: Array) -> Array:
    return array_namespace(A, B).greater(A, B)


@register(numpy=True, broadcasts=True, to_bool=True)
def GreaterOrEqual(A: Array, B: Array) -> Array:
    return array_namespace(A, B).greater_equal(A, B)


@register(numpy=True)
def IsInf(X: Array, *, detect_negative: int = 1, detect_positive: int = 1) -> Array:
    xp = array_namespace(X)
    infinite = xp.isinf(X)
    if not detect_negative:
        infinite = infinite & (X > 0)
    return infinite if detect_positive else infinite & (X < 0)


@register(numpy=True, same_shape=True, to_bool=True)
def IsNaN(X: Array) -> Array:
    return array_namespace(X).isnan(X)


@register(numpy=True, since=7, broadcasts=True, to_bool=True)
def Less(A: Array, B: Array) -> Array:
    return array_namespace(A, B).less(A, B)


@register(numpy=True, broadcasts=True, to_bool=True)
def LessOrEqual(A: Array, B: Array) -> Array:
    return array_namespace(A, B).less_equal(A, B)


@register(numpy=True, same_shape=True)
def Log(input: Array) -> Array:
    return array_namespace(input).log(input)


@register(numpy=True, since=8, broadcasts=True)
def Max(*data_0: Array) -> Array:
    xp, result = array_namespace(*data_0), data_0[0]
    for item in data_0[1:]:
        result = xp.maximum(result, item)
    return result


@register(numpy=True, since=8)
def Mean(*data_0: Array) -> Array:
    return Sum(*data_0) / np.asarray(len(data_0), data_0[0].dtype)


@register(numpy=True, since=8, broadcasts=True)
def Min(*data_0: Array) -> Array:
    xp, result = array_namespace(*data_0), data_0[0]
    for item in data_0[1:]:
        result = xp.minimum(result, item)
    return result


@register(numpy=True, broadcasts=True)
def Mod(A: Array, B: Array, *, fmod: int = 0) -> Array:
    xp = array_namespace(A, B)
    return xp.fmod(A, B) if fmod else xp.remainder(A, B)


@register(numpy=True, since=7, broadcasts=True)
def Mul(A: Array, B: Array) -> Array:
    return array_namespace(A, B).multiply(A, B)


@register(numpy=True, same_shape=True)
def Neg(X: Array) -> Array:
    return array_namespace(X).negative(X)


@register(numpy=True, same_shape=True, to_bool=True)
def Not(X: Array) -> Array:
    return array_namespace(X).logical_not(X)


@register(numpy=True, since=7, broadcasts=True, to_bool=True)
def Or(A: Array, B: Array) -> Array:
    return array_namespace(A, B).logical_or(A, B)


@register(numpy=True, since=7, static_if_known=(1,), broadcasts=True)
def Pow(X: Array, Y: Array) -> Array:
    """The result has X's type, whatever Y's."""
    xp = array_namespace(X, Y)
    if xp is not np and not is_traced(Y) and Y.size == 1 and float(Y.reshape(())) in (2.0, 3.0):
        power = X * X if float(Y.reshape(())) == 2.0 else X * X * X
        return xp.broadcast_to(power, np.broadcast_shapes(X.shape, Y.shape))
    if is_float(X.dtype):
        return xp.power(X, Y.astype(X.dtype))
    if is_float(Y.dtype):
        return xp.power(X.astype(Y.dtype), Y).astype(X.dtype)
    return xp.power(X, Y).astype(X.dtype)


@register(numpy=True, same_shape=True)
def Reciprocal(X: Array) -> Array:
    return array_namespace(X).reciprocal(X)


@register(numpy=True, same_shape=True)
def Round(X: Array) -> Array:
    return array_namespace(X).rint(X)


@register(numpy=True, same_shape=True)
def Sign(input: Array) -> Array:
    return array_namespace(input).sign(input)


@register(numpy=True, same_shape=True)
def Sin(input: Array) -> Array:
    return array_namespace(input).sin(input)


@register(numpy=True)
def Sinh(input: Array) -> Array:
    return array_namespace(input).sinh(input)


@register(numpy=True, same_shape=True)
def Sqrt(X: Array) -> Array:
    return array_namespace(X).sqrt(X)


@register(numpy=True, since=7, broadcasts=True)
def Sub(A: Array, B: Array) -> Array:
    return array_namespace(A, B).subtract(A, B)


@register(numpy=True, since=8)
def Sum(*data_0: Array) -> Array:
    xp, result = array_namespace(*data_0), data_0[0]
    for item in data_0[1:]:
        result = xp.add(result, item)
    return result


@register(numpy=True)
def Tan(input: Array) -> Array:
    return array_namespace(input).tan(input)


@register(numpy=True, same_shape=True)
def Tanh(input: Array) -> Array:
    return array_namespace(input).tanh(input)


@register(numpy=True, broadcasts=True)
def Where(condition: Array, X: Array, Y: Array) -> Array:
    return array_namespace(condition, X, Y).where(condition, X, Y)


@register(numpy=True, since=7, broadcasts=True, to_bool=True)
def Xor(A: Array, B: Array) -> Array:
    return array_namespace(A, B).logical_xor(A, B)
