"""A matmul weight as the runtime holds it: [out, in], at its stored width, widened inside the product.

Blocks store the right operand of a MatMul as [in, out] (docs/model-format.md). Every variant of the product that is fast on a CPU reads
the weight output by output, and all variants read the same bytes. So a weight is transposed once at load and kept once, for any number
of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx

from mesh.lowering import linear
from mesh.lowering.linear import Codes
from mesh.lowering.tensors import PackedFormat, unpack

__all__ = ["PackedWeight", "Variants", "pack"]

Variants = tuple[tuple[int, str], ...]
"""(rows at most, variant of the product), ascending."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedWeight:
    """Takes the place of the initializer in a lowered graph.

    Cast and DequantizeLinear of it stay lazy. MatMul with it as the right operand is one product, in the variant that `variants` names
    for the number of rows.
    """

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

    def variant(self, rows: int) -> str:
        for limit, name in self.variants:
            if rows <= limit:
                return name
        return linear.default_variant(rows, self.codes)

    def product(self, x: jax.Array) -> jax.Array:
        """x [..., in] -> [..., out], of x's type."""
        lead = x.shape[:-1]
        flat = x.reshape(-1, x.shape[-1])  # [rows, in]
        y = linear.product(flat, self.codes, variant=self.variant(flat.shape[0]))
        return y.reshape(*lead, y.shape[-1])

    def __lower_op__(self, op_type: str, args: tuple[Any, ...], attrs: Mapping[str, Any]) -> Any:
        if op_type == "Cast" and args[0] is self:
            return replace(self, codes=replace(self.codes, dtype=np.dtype(onnx.helper.tensor_dtype_to_np_dtype(attrs["to"]))))
        if op_type == "DequantizeLinear" and args[0] is self:
            scale = jnp.asarray(args[1])
            zero = None if len(args) < 3 or args[2] is None else jnp.asarray(args[2]).T
            codes = replace(self.codes, scale=scale.T, zero_point=zero, dtype=np.dtype(scale.dtype), group=attrs.get("block_size", 0))
            return replace(self, codes=codes)
        if op_type == "MatMul" and args[1] is self:
            return self.product(jnp.asarray(args[0]))
        return NotImplemented


def pack(parts: Sequence[tuple[np.ndarray, PackedFormat | None]]) -> PackedWeight:
    """Initializers [in, out], all of one type and `in`, as one weight: their outputs one after the other.

    A part with a format is codes of less than a byte as ONNX packs them; 4-bit ones are repacked output-major.
    """
    columns = [(stored if layout is None else np.asarray(unpack(stored, layout))).T for stored, layout in parts]
    codes = np.empty((sum(len(each) for each in columns), columns[0].shape[1]), columns[0].dtype)
    np.concatenate(columns, out=codes)
    layout = parts[0][1]
    if layout is None or layout.bits != 4 or codes.shape[1] % 2:
        return PackedWeight(Codes(jax.device_put(codes)))
    low, high = codes[:, 0::2].astype(np.uint8) & 15, codes[:, 1::2].astype(np.uint8) & 15
    return PackedWeight(Codes(jax.device_put(low | (high << 4)), nibbles="signed" if layout.signed else "unsigned"))
