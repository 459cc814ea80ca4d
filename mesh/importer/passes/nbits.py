"""Unpack onnxruntime's quantized weights to signed codes for DequantizeLinear, and put inputs in the order of their groups.

A stored code c stands for c - 2**(bits - 1), the zero point where none is given: as signed codes they need none.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

__all__ = ["group_order", "unpack_matmul_nbits", "unpack_rows"]

Array = npt.NDArray[Any]


def unpack_matmul_nbits(packed: Array, bits: int, columns: int, rows: int) -> Array:
    """Codes or zero points of MatMulNBits, packed by output column, as int4 (also those of 2 bits) or int8 [rows, columns].

    packed: uint8 [columns, blocks, bytes], or [columns * bytes] for zero points; the low half of a byte comes first and a
    column is filled up to whole bytes.
    """
    codes = _unpack(np.ascontiguousarray(packed).view(np.uint8).reshape(columns, -1), bits)[:, :rows]
    return codes.T.astype(np.int8 if bits == 8 else ml_dtypes.int4)


def unpack_rows(table: Array, bits: int, width: int) -> Array:
    """Codes or zero points of GatherBlockQuantized as int8 [rows, width]: uint8 packed along a row, or one 4-bit element each."""
    if table.dtype == np.uint8:
        return _unpack(table.reshape(table.shape[0], -1), bits)[:, :width]
    if table.dtype == ml_dtypes.uint4:
        return table.astype(np.int8) - np.int8(8)
    return table.astype(np.int8)


def group_order(index: Array, group: int) -> Array | None:
    """The inputs so that those of a group of `group` are side by side, int32 [in]; None: they are so already. index [in]: the group of each
    input. ValueError: the groups are not of equal size, so that no order makes them so."""
    wanted = np.arange(len(index)) // group
    if np.array_equal(index, wanted):
        return None
    order = np.argsort(index, kind="stable").astype(np.int32)
    if not np.array_equal(index[order], wanted):
        raise ValueError("groups of unequal size")
    return order


def _unpack(packed: Array, bits: int) -> Array:
    """int8 codes [rows, n] around zero."""
    if bits == 8:
        return (packed.astype(np.int16) - 128).astype(np.int8)
    each = 8 // bits
    codes = np.empty((packed.shape[0], packed.shape[1] * each), np.int8)
    for place in range(each):
        codes[:, place::each] = packed >> (place * bits) & ((1 << bits) - 1)
    codes -= 1 << (bits - 1)
    return codes
