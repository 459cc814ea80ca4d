"""Rules for com.microsoft's matrix products and tables: quantized weights become standard DequantizeLinear or integer rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from mesh.importer.graph.decoder import attribute, input_of
from mesh.importer.graph.edit import new_constant
from mesh.importer.passes.contrib_rewriter import Result, Rewriter, Rule, optional, refuse, stored
from mesh.importer.passes.nbits import group_order, unpack_matmul_nbits, unpack_rows

__all__ = ["PRODUCTS"]


def _fused_matmul(r: Rewriter, node: ir.Node) -> Result:
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        raise refuse(node, "a transposed batch")
    sides = []
    for place, flag in enumerate(("transA", "transB")):
        value = input_of(node, place)
        if attribute(node, flag, 0):
            rank = len(value.shape) if value.shape is not None else 0
            if rank < 2:
                raise refuse(node, f"{flag} of an input of unknown rank")
            value = r.one(node, "Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])
        sides.append(value)
    product = r.one(node, "MatMul", *sides)
    alpha = attribute(node, "alpha", 1.0)
    return [product if alpha == 1.0 else r.one(node, "Mul", product, r.number(alpha, input_of(node, 0)))]


def _matmul_nbits(r: Rewriter, node: ir.Node) -> Result:
    bits, block, rows, columns = (
        int(attribute(node, name, default)) for name, default in (("bits", 4), ("block_size", 32), ("K", 0), ("N", 0))
    )
    if bits not in (2, 4, 8):
        raise refuse(node, f"a weight of {bits} bits")
    codes, scales = stored(input_of(node, 1)), stored(input_of(node, 2))
    if codes is None or scales is None:
        raise refuse(node, "a weight that is computed")
    zeros = stored(optional(node, 3))
    if zeros is None and optional(node, 3) is not None:
        raise refuse(node, "a zero point that is computed")
    if zeros is not None and zeros.dtype not in (ir.DataType.UINT8, ir.DataType.INT8):
        raise refuse(node, f"zero points of type {zeros.dtype}")
    groups = -(-rows // block)
    dtype = ir.DataType.INT8 if bits == 8 else ir.DataType.INT4
    name, x = str(input_of(node, 1).name), input_of(node, 0)
    order = _order(node, rows, block)
    if order is not None:
        x = r.one(node, "Gather", x, new_constant(r.graph, order.astype(np.int64)), axis=-1)

    def unpacked() -> np.ndarray[Any, Any]:
        values = unpack_matmul_nbits(codes.numpy(), bits, columns, rows)
        return values if order is None else values[order]

    inputs = [
        r.weight(name, unpacked, dtype, (rows, columns)),
        r.weight(str(input_of(node, 2).name), lambda: scales.numpy().reshape(columns, groups).T, scales.dtype, (groups, columns)),
    ]
    if zeros is not None:
        packed = zeros
        inputs.append(
            r.weight(f"{name}.zero", lambda: unpack_matmul_nbits(packed.numpy(), bits, columns, groups), dtype, (groups, columns))
        )
    matrix = r.one(node, "DequantizeLinear", *inputs, axis=0, block_size=block)
    product = r.one(node, "MatMul", x, matrix)
    bias = optional(node, 5)
    return [product if bias is None else r.one(node, "Add", product, bias)]


def _order(node: ir.Node, rows: int, block: int) -> np.ndarray[Any, Any] | None:
    """The inputs group by group, where a group index (act-order quantization) says that they are not so already."""
    if optional(node, 4) is None:
        return None
    index = stored(optional(node, 4))
    if index is None:
        raise refuse(node, "a group index that is computed")
    groups = index.numpy().reshape(-1)
    try:
        if len(groups) != rows:
            raise ValueError(f"{len(groups)} inputs in groups, of {rows}")
        return group_order(groups, block)
    except ValueError as error:
        raise refuse(node, f"a group index with {error}") from None


def _gather_block_quantized(r: Rewriter, node: ir.Node) -> Result:
    """Rows of a quantized table. Codes and scales are gathered first, so that only those rows are converted."""
    codes, ids, scales, zeros = input_of(node, 0), input_of(node, 1), optional(node, 2), optional(node, 3)
    if scales is None:
        raise refuse(node, "a table without scales, which onnxruntime does not run either,")
    table, steps = stored(codes), stored(scales)
    if table is None or steps is None:
        raise refuse(node, "a table that is computed")
    rank = len(table.shape)
    axes = attribute(node, "gather_axis", 0) % rank, attribute(node, "quantize_axis", 1) % rank
    if rank != 2 or axes != (0, 1):
        raise refuse(node, "a table other than [rows, width] quantized along its rows")
    bits, block = int(attribute(node, "bits", 4)), int(attribute(node, "block_size", 128))
    height, groups = (int(n) for n in steps.shape.numpy())
    if bits not in (4, 8):
        raise refuse(node, f"a table of {bits} bits")
    offset = stored(zeros)
    if zeros is not None and offset is None:
        raise refuse(node, "a zero point that is computed")
    width = int(table.shape.numpy()[1]) * (2 if table.dtype is ir.DataType.UINT8 and bits == 4 else 1)
    if width != groups * block:
        raise refuse(node, f"a width of {width} that is not a multiple of its block of {block}")
    rows = r.one(
        node,
        "Gather",
        r.weight(str(codes.name), lambda: unpack_rows(table.numpy(), bits, width), ir.DataType.INT8, (height, width)),
        ids,
        axis=0,
    )
    values = r.one(node, "Cast", rows, to=int(steps.dtype))
    grouped = r.one(node, "Reshape", values, r.ints(0, 0, groups, block))
    if offset is not None:
        shift = r.weight(f"{codes.name}.zero", lambda: unpack_rows(offset.numpy(), bits, groups), ir.DataType.INT8, (height, groups))
        shift = r.one(node, "Cast", r.one(node, "Gather", shift, ids, axis=0), to=int(steps.dtype))
        grouped = r.one(node, "Sub", grouped, r.one(node, "Unsqueeze", shift, r.ints(-1)))
    scale = r.one(node, "Unsqueeze", r.one(node, "Gather", scales, ids, axis=0), r.ints(-1))
    return [r.one(node, "Reshape", r.one(node, "Mul", grouped, scale), r.ints(0, 0, width))]


PRODUCTS: Mapping[str, Rule] = {
    "FusedMatMul": _fused_matmul,
    "MatMulNBits": _matmul_nbits,
    "GatherBlockQuantized": _gather_block_quantized,
}
