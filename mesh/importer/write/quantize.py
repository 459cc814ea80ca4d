"""Weight-only quantization at import: what replaces one MatMul weight or embedding table in a block.

A weight is [in, out] (or [experts, in, out]). Scales belong to output channels, or to groups of consecutive input elements
of one output channel, so that `DequantizeLinear(values, scale)` gives the weight back in the compute type:

    8 bits   int8, symmetric; one scale an output channel, or one a group
    4 bits   int4, symmetric; one scale a group

The scale of a group is searched, not taken from its largest element: at 4 bits clipping an outlier costs less than coarser
steps for everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from mesh.importer.options import ImportOptions

__all__ = ["QuantizedWeight", "dequantize", "exact_type", "half_type", "quantize_rows", "quantize_weight"]

Array = npt.NDArray[Any]

# Columns are quantized in slices of this many elements: the float32 working copies stay small whatever the weight's size.
SLICE_ELEMENTS = 1 << 20

# Candidates for the largest magnitude a 4-bit scale must reach, as a fraction of the group's largest element. Negative ones
# give that element the code -8, which positive ones cannot use.
FRACTIONS_4 = (1.0, 0.93, 0.86, 0.79, -1.0, -0.93, -0.86, -0.79)
FLOAT16_MAX = 65504.0

# DequantizeLinear cannot say "one scale an output channel" of a weight that has an expert axis too: groups instead.
EXPERT_GROUP = 128


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """`values` [..., in, out] int8 or int4; `scale` [out], or [..., groups, out] when `block_size` is given; compute type.

    `axis` and `block_size` are the attributes of DequantizeLinear; block_size None is one scale an output channel.
    """

    values: Array
    scale: Array
    axis: int
    block_size: int | None


def quantize_weight(weight: Array, options: ImportOptions) -> QuantizedWeight:
    """Quantize `weight` [in, out] or [experts, in, out] of any float type to `options.bits` (8 or 4).

    The last group of an input length that is no multiple of the group size is shorter, as DequantizeLinear allows.
    """
    *lead, rows, columns = weight.shape
    group = options.group_size or (EXPERT_GROUP if lead else None)
    per_channel = group is None
    block = rows if group is None else min(group, rows)
    groups = -(-rows // block)
    storage = np.dtype(ml_dtypes.int4) if options.bits == 4 else np.dtype(np.int8)
    values = np.empty(weight.shape, storage)
    scale = np.empty((*lead, groups, columns), options.compute)
    width = max(1, SLICE_ELEMENTS // rows)
    for index in np.ndindex(*lead):
        for start in range(0, columns, width):
            part = (*index, slice(None), slice(start, start + width))
            codes, scales = _quantize_columns(np.asarray(weight[part], np.float32), block, options)
            values[part] = codes.astype(storage)
            scale[part] = scales
    axis = len(lead) if not per_channel else 1
    return QuantizedWeight(values, scale.reshape(columns) if per_channel else scale, axis, None if per_channel else block)


def quantize_rows(table: Array, options: ImportOptions) -> tuple[Array, Array]:
    """Quantize an embedding table [rows, width] to int8 with one scale a row: (values [rows, width], scale [rows, 1])."""
    values = np.empty(table.shape, np.int8)
    scale = np.empty((table.shape[0], 1), options.compute)
    height = max(1, SLICE_ELEMENTS // table.shape[1])
    for start in range(0, table.shape[0], height):
        rows = np.asarray(table[start : start + height], np.float32)
        step = _stored(np.abs(rows).max(axis=1, keepdims=True) / 127, options)
        values[start : start + height] = np.rint(rows * _inverse(step)).clip(-127, 127).astype(np.int8)
        scale[start : start + height] = step
    return values, scale


def dequantize(quantized: QuantizedWeight) -> Array:
    """What DequantizeLinear computes, float32 [..., in, out]."""
    scale = quantized.scale.astype(np.float32)
    if quantized.block_size is not None:
        scale = np.repeat(scale, quantized.block_size, axis=quantized.axis)
        scale = np.take(scale, np.arange(quantized.values.shape[quantized.axis]), axis=quantized.axis)
    return np.asarray(quantized.values.astype(np.float32) * scale)


def half_type(weight: Array) -> np.dtype[Any]:
    """The 16-bit type that keeps more of `weight`: bfloat16 if it is that already or exceeds float16, else float16."""
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    if weight.dtype in (bfloat16, np.dtype(np.float16)):
        return weight.dtype
    largest = max((float(np.abs(part).max(initial=0)) for part in _slices(weight)), default=0.0)
    return bfloat16 if largest > FLOAT16_MAX else np.dtype(np.float16)


def exact_type(weight: Array) -> np.dtype[Any]:
    """The smallest type that has every number of `weight`: bfloat16 or float16, else float32. Weights of experts are most of a model, and
    many are stored in 16 bits, or stand for numbers of fewer."""
    for name in (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)):
        if weight.dtype == name or all(_has_all(part, name) for part in _slices(weight)):
            return name
    return np.dtype(np.float32)


def _has_all(part: Array, dtype: np.dtype[Any]) -> bool:
    with np.errstate(over="ignore"):
        return bool((part.astype(dtype).astype(part.dtype) == part).all())


def _slices(array: Array) -> list[Array]:
    if array.ndim == 0:
        return [array]
    height = max(1, SLICE_ELEMENTS // max(1, array[0].size)) if array.shape[0] else 1
    return [array[start : start + height] for start in range(0, array.shape[0], height)]


def _quantize_columns(weight: Array, block: int, options: ImportOptions) -> tuple[Array, Array]:
    """Codes [in, out] and scales [groups, out] (float32, already rounded to the stored type) of float32 [in, out]."""
    rows, columns = weight.shape
    groups = -(-rows // block)
    if rows % block:
        weight = np.concatenate([weight, np.zeros((groups * block - rows, columns), np.float32)])
    grouped = weight.reshape(groups, block, columns)
    largest = np.take_along_axis(grouped, np.abs(grouped).argmax(axis=1)[:, None, :], axis=1)  # signed, [groups, 1, out]
    if options.bits == 8:
        scale = _stored(np.abs(largest) / 127, options)
        codes = np.rint(grouped * _inverse(scale)).clip(-127, 127)
    else:
        scale, codes = _search_4(grouped, largest, options)
    return codes.reshape(groups * block, columns)[:rows], scale[:, 0, :]


def _search_4(grouped: Array, largest: Array, options: ImportOptions) -> tuple[Array, Array]:
    """The scale [groups, 1, out] with the smallest squared error among the candidates, each refined by least squares."""
    best_error = np.full(largest.shape, np.inf, np.float32)
    best_scale = np.zeros_like(largest)
    for fraction in FRACTIONS_4:
        # a positive fraction maps the largest element to +7 or -7, a negative one to -8
        scale = np.abs(largest) * (fraction / 7) if fraction > 0 else largest * (fraction / 8)
        codes = np.rint(grouped * _inverse(scale)).clip(-8, 7)
        norm = (codes * codes).sum(axis=1, keepdims=True)
        scale = _stored(np.divide((grouped * codes).sum(axis=1, keepdims=True), norm, out=np.zeros_like(norm), where=norm > 0), options)
        error = np.square(grouped - codes * scale).sum(axis=1, keepdims=True)
        better = error < best_error
        best_error = np.where(better, error, best_error)
        best_scale = np.where(better, scale, best_scale)
    return best_scale, np.rint(grouped * _inverse(best_scale)).clip(-8, 7)


def _stored(scale: Array, options: ImportOptions) -> Array:
    """`scale` as the block will hold it, so that codes are chosen for the scale that is used."""
    return np.asarray(scale.astype(options.compute).astype(np.float32))


def _inverse(scale: Array) -> Array:
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
