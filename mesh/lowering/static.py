"""Which values are known when a graph is compiled, and what becomes of known values that meet traced ones.

XLA compiles for fixed shapes. An input that decides a shape (or which code runs) must therefore be a numpy value at trace
time: a constant, or computed from constants and shapes. Each op names those inputs where it is registered
(mesh/lowering/registry.py). Such values are exact: int64 stays int64.

Where a known value meets a traced one it becomes an array of JAX's types: without x64, int64 becomes int32 and float64
becomes float32. Values outside int32 saturate (the "to the end" and "minus infinity" idioms of exporters keep their meaning).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh.errors import UnsupportedModel

__all__ = ["adopt", "is_traced", "require_static"]


def is_traced(value: Any) -> bool:
    """Whether a value is JAX's (a tracer or a device array) and therefore not known while a graph is compiled."""
    return isinstance(value, jax.Array)


def require_static(positions: Iterable[int], args: Sequence[Any], names: Sequence[str]) -> None:
    """UnsupportedModel when an input at one of `positions` is traced; `names` are the values' names in the graph."""
    for position in positions:
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
