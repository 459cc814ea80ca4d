"""The element types of a model's arithmetic, as numpy knows them. Apart from mesh/types.py so that not everyone imports numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import ml_dtypes
import numpy as np

from mesh.types import DType

__all__ = ["NUMPY_DTYPES"]

NUMPY_DTYPES: Final[Mapping[DType, np.dtype[Any]]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""Types of the hidden state, of the KV cache and of all arithmetic between them, by the names that manifests use."""
