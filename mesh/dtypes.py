"""The element types of a model's arithmetic, as numpy knows them. Apart from mesh/types.py so that not everyone imports numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import ml_dtypes
import numpy as np

from mesh.types import CacheDType, DType

__all__ = ["CACHE_DTYPES", "INT8_SCALE", "NUMPY_DTYPES", "cache_width"]

NUMPY_DTYPES: Final[Mapping[DType, np.dtype[Any]]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""Types of the hidden state and of all arithmetic, by the names that manifests use."""

CACHE_DTYPES: Final[Mapping[CacheDType, np.dtype[Any]]] = {
    "float32": NUMPY_DTYPES["float32"],
    "bfloat16": NUMPY_DTYPES["bfloat16"],
    "float16": NUMPY_DTYPES["float16"],
    "int8": np.dtype(np.int8),
}
"""Types of the KV cache. Of int8 each key and each value of a head is whole numbers from -127 to 127, and then their scale."""

INT8_SCALE: Final = 4
"""Elements of an int8 cache that hold a scale: the bytes of a float32."""


def cache_width(dtype: CacheDType, dim: int) -> int:
    """Elements of the cache for a key or value of `dim` numbers."""
    return dim + INT8_SCALE if dtype == "int8" else dim
