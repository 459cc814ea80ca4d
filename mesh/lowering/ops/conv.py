"""The convolution ops. X [N, C, ...spatial], W [M, C / group, ...kernel]; any number of spatial axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh.lowering.op_helpers import Array
from mesh.lowering.ops.quant import divided, integer_limits
from mesh.lowering.registry import register

AUTO_PAD = ("NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID")


def window_pads(
    auto_pad: str, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Sequence[int] | None
) -> list[tuple[int, int]]:
    """(before, after) of each spatial axis."""
    rank = len(sizes)
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        result = []
        for size, window, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
            total = max((-(-size // stride) - 1) * stride + (window - 1) * dilation + 1 - size, 0)
            small = total // 2
            result.append((small, total - small) if auto_pad == "SAME_UPPER" else (total - small, small))
        return result
    if auto_pad == "VALID" or pads is None:
        return [(0, 0)] * rank
    return [(pads[i], pads[i + rank]) for i in range(rank)]


@register(allowed={"auto_pad": AUTO_PAD})
def Conv(
    X: Array, W: Array, B: Array | None = None, *, auto_pad: str = "NOTSET", dilations: Sequence[int] | None = None, group: int = 1,
    kernel_shape: Sequence[int] | None = None, pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
) -> Array:  # fmt: skip
    rank = X.ndim - 2
    strides, dilations = tuple(strides or [1] * rank), tuple(dilations or [1] * rank)
    y = jax.lax.conv_general_dilated(
        X,
        W,
        window_strides=strides,
        padding=window_pads(auto_pad, X.shape[2:], W.shape[2:], strides, dilations, pads),
        rhs_dilation=dilations,
        feature_group_count=group,
    )
    return y if B is None else y + B.reshape([1, -1] + [1] * rank)


@register(allowed={"auto_pad": AUTO_PAD})
def ConvInteger(
    x: Array, w: Array, x_zero_point: Array | None = None, w_zero_point: Array | None = None, *, auto_pad: str = "NOTSET",
    dilations: Sequence[int] | None = None, group: int = 1, kernel_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
) -> Array:  # fmt: skip
    """8-bit integers to int32. w_zero_point: scalar or [M]. Padding is the zero point, that is 0 once it is subtracted."""
    x, w = x.astype(np.int32), w.astype(np.int32)
    if x_zero_point is not None:
        x = x - x_zero_point.astype(np.int32).reshape(())
    if w_zero_point is not None:
        w = w - w_zero_point.astype(np.int32).reshape([-1] + [1] * (w.ndim - 1))
    return Conv(x, w, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides)


@register(allowed={"auto_pad": AUTO_PAD})
def QLinearConv(
    x: Array, x_scale: Array, x_zero_point: Array, w: Array, w_scale: Array, w_zero_point: Array, y_scale: Array, y_zero_point: Array,
    B: Array | None = None, *, auto_pad: str = "NOTSET", dilations: Sequence[int] | None = None, group: int = 1,
    kernel_shape: Sequence[int] | None = None, pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
) -> Array:  # fmt: skip
    """B is int32 at scale x_scale * w_scale; w_scale and w_zero_point: scalar or [M]."""
    y = ConvInteger(x, w, x_zero_point, w_zero_point, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides)
    channels = [1, -1] + [1] * (x.ndim - 2)
    if B is not None:
        y = y + B.reshape(channels)
    scaled = divided(y.astype(np.float32) * (x_scale.reshape(()) * w_scale.reshape(channels)), y_scale.reshape(()))
    low, high = integer_limits(y_zero_point.dtype)
    rounded = jnp.rint(scaled) + y_zero_point.astype(np.float32).reshape(())
    return jnp.clip(rounded, low, high).astype(np.int32).astype(y_zero_point.dtype)


@register(allowed={"auto_pad": AUTO_PAD})
def ConvTranspose(
    X: Array, W: Array, B: Array | None = None, *, auto_pad: str = "NOTSET", dilations: Sequence[int] | None = None, group: int = 1,
    kernel_shape: Sequence[int] | None = None, output_padding: Sequence[int] | None = None, output_shape: Sequence[int] | None = None,
    pads: Sequence[int] | None = None, strides: Sequence[int] | None = None,
) -> Array:  # fmt: skip
    """W [C, M / group, ...kernel]. A convolution of the input spread out by the strides with the kernel turned around."""
    rank = X.ndim - 2
    strides, dilations = list(strides or [1] * rank), list(dilations or [1] * rank)
    extra = list(output_padding or [0] * rank)
    padding: list[tuple[int, int]] = []
    for i in range(rank):
        reach = dilations[i] * (W.shape[2 + i] - 1) + 1
        full = strides[i] * (X.shape[2 + i] - 1) + extra[i] + reach
        if output_shape is not None or auto_pad.startswith("SAME"):
            wanted = output_shape[i - rank] if output_shape is not None else X.shape[2 + i] * strides[i]
            total = max(full - wanted, 0)
            before = total - total // 2 if auto_pad == "SAME_LOWER" else total // 2
            begin, end = (before, total - before) if auto_pad != "NOTSET" else (total // 2, total - total // 2)
            if output_shape is not None and wanted > full:
                extra[i] += wanted - full
        else:
            begin, end = (pads[i], pads[i + rank]) if pads is not None and auto_pad == "NOTSET" else (0, 0)
        padding.append((reach - 1 - begin, reach - 1 - end + extra[i]))
    c, m = W.shape[:2]
    kernel: Any = W.reshape(group, c // group, m, *W.shape[2:])
    kernel = jnp.swapaxes(kernel, 1, 2).reshape(group * m, c // group, *W.shape[2:])
    y = jax.lax.conv_general_dilated(
        X,
        jnp.flip(kernel, tuple(range(2, X.ndim))),
        window_strides=[1] * rank,
        padding=padding,
        lhs_dilation=strides,
        rhs_dilation=dilations,
        feature_group_count=group,
    )
    return y if B is None else y + B.reshape([1, -1] + [1] * rank)
