"""What the functions of ops share: numpy or jax.numpy by the kind of the arguments, ONNX types, axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from onnx import helper

from mesh.errors import UnsupportedModel
from mesh.lowering.static import is_traced

__all__ = ["Array", "array_namespace", "axes_of", "int64", "is_float", "numpy_type", "positive_axis", "type_of", "wide"]

Array = Any  # a numpy array or a JAX one


def array_namespace(*args: Any) -> Any:
    """jax.numpy when an argument is traced, numpy otherwise."""
    return jnp if any(is_traced(arg) for arg in args) else np


def numpy_type(onnx_type: int) -> np.dtype[Any]:
    """ONNX's TensorProto.DataType as a numpy type (ml_dtypes for the small ones)."""
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(onnx_type))
    except (KeyError, ValueError):
        raise UnsupportedModel(f"tensor type {onnx_type} is not known") from None


def type_of(onnx_type: int, xp: Any) -> np.dtype[Any]:
    """The type that values of an ONNX type have in `xp`: JAX without x64 has 32 bits for 64."""
    dtype = numpy_type(onnx_type)
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype)) if xp is jnp else dtype


def int64(xp: Any) -> np.dtype[Any]:
    """The type of ONNX's int64 in `xp`."""
    return np.dtype(jax.dtypes.canonicalize_dtype(np.int64)) if xp is jnp else np.dtype(np.int64)


def is_float(dtype: Any) -> bool:
    """Whether it is a floating-point type, the ml_dtypes ones included."""
    return bool(jnp.issubdtype(dtype, jnp.floating))


def wide(dtype: Any) -> np.dtype[Any]:
    """The type to accumulate in: float32 for 16 bits and less, the type itself otherwise."""
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if is_float(dtype) and dtype.itemsize < 4 else dtype


def positive_axis(axis: int, rank: int) -> int:
    """`axis` counted from the front."""
    if not -rank <= axis < max(rank, 1):
        raise UnsupportedModel(f"axis {axis} of a tensor of rank {rank}")
    return axis + rank if axis < 0 else axis


def axes_of(axes: Any, rank: int) -> tuple[int, ...]:
    """Axes (numpy, tuple or scalar) counted from the front."""
    values: Sequence[int] = np.atleast_1d(np.asarray(axes, dtype=np.int64)).tolist()
    return tuple(positive_axis(int(axis), rank) for axis in values)
