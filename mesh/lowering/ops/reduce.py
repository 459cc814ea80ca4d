"""Reductions, arg-reductions and cumulative ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from mesh.lowering.op_helpers import Array, array_namespace, axes_of, int64, is_float, positive_axis, wide
from mesh.lowering.registry import register

_Kernel = Callable[[Any, Array, Any, bool], Array]  # (xp, data, axes, keepdims)


def _sum(xp: Any, x: Array, axes: Any, keep: bool) -> Array:
    return xp.sum(x, axis=axes, keepdims=keep, dtype=wide(x.dtype)).astype(x.dtype)


def _mean(xp: Any, x: Array, axes: Any, keep: bool) -> Array:
    if is_float(x.dtype):
        return xp.mean(x, axis=axes, keepdims=keep, dtype=wide(x.dtype)).astype(x.dtype)
    return (xp.sum(x, axis=axes, keepdims=keep, dtype=x.dtype) // np.prod([x.shape[a] for a in axes or ()], dtype=x.dtype)).astype(x.dtype)


def _prod(xp: Any, x: Array, axes: Any, keep: bool) -> Array:
    return xp.prod(x, axis=axes, keepdims=keep, dtype=wide(x.dtype)).astype(x.dtype)


def _extreme(least: bool) -> _Kernel:
    """Max or min; of nothing it is the type's infinity, or its last integer."""

    def kernel(xp: Any, x: Array, axes: Any, keep: bool) -> Array:
        if x.dtype == bool:
            return (xp.all if least else xp.any)(x, axis=axes, keepdims=keep)
        if is_float(x.dtype):
            initial: Any = np.asarray(np.inf if least else -np.inf, x.dtype)
        else:
            info = ml_dtypes.iinfo(x.dtype)
            initial = info.max if least else info.min
        return (xp.min if least else xp.max)(x, axis=axes, keepdims=keep, initial=initial)

    return kernel


def _l1(xp: Any, x: Array, axes: Any, keep: bool) -> Array:
    return _sum(xp, xp.abs(x), axes, keep)


def _sum_square(xp: Any, x: Array, axes: Any, keep: bool) -> Array:
    wider = x.astype(wide(x.dtype))
    return _sum(xp, wider * wider, axes, keep).astype(x.dtype)


def _l2(xp: Any, x: Array, axes: Any, keep: bool) -> Array:
    wider = x.astype(wide(x.dtype) if is_float(x.dtype) else np.float32)
    return xp.sqrt(_sum_square(xp, wider, axes, keep)).astype(x.dtype)


def _log_sum(xp: Any, x: Array, axes: Any, keep: bool) -> Array:
    return xp.log(_sum(xp, x.astype(wide(x.dtype)), axes, keep)).astype(x.dtype)


def _log_sum_exp(xp: Any, x: Array, axes: Any, keep: bool) -> Array:
    wider = x.astype(wide(x.dtype))
    peak = _extreme(False)(xp, wider, axes, True)
    peak = xp.where(xp.isfinite(peak), peak, xp.zeros_like(peak))
    result = xp.log(_sum(xp, xp.exp(wider - peak), axes, True)) + peak
    if not keep:
        result = xp.squeeze(result, axis=axes) if axes is not None else result.reshape(())
    return result.astype(x.dtype)


_KERNELS: dict[str, tuple[int, _Kernel]] = {  # opset from which `axes` is an input
    "ReduceL1": (18, _l1),
    "ReduceL2": (18, _l2),
    "ReduceLogSum": (18, _log_sum),
    "ReduceLogSumExp": (18, _log_sum_exp),
    "ReduceMax": (18, _extreme(False)),
    "ReduceMean": (18, _mean),
    "ReduceMin": (18, _extreme(True)),
    "ReduceProd": (18, _prod),
    "ReduceSum": (13, _sum),
    "ReduceSumSquare": (18, _sum_square),
}


def _define(op_type: str, axes_input_since: int, kernel: _Kernel) -> None:
    def reduce(data: Array, axes: Array | None, keepdims: int, noop: bool) -> Array:
        chosen = axes_of(axes, data.ndim) if axes is not None and np.size(axes) else () if noop else tuple(range(data.ndim))
        return kernel(array_namespace(data), data, chosen, bool(keepdims))

    @register(op_type, since=axes_input_since, numpy=True, static=(1,))
    def with_input(data: Array, axes: Array | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Array:
        return reduce(data, axes, keepdims, bool(noop_with_empty_axes))

    @register(op_type, numpy=True)
    def with_attribute(data: Array, *, axes: Any = None, keepdims: int = 1) -> Array:
        return reduce(data, axes, keepdims, False)


for _name, (_since, _kernel) in _KERNELS.items():
    _define(_name, _since, _kernel)


def _arg(data: Array, axis: int, keepdims: int, last: int, least: bool) -> Array:
    xp = array_namespace(data)
    axis = positive_axis(axis, data.ndim)
    find = xp.argmin if least else xp.argmax
    if last:
        index = data.shape[axis] - 1 - find(xp.flip(data, axis), axis=axis, keepdims=bool(keepdims))
    else:
        index = find(data, axis=axis, keepdims=bool(keepdims))
    return index.astype(int64(xp))


@register(numpy=True)
def ArgMax(data: Array, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Array:
    return _arg(data, axis, keepdims, select_last_index, least=False)


@register(numpy=True)
def ArgMin(data: Array, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Array:
    return _arg(data, axis, keepdims, select_last_index, least=True)


def _cumulative(name: str, neutral: int, x: Array, axis: Array, exclusive: int, reverse: int) -> Array:
    xp = array_namespace(x)
    along = axes_of(axis, x.ndim)[0]
    if reverse:
        x = xp.flip(x, along)
    if exclusive:
        first = xp.full((*x.shape[:along], 1, *x.shape[along + 1 :]), neutral, x.dtype)
        x = xp.concatenate([first, x[tuple([slice(None)] * along + [slice(0, -1)])]], axis=along)
    result = getattr(xp, name)(x, axis=along, dtype=x.dtype)
    return xp.flip(result, along) if reverse else result


@register(numpy=True, static=(1,), same_shape=True)
def CumSum(x: Array, axis: Array, *, exclusive: int = 0, reverse: int = 0) -> Array:
    return _cumulative("cumsum", 0, x, axis, exclusive, reverse)


@register(numpy=True, static=(1,))
def CumProd(x: Array, axis: Array, *, exclusive: int = 0, reverse: int = 0) -> Array:
    return _cumulative("cumprod", 1, x, axis, exclusive, reverse)
