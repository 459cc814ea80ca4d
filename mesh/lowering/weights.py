"""A matmul weight as the runtime holds it: [out, in], at its stored width, widened inside the product.

Blocks store the right operand of a MatMul as [in, out] or, with a Transpose, as [out, in] (docs/model-format.md). Every variant of the
product that is fast on a CPU reads the weight output by output, and all variants read the same bytes. So a weight is brought into that
order once, at load, and kept once, for any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np

from mesh.host.pages import aligned, copy_mapped
from mesh.kernels.library import kernels
from mesh.lowering import linear
from mesh.lowering.linear import Codes, Factors
from mesh.lowering.operands import RightOperand, Stored
from mesh.lowering.tensors import PackedFormat, unpack

__all__ = ["PackedWeight", "Variants", "fits_tiles", "pack", "stored_codes"]

Variants = tuple[tuple[int, str], ...]
"""(rows at most, variant of the product), ascending."""

Array = np.ndarray[Any, Any]
_BLOCK = 32
"""Codes of less than 8 bits lie in blocks of so many."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedWeight:
    """Takes the place of a right operand in a lowered graph. MatMul with it is one product, in the variant that `variants` names for the
    number of rows."""

    codes: Codes
    variants: Variants = field(default=(), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        """[in, out]: as the graph sees it."""
        out, size = self.codes.shape
        return (size, out)

    @property
    def ndim(self) -> int:
        return 2

    def with_variants(self, variants: Variants) -> PackedWeight:
        return replace(self, variants=variants)

    def variant(self, rows: int, dtype: Any = np.float32) -> str:
        if linear.in_kernel(dtype, self.codes):
            return "kernel"
        for limit, name in self.variants:
            if rows <= limit:
                return name
        return linear.default_variant(rows, self.codes)

    def product(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out], of x's type."""
        lead = x.shape[:-1]
        flat = x.reshape(-1, x.shape[-1])  # [rows, in]
        y = linear.product(flat, self.codes, variant=self.variant(flat.shape[0], flat.dtype))
        return y.reshape(*lead, y.shape[-1])

    def __lower_op__(self, op_type: str, args: tuple[Any, ...], attrs: Mapping[str, Any]) -> Any:
        if op_type == "MatMul" and args[1] is self:
            return self.product(jax.numpy.asarray(args[0]))
        return NotImplemented


def pack(parts: Sequence[RightOperand], read: Callable[[str], tuple[Array, PackedFormat | None]], *, experts: int = 1) -> PackedWeight:
    """Operands of one kind as one weight: their outputs one after the other. `read` gives an initializer, as stored, and its format if its
    elements are smaller than a byte. `experts`: how many equal parts are multiplied each by itself."""
    first = parts[0]
    factors = {name: _factors([getattr(part, name) for part in parts], first, read) for name in ("scale", "zero", "minimum")}
    minimum = factors["minimum"]
    if minimum is not None and first.sign < 0:
        minimum = Factors(-minimum.data) if minimum.step is None else Factors(minimum.data, -minimum.step)
    packed = replace(
        _codes(parts, read), dtype=first.dtype, scale=factors["scale"], zero_point=factors["zero"], minimum=minimum, group=first.group
    )
    return PackedWeight(packed.in_tiles() if fits_tiles(packed, experts) else packed)


def _codes(parts: Sequence[RightOperand], read: Callable[[str], tuple[Array, PackedFormat | None]]) -> Codes:
    """The codes of operands of one kind."""
    first = parts[0]
    if first.high is not None:
        low = np.concatenate([read(part.codes)[0] for part in parts])
        high = np.concatenate([read(part.high)[0] for part in parts if part.high is not None])
        six = Codes(jax.device_put(low), high=jax.device_put(high), bits=6, offset=1 << 5)
        return six if kernels().name is not None else Codes(six.integers(np.int8))  # XLA's forms are faster with whole bytes
    stored, layout = [], read(first.codes)[1]
    for part in parts:
        array, format_ = read(part.codes)
        stored.append(array if format_ is None else np.asarray(unpack(array, format_)))
    codes = aligned((sum(part.out for part in parts), first.depth), stored[0].dtype)
    start = 0
    for part, array in zip(parts, stored, strict=True):
        own = codes[start : start + part.out]
        copy_mapped(array, own if part.turned else own.T)
        start += part.out
    return stored_codes(codes, layout, grouped=bool(first.group))


def fits_tiles(codes: Codes, experts: int = 1) -> bool:
    """Whether the kernels here read a weight, or each of so many experts, best in tiles."""
    if not kernels().reads_tiles or codes.dtype != np.float32 or codes.shape[0] % (experts * linear.TILE):
        return False
    if codes.kernel_kind == "6 bits":
        return codes.offset == 1 << 5
    return codes.kernel_kind in ("4 bits", "int8") and codes.shape[1] % _BLOCK == 0 and (codes.group == 0 or codes.group >= _BLOCK)


def stored_codes(codes: Array, layout: PackedFormat | None, *, grouped: bool) -> Codes:
    """Codes [out, in], those of fewer than 8 bits packed again; rows that are not whole blocks stay bytes."""
    if layout is not None and layout.bits == 4 and codes.shape[1] % _BLOCK == 0:
        return _packed(codes, 4, layout.signed)
    bits = _fewer_bits(codes) if grouped and kernels().name is not None else 8
    return _packed(codes, bits, codes.dtype == np.int8) if bits < 8 else Codes(jax.device_put(codes, may_alias=True))


def _fewer_bits(codes: Array) -> int:
    """How many bits codes of bytes need, of the widths that kernels read: a source of 5 or 6 bits has its codes in bytes here."""
    if codes.dtype not in (np.int8, np.uint8) or codes.shape[1] % _BLOCK or not codes.size:
        return 8
    low, high = int(codes.min()), int(codes.max())
    if (codes.dtype == np.uint8 and high < 32) or (codes.dtype == np.int8 and low >= -16 and high < 16):
        return 5
    return 6 if codes.dtype == np.int8 and low >= -32 and high < 32 and codes.shape[1] % (2 * _BLOCK) == 0 else 8


def _packed(codes: Array, bits: int, signed: bool) -> Codes:
    """Codes [out, in] of one byte each, `bits` of them used, as mesh/lowering/linear.py describes."""
    out, offset = len(codes), 1 << (bits - 1) if signed else 0
    plain = (codes.view(np.uint8) + np.uint8(offset)) & np.uint8((1 << bits) - 1)
    blocks = (plain & 15).reshape(out, -1, 2, _BLOCK // 2)
    low = (blocks[:, :, 0] | blocks[:, :, 1] << 4).reshape(out, -1)
    high: Array | None = None
    if bits == 5:
        high = np.packbits(plain >> 4, axis=1, bitorder="little")
    elif bits == 6:
        upper = (plain >> 4).reshape(out, -1, 4, 16)
        high = (upper[:, :, 0] | upper[:, :, 1] << 2 | upper[:, :, 2] << 4 | upper[:, :, 3] << 6).reshape(out, -1)
    return Codes(jax.device_put(low), high=None if high is None else jax.device_put(high), bits=bits, offset=offset)


def _factors(
    each: Sequence[Stored | None], operand: RightOperand, read: Callable[[str], tuple[Array, PackedFormat | None]]
) -> Factors | None:
    """The numbers of one weight's groups [out, groups] or [out]."""
    known = [stored for stored in each if stored is not None]
    if not known:
        return None

    def together(names: Sequence[str]) -> Any:
        arrays = [stored if format_ is None else np.asarray(unpack(stored, format_)) for stored, format_ in map(read, names)]
        if arrays[0].size == 1:  # one for the whole weight, equal in all parts
            return _on_device(arrays[0].reshape(()))
        return _on_device(np.concatenate([array.T if array.ndim == 2 and not operand.turned else array for array in arrays]))

    steps = [stored.step for stored in known if stored.step is not None]
    return Factors(together([stored.name for stored in known]), together(steps) if steps else None)


def _on_device(array: Array) -> Any:
    if array.dtype.name in ("int4", "uint4"):
        array = array.astype(np.int8 if array.dtype.name == "int4" else np.uint8)
    return jax.device_put(np.ascontiguousarray(array))
