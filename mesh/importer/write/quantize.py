"""Weight-only quantization at import: what replaces one MatMul weight or embedding table in a block.

A weight is [in, out] (or [experts, in, out]). Scales belong to output channels, or to groups of consecutive input elements
of one output channel, so that `DequantizeLinear(values, scale)` gives the weight back in the compute type:

    8 bits   int8, symmetric; one scale an output channel, or one a group

Weights of 4 and 6 bits are those of mesh/importer/write/narrow.py.
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

FLOAT16_MAX = 65504.0

# DequantizeLinear cannot say "one scale an output channel" of a weight that has an expert axis too: groups instead.
EXPERT_GROUP = 128


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """`values` [..., in, out] int8; `scale` [out], or [..., groups, out] when `block_size` is given; compute type.

    `axis` and `block_size` are the attributes of DequantizeLinear; block_size None is one scale an output channel.
    """

    values: Array
    scale: Array
    axis: int
    block_size: int | None


def quantize_weight(weight: Array, options: ImportOptions) -> QuantizedWeight:
    """Quantize `weight` [in, out] or [experts, in, out] of any float type to 8 bits.

    The last group of an input length that is no multiple of the group size is shorter, as DequantizeLinear allows.
    """
    *lead, rows, columns = weight.shape
    group = options.group_size or (EXPERT_GROUP if lead else None)
    per_channel = group is None
    block = rows if group is None else min(group, rows)
    groups = -(-rows // block)
    values = np.empty(weight.shape, np.int8)
    scale = np.empty((*lead, groups, columns), options.compute)
    width = max(1, SLICE_ELEMENTS // rows)
    for index in np.ndindex(*lead):
        for start in range(0, columns, width):
            part = (*index, slice(None), slice(start, start + width))
            codes, scales = _quantize_columns(np.asarray(weight[part], np.float32), block, options)
            values[part] = codes.astype(np.int8)
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
    scale = _stored(np.abs(grouped).max(axis=1, keepdims=True) / 127, options)  # [groups, 1, out]
    codes = np.rint(grouped * _inverse(scale)).clip(-127, 127)
    return codes.reshape(groups * block, columns)[:rows], scale[:, 0, :]


def _stored(scale: Array, options: ImportOptions) -> Array:
    """`scale` as the block will hold it, so that codes are chosen for the scale that is used."""
    return np.asarray(scale.astype(options.compute).astype(np.float32))


def _inverse(scale: Array) -> Array:
    return np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
