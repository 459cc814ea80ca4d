"""Shapes and their arithmetic: what only moves, repeats, cuts or counts elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mesh.errors import UnsupportedModel
from mesh.lowering.op_helpers import Array, array_namespace, axes_of, numpy_type, positive_axis, type_of
from mesh.lowering.registry import register


@register(numpy=True, shape_only=True)
def Shape(data: Array, *, start: int = 0, end: int | None = None) -> Array:
    """Always known, whether or not `data` is."""
    return np.asarray(data.shape[slice(start, end)], np.int64)


@register(numpy=True, shape_only=True)
def Size(data: Array) -> Array:
    return np.asarray(math.prod(data.shape), np.int64)


@register(numpy=True, same_shape=True)
def Identity(input: Array) -> Array:
    return input


@register(numpy=True, since=5, static=(1,))
def Reshape(data: Array, shape: Array, *, allowzero: int = 0) -> Array:
    target = [int(size) for size in np.atleast_1d(shape)]
    if not allowzero:
        target = [data.shape[i] if size == 0 else size for i, size in enumerate(target)]
    if -1 in target:
        known = math.prod(size for size in target if size != -1)
        target[target.index(-1)] = data.size // known if known else 0
    return data.reshape(target)


@register("Reshape", numpy=True)
def Reshape_1(data: Array, *, shape: Sequence[int]) -> Array:
    return Reshape(data, np.asarray(shape, np.int64))


@register(numpy=True)
def Flatten(input: Array, *, axis: int = 1) -> Array:
    axis = axis + input.ndim if axis < 0 else axis
    return input.reshape(math.prod(input.shape[:axis]), math.prod(input.shape[axis:]))


@register(numpy=True, since=13, static=(1,))
def Squeeze(data: Array, axes: Array | None = None) -> Array:
    chosen = None if axes is None else axes_of(axes, data.ndim)
    return array_namespace(data).squeeze(data, axis=chosen)


@register("Squeeze", numpy=True)
def Squeeze_1(data: Array, *, axes: Sequence[int] | None = None) -> Array:
    return Squeeze(data, axes)


@register(numpy=True, since=13, static=(1,))
def Unsqueeze(data: Array, axes: Array) -> Array:
    return array_namespace(data).expand_dims(data, axes_of(axes, data.ndim + np.size(axes)))


@register("Unsqueeze", numpy=True)
def Unsqueeze_1(data: Array, *, axes: Sequence[int]) -> Array:
    return Unsqueeze(data, np.asarray(axes, np.int64))


@register(numpy=True)
def Transpose(data: Array, *, perm: Sequence[int] | None = None) -> Array:
    return array_namespace(data).transpose(data, perm)


@register(numpy=True, static=(1,))
def Expand(input: Array, shape: Array) -> Array:
    target = np.broadcast_shapes(input.shape, tuple(int(size) for size in shape))
    return array_namespace(input).broadcast_to(input, target)


@register(numpy=True, since=6, static=(1,))
def Tile(input: Array, repeats: Array) -> Array:
    return array_namespace(input).tile(input, tuple(int(count) for count in repeats))


@register(numpy=True, since=4)
def Concat(*inputs: Array, axis: int) -> Array:
    return array_namespace(*inputs).concatenate(inputs, axis=axis)


@register("Concat", numpy=True)
def Concat_1(*inputs: Array, axis: int = 1) -> Array:
    return Concat(*inputs, axis=axis)


def _split(input: Array, sizes: Sequence[int], axis: int) -> tuple[Array, ...]:
    if sum(sizes) != input.shape[axis]:
        raise UnsupportedModel(f"parts of {list(sizes)} of an axis of {input.shape[axis]}")
    return tuple(array_namespace(input).split(input, np.cumsum(np.asarray(sizes[:-1], np.int64)).tolist(), axis=axis))


@register(numpy=True, since=13, static=(1,))
def Split(input: Array, split: Array | None = None, *, axis: int = 0, num_outputs: int | None = None, n_outputs: int) -> tuple[Array, ...]:
    """Without sizes: equal parts, the last one smaller if need be."""
    if split is not None:
        return _split(input, [int(size) for size in split], axis)
    parts, length = num_outputs or n_outputs, input.shape[axis]
    size = -(-length // parts)
    return _split(input, [max(0, min(size, length - i * size)) for i in range(parts)], axis)


@register("Split", numpy=True)
def Split_1(input: Array, *, axis: int = 0, split: Sequence[int] | None = None, n_outputs: int) -> tuple[Array, ...]:
    return Split(input, None if split is None else np.asarray(split), axis=axis, n_outputs=n_outputs)


@register(numpy=True, since=10, static=(1, 2, 3, 4))
def Slice(data: Array, starts: Array, ends: Array, axes: Array | None = None, steps: Array | None = None) -> Array:
    chosen = range(len(starts)) if axes is None else axes_of(axes, data.ndim)
    index: list[Any] = [slice(None)] * data.ndim
    for i, axis in enumerate(chosen):
        size, start, end, step = data.shape[axis], int(starts[i]), int(ends[i]), 1 if steps is None else int(steps[i])
        low, high = (0, size) if step > 0 else (-1, size - 1)
        start = min(max(start + size if start < 0 else start, max(low, 0)), high)
        end = min(max(end + size if end < 0 else end, low), high)
        index[axis] = slice(start, None if end < 0 else end, step) if start >= 0 else slice(0, 0)
    return data[tuple(index)]


@register("Slice", numpy=True)
def Slice_1(data: Array, *, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None = None) -> Array:
    return Slice(data, np.asarray(starts), np.asarray(ends), axes)


_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "edge", "wrap": "wrap"}


@register(numpy=True, since=11, allowed={"mode": tuple(_PAD_MODES)}, static=(1, 3))
def Pad(data: Array, pads: Array, constant_value: Array | None = None, axes: Array | None = None, *, mode: str = "constant") -> Array:
    """Negative pads cut. Pads: all the begins, then all the ends, of `axes`."""
    xp = array_namespace(data, constant_value)
    chosen = tuple(range(data.ndim)) if axes is None else axes_of(axes, data.ndim)
    widths = [(0, 0)] * data.ndim
    for i, axis in enumerate(chosen):
        widths[axis] = (int(pads[i]), int(pads[i + len(chosen)]))
    data = data[tuple(slice(max(-a, 0), size - max(-b, 0)) for (a, b), size in zip(widths, data.shape, strict=True))]
    widths = [(max(a, 0), max(b, 0)) for a, b in widths]
    if mode != "constant":
        return xp.pad(data, widths, mode=mode)
    fill = 0 if constant_value is None else constant_value.reshape(())
    return xp.pad(data, widths, mode="constant", constant_values=fill)


@register("Pad", numpy=True, allowed={"mode": tuple(_PAD_MODES)})
def Pad_2(data: Array, *, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> Array:
    return Pad(data, np.asarray(pads), np.asarray(value, data.dtype), mode=mode)


@register(numpy=True, static=(0,))
def ConstantOfShape(input: Array, *, value: np.ndarray | None = None) -> Array:
    fill = np.zeros((), np.float32) if value is None else value.reshape(())
    return np.broadcast_to(fill, tuple(int(size) for size in input))


@register(numpy=True, static=(0, 1, 2))
def Range(start: Array, limit: Array, delta: Array, *, stash_type: int = 1) -> Array:
    """16-bit floats are counted in float32, as the standard's function does."""
    first, last, step = (np.asarray(value).reshape(()) for value in (start, limit, delta))
    kind = first.dtype
    wider = np.float32 if kind.itemsize < 4 and kind.kind not in "iu" else kind
    count = max(
        math.ceil((float(last) - float(first)) / float(step)) if kind.kind not in "iu" else -((int(first) - int(last)) // int(step)), 0
    )
    return (first.astype(wider) + np.arange(count).astype(wider) * step.astype(wider)).astype(kind)


@register(numpy=True, shape_only=True)
def EyeLike(input: Array, *, dtype: int | None = None, k: int = 0) -> Array:
    kind = numpy_type(dtype) if dtype is not None else input.dtype
    return np.eye(input.shape[0], input.shape[1], k, dtype=kind)


@register(numpy=True, static=(1,), same_shape=True)
def Trilu(input: Array, k: Array | None = None, *, upper: int = 1) -> Array:
    xp = array_namespace(input)
    diagonal = 0 if k is None else int(k.reshape(()))
    return xp.triu(input, diagonal) if upper else xp.tril(input, diagonal)


@register(numpy=True, allowed={"mode": ("DCR", "CRD")})
def DepthToSpace(input: Array, *, blocksize: int, mode: str = "DCR") -> Array:
    b, c, h, w = input.shape
    depth, n = c // blocksize**2, blocksize
    if mode == "DCR":
        x = input.reshape(b, n, n, depth, h, w).transpose(0, 3, 4, 1, 5, 2)
    else:
        x = input.reshape(b, depth, n, n, h, w).transpose(0, 1, 4, 2, 5, 3)
    return x.reshape(b, depth, h * n, w * n)


@register(numpy=True, allowed={"mode": ("DCR", "CRD")})
def SpaceToDepth(input: Array, *, blocksize: int, mode: str = "DCR") -> Array:
    b, c, h, w = input.shape
    n = blocksize
    x = input.reshape(b, c, h // n, n, w // n, n)
    x = x.transpose(0, 3, 5, 1, 2, 4) if mode == "DCR" else x.transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(b, c * n * n, h // n, w // n)


@register(numpy=True)
def ReverseSequence(input: Array, sequence_lens: Array, *, batch_axis: int = 1, time_axis: int = 0) -> Array:
    xp = array_namespace(input, sequence_lens)
    batch_axis, time_axis = positive_axis(batch_axis, input.ndim), positive_axis(time_axis, input.ndim)
    time = np.arange(input.shape[time_axis])[:, None]
    index = xp.where(time < sequence_lens, sequence_lens - 1 - time, time)  # [time, batch]
    if batch_axis < time_axis:
        index = index.T
    index = index.reshape([size if axis in (batch_axis, time_axis) else 1 for axis, size in enumerate(input.shape)])
    return xp.take_along_axis(input, index, axis=time_axis)


@register(numpy=True)
def BitCast(input: Array, *, to: int) -> Array:
    kind = type_of(to, array_namespace(input))
    return input.view(kind) if input.ndim else input.reshape(1).view(kind).reshape(())
