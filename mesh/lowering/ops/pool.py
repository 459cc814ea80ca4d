"""Pooling over sliding windows, and over everything. X [N, C, ...spatial]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh.lowering.op_helpers import Array, int64, is_float
from mesh.lowering.ops.conv import AUTO_PAD, window_pads
from mesh.lowering.registry import register


class _Windows:
    """The geometry of one pooling: pads, and how far past the end the last window of ceil mode reaches."""

    def __init__(
        self, x: Array, kernel: Sequence[int], strides: Sequence[int] | None, dilations: Sequence[int] | None, auto_pad: str,
        pads: Sequence[int] | None, ceil_mode: int,
    ) -> None:  # fmt: skip
        rank = len(kernel)
        self.kernel = tuple(kernel)
        self.strides = tuple(strides or [1] * rank)
        self.dilations = tuple(dilations or [1] * rank)
        self.pads = window_pads(auto_pad, x.shape[2:], self.kernel, self.strides, self.dilations, pads)
        self.reach = []  # pads, with what ceil mode adds after
        self.sizes = []
        for size, window, stride, dilation, (before, after) in zip(
            x.shape[2:], self.kernel, self.strides, self.dilations, self.pads, strict=True
        ):
            span = (window - 1) * dilation + 1
            room = size + before + after - span
            count = (-(-room // stride) if ceil_mode else room // stride) + 1
            if ceil_mode and (count - 1) * stride >= size + before:  # a window may not begin in the padding after the end
                count -= 1
            self.sizes.append(count)
            self.reach.append((before, max((count - 1) * stride + span - size - before, 0)))

    def reduce(self, x: Array, initial: Any, operation: Any) -> Array:
        y = jax.lax.reduce_window(
            x,
            np.asarray(initial, x.dtype),
            operation,
            (1, 1, *self.kernel),
            (1, 1, *self.strides),
            [(0, 0), (0, 0), *self.reach],
            window_dilation=(1, 1, *self.dilations),
        )
        return y[(slice(None), slice(None), *(slice(0, size) for size in self.sizes))]


@register(allowed={"auto_pad": AUTO_PAD})
def AveragePool(
    X: Array, *, kernel_shape: Sequence[int], auto_pad: str = "NOTSET", ceil_mode: int = 0, count_include_pad: int = 0,
    dilations: Sequence[int] | None = None, pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
) -> Array:  # fmt: skip
    """The mean of what a window covers: the padding too with `count_include_pad`, but never what lies beyond it."""
    windows = _Windows(X, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode)
    total = windows.reduce(X, 0, jax.lax.add)
    counted = np.ones(X.shape[2:], X.dtype)
    if count_include_pad:
        counted = np.pad(counted, windows.pads, constant_values=1)
    beyond = [(0, 0), (0, 0)]
    beyond += [
        (0, after - pad[1]) if count_include_pad else (before, after)
        for (before, after), pad in zip(windows.reach, windows.pads, strict=True)
    ]
    # ceil mode may leave part of the padding after the end unused
    room = [(a, max(b, 0)) for a, b in beyond]
    count = jax.lax.reduce_window(
        jnp.asarray(counted)[None, None],
        np.asarray(0, X.dtype),
        jax.lax.add,
        (1, 1, *windows.kernel),
        (1, 1, *windows.strides),
        room,
        window_dilation=(1, 1, *windows.dilations),
    )
    count = count[(slice(None), slice(None), *(slice(0, size) for size in windows.sizes))]
    return (total / count).astype(X.dtype)


@register(allowed={"auto_pad": AUTO_PAD})
def MaxPool(
    X: Array, *, kernel_shape: Sequence[int], auto_pad: str = "NOTSET", ceil_mode: int = 0, dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None, storage_order: int = 0, strides: Sequence[int] | None = None, n_outputs: int = 1,
) -> tuple[Array, ...]:  # fmt: skip
    """Y, and where each maximum was in the flattened X (`storage_order` 1: with the last two axes exchanged)."""
    windows = _Windows(X, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode)
    least: Any = -np.inf if is_float(X.dtype) else np.iinfo(X.dtype).min
    y = windows.reduce(X, least, jax.lax.max)
    if n_outputs < 2:
        return (y,)
    kind = int64(jnp)
    order = np.arange(int(np.prod(X.shape)), dtype=kind).reshape(X.shape)
    if storage_order:
        shape = (*X.shape[:2], *X.shape[2:][::-1])
        order = np.arange(order.size, dtype=kind).reshape(shape).transpose(0, 1, *range(X.ndim - 1, 1, -1))

    def later(one: tuple[Array, Array], other: tuple[Array, Array]) -> tuple[Array, Array]:
        keep = (one[0] > other[0]) | ((one[0] == other[0]) & (one[1] < other[1]))
        return jnp.where(keep, one[0], other[0]), jnp.where(keep, one[1], other[1])

    _, where = jax.lax.reduce_window(
        (X, jnp.asarray(order)),
        (np.asarray(least, X.dtype), np.asarray(np.iinfo(kind).max, kind)),
        later,
        (1, 1, *windows.kernel),
        (1, 1, *windows.strides),
        [(0, 0), (0, 0), *windows.reach],
        window_dilation=(1, 1, *windows.dilations),
    )
    return y, where[(slice(None), slice(None), *(slice(0, size) for size in windows.sizes))]


@register(allowed={"auto_pad": AUTO_PAD})
def LpPool(
    X: Array, *, kernel_shape: Sequence[int], auto_pad: str = "NOTSET", ceil_mode: int = 0, dilations: Sequence[int] | None = None,
    p: int = 2, pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
) -> Array:  # fmt: skip
    windows = _Windows(X, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode)
    return (windows.reduce(jnp.abs(X) ** p, 0, jax.lax.add) ** (1 / p)).astype(X.dtype)


@register()
def GlobalAveragePool(X: Array) -> Array:
    return jnp.mean(X, tuple(range(2, X.ndim)), keepdims=True)


@register()
def GlobalMaxPool(X: Array) -> Array:
    return jnp.max(X, tuple(range(2, X.ndim)), keepdims=True)


@register()
def GlobalLpPool(X: Array, *, p: int = 2) -> Array:
    return (jnp.sum(jnp.abs(X) ** p, tuple(range(2, X.ndim)), keepdims=True) ** (1 / p)).astype(X.dtype)


@register(static=(2,))
def MaxUnpool(
    X: Array, I: Array, output_shape: Array | None = None,  # noqa: E741
    *, kernel_shape: Sequence[int], pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
) -> Array:  # fmt: skip
    """Puts each value back where MaxPool found it; the places are those of the output without `output_shape`."""
    rank = len(kernel_shape)
    strides, pads = strides or [1] * rank, pads or [0] * 2 * rank
    inferred = [
        (size - 1) * stride + window - pads[i] - pads[i + rank]
        for i, (size, stride, window) in enumerate(zip(X.shape[2:], strides, kernel_shape, strict=True))
    ]
    small = (*X.shape[:2], *inferred)
    flat = jnp.zeros(int(np.prod(small)), X.dtype).at[I.reshape(-1)].set(X.reshape(-1)).reshape(small)
    if output_shape is None:
        return flat
    return jnp.pad(flat, [(0, int(size) - have) for size, have in zip(output_shape, small, strict=True)])
