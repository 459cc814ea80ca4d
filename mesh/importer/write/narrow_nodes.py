"""The nodes of a weight of 4 or 6 bits of this package's own (mesh/importer/write/narrow.py), in standard ONNX.

A matrix of 4 bits is uint4 through DequantizeLinear, less the minima. Codes of 6 bits, and those of a table, lie several to a byte: shifts
and masks give them back. Tables are gathered first: a step reads few rows of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import ml_dtypes
import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from mesh.importer.precision import NarrowBits, groups_of_a_step
from mesh.importer.write.narrow import SIX_ZERO, Narrow, packed
from mesh.importer.write.writer import Weight

__all__ = ["narrow_matrix", "narrow_rows"]

Array = npt.NDArray[Any]
UINT4 = np.dtype(ml_dtypes.uint4)


class Builder(Protocol):
    """What is needed of a GraphBuilder (mesh/importer/write/blocks.py)."""

    @property
    def compute_type(self) -> int: ...
    def op(self, op_type: str, *inputs: str, out: str | None = None, **attributes: Any) -> str: ...
    def const(self, value: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> str: ...
    def weight(self, name: str, value: Weight) -> str: ...


def narrow_matrix(builder: Builder, name: str, bits: NarrowBits, group: int, shape: tuple[int, int], produce: Callable[[], Narrow]) -> str:
    """The value [out, in] of a weight of that `shape`, in the compute type."""
    out, depth = shape
    groups = depth // group
    scale = _numbers(builder, name, "scale", groups, produce)
    if bits == 6:
        codes = _whole(builder, *_packed(builder, name, bits, produce), lead=1)
        zero = builder.op(
            "ConstantOfShape", builder.const([out, groups]), value=helper.make_tensor("zero", TensorProto.UINT8, [1], [SIX_ZERO])
        )
        return builder.op("DequantizeLinear", codes, scale, zero, axis=1, block_size=group)
    codes = builder.weight(f"{name}.weight", Weight(lambda: produce().codes, UINT4, counted=1))
    values = builder.op("DequantizeLinear", codes, scale, axis=1, block_size=group)
    lifted = builder.op("Unsqueeze", _numbers(builder, name, "minimum", groups, produce), builder.const([2]))
    grouped = builder.op("Reshape", values, builder.const([0, -1, group]))
    return builder.op("Reshape", builder.op("Sub", grouped, lifted), builder.const([0, -1]))


def narrow_rows(
    builder: Builder, ids: str, name: str, bits: NarrowBits, group: int, depth: int, produce: Callable[[], Narrow], out: str | None
) -> str:
    """Rows `ids` [B, T] of a table [rows, depth]: [B, T, depth], in the compute type."""
    each = groups_of_a_step(depth // group)
    compute = builder.compute_type

    def numbers(what: str) -> str:
        data, step = (builder.op("Gather", _array(builder, name, each, produce), ids) for each in (what, f"{what}_step"))
        wide = builder.op("Reshape", builder.op("Cast", data, to=compute), builder.const([0, 0, -1, each]))
        product = builder.op("Mul", wide, builder.op("Unsqueeze", step, builder.const([3])))
        return builder.op("Reshape", product, builder.const([0, 0, -1, 1]))

    codes = _whole(builder, *(builder.op("Gather", part, ids) for part in _packed(builder, name, bits, produce)), lead=2)
    values = builder.op("Cast", codes, to=compute)
    if bits == 6:
        values = builder.op("Sub", values, builder.const(float(SIX_ZERO)))
    values = builder.op("Mul", builder.op("Reshape", values, builder.const([0, 0, -1, group])), numbers("scale"))
    if bits == 4:
        values = builder.op("Sub", values, numbers("minimum"))
    return builder.op("Reshape", values, builder.const([0, 0, -1]), out=out)


def _numbers(builder: Builder, name: str, what: str, groups: int, produce: Callable[[], Narrow]) -> str:
    """Scales or minima [out, groups] in the compute type."""
    data, step = (_array(builder, name, each, produce) for each in (what, f"{what}_step"))
    return builder.op("DequantizeLinear", data, step, axis=1, block_size=groups_of_a_step(groups))


def _array(builder: Builder, name: str, what: str, produce: Callable[[], Narrow]) -> str:
    return builder.weight(f"{name}.{what}", Weight(lambda: getattr(produce(), what), counted=0))


def _packed(builder: Builder, name: str, bits: NarrowBits, produce: Callable[[], Narrow]) -> list[str]:
    """The bytes of the codes: their low four bits, and of 6 bits the upper two."""

    def high() -> Array:
        found = packed(produce().codes, bits)[1]
        assert found is not None
        return found

    parts = [builder.weight(f"{name}.weight", Weight(lambda: packed(produce().codes, bits)[0], counted=2))]
    if bits == 6:
        parts.append(builder.weight(f"{name}.high", Weight(high, counted=0)))
    return parts


def _whole(builder: Builder, low: str, high: str | None = None, *, lead: int) -> str:
    """Codes [..., in] as uint8, of bytes with `lead` axes before the last one."""
    same = [0] * lead

    def parts(each: str, shifts: list[int], mask: int) -> str:
        by = np.array(shifts, np.uint8)[:, None]  # bytes [..., 1, 16] -> their parts [..., n, 16]
        lifted = builder.op("Reshape", each, builder.const([*same, -1, 1, 16]))
        shifted = builder.op("BitShift", lifted, builder.const(by, np.uint8), direction="RIGHT")
        masked = builder.op("BitwiseAnd", shifted, builder.const(np.uint8(mask), np.uint8))
        return builder.op("Reshape", masked, builder.const([*same, -1]))

    codes = parts(low, [0, 4], 15)
    if high is None:
        return codes
    upper = builder.op("BitShift", parts(high, [0, 2, 4, 6], 3), builder.const(np.uint8(4), np.uint8), direction="LEFT")
    return builder.op("BitwiseOr", codes, upper)
