"""The op Resize: one axis after the other, each as a product with a small matrix that follows from the sizes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mesh.lowering.op_helpers import Array, axes_of, is_float
from mesh.lowering.registry import register

_COORDINATES = (
    "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_crop_and_resize",
)  # fmt: skip
_NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
_MODES = ("nearest", "linear", "cubic")


def _origins(mode: str, size: int, count: int, scale: float, roi: tuple[float, float]) -> np.ndarray:
    """Where in the input, [count] in elements, each output element lies."""
    x = np.arange(count, dtype=np.float64)
    length = scale * size  # of the output, before it was rounded to `count`
    if mode == "align_corners":
        return np.zeros(count) if length == 1 else x * (size - 1) / (length - 1)
    if mode == "asymmetric":
        return x / scale
    if mode == "tf_crop_and_resize":
        begin, end = roi
        if length == 1:
            return np.full(count, (end - begin) * (size - 1) / 2 + begin * (size - 1))
        return x * (end - begin) * (size - 1) / (length - 1) + begin * (size - 1)
    if mode == "pytorch_half_pixel" and length == 1:
        return np.full(count, -0.5)
    offset = size / 2 * (1 - count / length) if mode == "half_pixel_symmetric" else 0.0
    return offset + (x + 0.5) / scale - 0.5


def _kernel(mode: str, distance: np.ndarray, a: float) -> np.ndarray:
    """Weight of an element at a distance from the point."""
    x = np.abs(distance)
    if mode == "linear":
        return np.asarray(np.clip(1 - x, 0, 1))
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.asarray(np.where(x <= 1, near, np.where(x < 2, far, 0.0)))


def _matrix(
    mode: str, origins: np.ndarray, size: int, scale: float, nearest_mode: str, cubic_a: float, antialias: bool, exclude_outside: bool
) -> np.ndarray:
    """[count, size]: the output elements as weighted sums of input elements."""
    count = len(origins)
    matrix = np.zeros((count, size))
    rows = np.arange(count)
    if mode == "nearest":
        rounded = {
            "round_prefer_floor": np.ceil(origins - 0.5),
            "round_prefer_ceil": np.floor(origins + 0.5),
            "floor": np.floor(origins),
            "ceil": np.ceil(origins),
        }[nearest_mode]
        matrix[rows, np.clip(rounded, 0, size - 1).astype(int)] = 1
        return matrix
    shrink = min(scale, 1.0) if antialias else 1.0
    reach = math.ceil((1 if mode == "linear" else 2) / shrink)
    first = np.floor(origins)[:, None]
    places = first + np.arange(-reach, reach + 2)[None]  # [count, taps]
    weights = _kernel(mode, (places - origins[:, None]) * shrink, cubic_a)
    if exclude_outside:
        weights = np.where((places < 0) | (places > size - 1), 0.0, weights)
    if exclude_outside or antialias:
        weights = weights / weights.sum(1, keepdims=True)
    np.add.at(matrix, (rows[:, None], np.clip(places, 0, size - 1).astype(int)), weights)
    return matrix


@register(
    since=11, static=(1, 2, 3),
    allowed={"coordinate_transformation_mode": _COORDINATES, "mode": _MODES, "nearest_mode": _NEAREST,
             "keep_aspect_ratio_policy": ("stretch", "not_larger", "not_smaller")},
)  # fmt: skip
def Resize(
    X: Array, roi: Array | None = None, scales: Array | None = None, sizes: Array | None = None, *, antialias: int = 0,
    axes: Sequence[int] | None = None, coordinate_transformation_mode: str = "half_pixel", cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0, extrapolation_value: float = 0.0, keep_aspect_ratio_policy: str = "stretch", mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Array:  # fmt: skip
    chosen = tuple(range(X.ndim)) if axes is None else axes_of(axes, X.ndim)
    have = [X.shape[axis] for axis in chosen]
    if scales is not None and np.size(scales):
        factors = [float(scale) for scale in scales]
        counts = [math.floor(factor * size) for factor, size in zip(factors, have, strict=True)]
    else:
        assert sizes is not None
        counts = [int(size) for size in sizes]
        factors = [count / size for count, size in zip(counts, have, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            one = min(factors) if keep_aspect_ratio_policy == "not_larger" else max(factors)
            factors = [one] * len(factors)
            counts = [math.floor(one * size + 0.5) for size in have]
    crop = coordinate_transformation_mode == "tf_crop_and_resize"
    y: Any = X.astype(jnp.promote_types(X.dtype, np.float32))
    outside: Any = None
    for i, axis in enumerate(chosen):
        part = (float(roi[i]), float(roi[i + len(chosen)])) if crop and roi is not None else (0.0, 1.0)
        if counts[i] == have[i] and factors[i] == 1 and not crop:
            continue
        origins = _origins(coordinate_transformation_mode, have[i], counts[i], factors[i], part)
        matrix = _matrix(mode, origins, have[i], factors[i], nearest_mode, cubic_coeff_a, bool(antialias), bool(exclude_outside))
        y = jnp.moveaxis(jnp.tensordot(jnp.asarray(matrix, y.dtype), y, ((1,), (axis,))), 0, axis)
        if crop:
            out = (origins < 0) | (origins > have[i] - 1)
            out = out.reshape([-1 if j == axis else 1 for j in range(X.ndim)])
            outside = out if outside is None else outside | out
    if outside is not None:
        y = jnp.where(outside, np.asarray(extrapolation_value, y.dtype), y)
    return y.astype(X.dtype) if is_float(X.dtype) else jnp.rint(y).astype(X.dtype)


@register("Resize", since=10, allowed={"mode": ("nearest", "linear")}, static=(1,))
def Resize_10(X: Array, scales: Array, *, mode: str = "nearest") -> Array:
    return Resize(X, None, scales, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")


@register(since=9, allowed={"mode": ("nearest", "linear")}, static=(1,))
def Upsample(X: Array, scales: Array, *, mode: str = "nearest") -> Array:
    return Resize_10(X, scales, mode=mode)
