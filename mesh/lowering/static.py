"""Which inputs must be known when a graph is compiled, in one table, and what becomes of known values that meet traced ones.

XLA compiles for fixed shapes. An input that decides a shape (or which code runs) must therefore be a numpy value at trace
time: a constant, or computed from constants and shapes. Such values are exact: int64 stays int64.

Where a known value meets a traced one it becomes an array of JAX's types: without x64, int64 becomes int32 and float64
becomes float32. Values outside int32 saturate (the "to the end" and "minus infinity" idioms of exporters keep their meaning).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh.errors import UnsupportedModel

__all__ = ["PREFERRED", "SHAPE_ONLY", "STATIC", "TYPE_ONLY", "adopt", "is_traced", "require_static", "static_positions"]

# (domain, op) -> positions of inputs that must be known at trace time.
STATIC: dict[tuple[str, str], tuple[int, ...]] = {
    ("", "AffineGrid"): (1,),
    ("", "BlackmanWindow"): (0,),
    ("", "CenterCropPad"): (1,),
    ("", "Col2Im"): (1, 2),
    ("", "Compress"): (1,),
    ("", "ConstantOfShape"): (0,),
    ("", "CumProd"): (1,),
    ("", "CumSum"): (1,),
    ("", "DFT"): (1, 2),
    ("", "Dropout"): (1, 2),
    ("", "Expand"): (1,),
    ("", "HammingWindow"): (0,),
    ("", "HannWindow"): (0,),
    ("", "If"): (0,),
    ("", "Loop"): (0, 1),
    ("", "MaxUnpool"): (2,),
    ("", "MelWeightMatrix"): (0, 1, 2, 3, 4),
    ("", "NonMaxSuppression"): (0, 1, 2, 3, 4),
    ("", "NonZero"): (0,),
    ("", "OneHot"): (1,),
    ("", "Pad"): (1, 3),
    ("", "Range"): (0, 1, 2),
    ("", "ReduceL1"): (1,),
    ("", "ReduceL2"): (1,),
    ("", "ReduceLogSum"): (1,),
    ("", "ReduceLogSumExp"): (1,),
    ("", "ReduceMax"): (1,),
    ("", "ReduceMean"): (1,),
    ("", "ReduceMin"): (1,),
    ("", "ReduceProd"): (1,),
    ("", "ReduceSum"): (1,),
    ("", "ReduceSumSquare"): (1,),
    ("", "Reshape"): (1,),
    ("", "Resize"): (1, 2, 3),
    ("", "Slice"): (1, 2, 3, 4),
    ("", "Split"): (1,),
    ("", "Squeeze"): (1,),
    ("", "STFT"): (1, 3),
    ("", "Tile"): (1,),
    ("", "TopK"): (1,),
    ("", "Trilu"): (1,),
    ("", "Unique"): (0,),
    ("", "Unsqueeze"): (1,),
    ("", "Upsample"): (1,),
    ("com.microsoft", "GroupQueryAttention"): (6,),
}

# Inputs that are used as numpy when they are known (a cheaper form exists) and may be traced as well.
PREFERRED: dict[tuple[str, str], tuple[int, ...]] = {
    ("", "Gather"): (1,),
    ("", "Pow"): (1,),
}

# Inputs of which only the type is used.
TYPE_ONLY: dict[tuple[str, str], tuple[int, ...]] = {("", "CastLike"): (1,)}

# Ops whose result follows from the shape of their input alone, traced or not.
SHAPE_ONLY: frozenset[tuple[str, str]] = frozenset({("", "EyeLike"), ("", "Shape"), ("", "Size")})


def is_traced(value: Any) -> bool:
    """Whether a value is JAX's (a tracer or a device array) and therefore not known while a graph is compiled."""
    return isinstance(value, jax.Array)


def static_positions(domain: str, op_type: str) -> tuple[int, ...]:
    return STATIC.get((domain, op_type), ())


def require_static(domain: str, op_type: str, args: Sequence[Any], names: Sequence[str]) -> None:
    """UnsupportedModel when an input that must be known at trace time is traced; `names` are the values' names in the graph."""
    for position in static_positions(domain, op_type):
        if position < len(args) and is_traced(args[position]):
            raise UnsupportedModel(
                f"input {position} ({names[position]!r}) must be a constant or follow from shapes, but it is computed from "
                f"run-time values; export the model with that value fixed"
            )


def adopt(value: Any) -> Any:
    """A known numpy value as a JAX array of the type that traced values of its ONNX type have. Anything else is returned as it is."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == object:
        raise UnsupportedModel("strings cannot be computed with run-time values")
    narrow = jax.dtypes.canonicalize_dtype(value.dtype)
    if value.size > 1 and any(stride == 0 and dim > 1 for stride, dim in zip(value.strides, value.shape, strict=True)):
        # An expanded constant: broadcast it in the compiled code rather than embed every copy.
        kept = value[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in value.strides)]
        return jnp.broadcast_to(adopt(np.ascontiguousarray(kept)), value.shape)
    if narrow != value.dtype and value.dtype.kind in "iu":
        info = np.iinfo(narrow)
        value = np.clip(value, info.min, info.max)
    return jnp.asarray(value, dtype=narrow)
