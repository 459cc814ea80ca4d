"""Tensors on the wire: types by number, and two ways to make them smaller.

    BF16    float32 rounded to the nearest bfloat16, ties to even: half the bytes, 3 significant digits, so not exact
    ZSTD    bytes of equal significance are put together (all signs and exponents, then ...) and compressed with zstd: exact

Neither changes the values of integers. BF16 changes only float32 tensors.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, Final

import numpy as np
import zstandard

from mesh.dtypes import NUMPY_DTYPES

__all__ = ["WireError", "pack", "unpack"]

_FLOATS: Final = (NUMPY_DTYPES["float32"], NUMPY_DTYPES["bfloat16"], NUMPY_DTYPES["float16"])
_TYPES: Final[tuple[Any, ...]] = (*_FLOATS, np.dtype(np.int32), np.dtype(np.uint32), np.dtype(np.int64))
_CODES: Final = {dtype.num: code for code, dtype in enumerate(_TYPES)}  # by number, because hashing a numpy type is slow
_FLOAT32: Final = 0
_BFLOAT16: Final = NUMPY_DTYPES["bfloat16"]
_LEVEL = 1
_SMALL = 65536  # bytes: below this, copying is faster than making a view


class WireError(ValueError):
    """A tensor contradicts its entry in the table."""


def pack(tensor: np.ndarray, *, bf16: bool, zstd: bool) -> tuple[int, Any]:
    """(type number of the tensor before BF16, bytes-like body)."""
    dtype = tensor.dtype
    code = _CODES.get(dtype.num)
    if code is None or not dtype.isnative:
        raise ValueError(f"a tensor of {tensor.dtype} does not travel: {', '.join(map(str, _TYPES))} do")
    if bf16 and code == _FLOAT32:
        tensor = tensor.astype(_BFLOAT16)
    if not tensor.flags.c_contiguous:
        tensor = np.ascontiguousarray(tensor)
    if not zstd:
        return code, tensor.tobytes() if tensor.nbytes <= _SMALL else tensor.reshape(-1).view(np.uint8).data
    planes = tensor.reshape(-1).view(np.uint8).reshape(-1, tensor.dtype.itemsize).T if tensor.size else tensor
    # Two threads must not share a compressor, and making one costs less than compressing.
    return code, zstandard.ZstdCompressor(level=_LEVEL, write_content_size=True).compress(np.ascontiguousarray(planes).tobytes())


def unpack(code: int, shape: tuple[int, ...], data: bytes, at: int, stored: int, *, bf16: bool, zstd: bool, limit_bytes: int) -> np.ndarray:
    """The tensor of `shape` in data[at : at + stored]. WireError: there is none. It is read-only if it shares the memory of `data`."""
    dtype, travels, count, expected, extent = _as_sent(code, shape, bf16)
    if extent > limit_bytes:
        raise WireError(f"a tensor {shape} of {travels}, where {limit_bytes:,} bytes are the most")
    if not zstd:
        if stored != expected:
            raise WireError(f"{stored:,} bytes for a tensor {shape} of {travels}")
        flat = np.frombuffer(data, travels, count, at)
        if travels is dtype:
            return flat.reshape(shape)
    else:
        flat = _inflate(memoryview(data)[at : at + stored], expected, travels)
    return flat.reshape(shape).astype(dtype, copy=False)


@lru_cache(maxsize=256)
def _as_sent(code: int, shape: tuple[int, ...], bf16: bool) -> tuple[Any, Any, int, int, int]:
    """(type, type on the wire, elements, bytes on the wire, the same without sizes of zero). Cached, because they are the same for frame
    after frame."""
    if code >= len(_TYPES):
        raise WireError(f"tensor type {code}")
    travels = _BFLOAT16 if bf16 and code == _FLOAT32 else _TYPES[code]
    count = math.prod(shape)
    extent = math.prod([max(size, 1) for size in shape]) * travels.itemsize
    return _TYPES[code], travels, count, count * travels.itemsize, extent


def _inflate(body: memoryview, expected: int, dtype: Any) -> np.ndarray:
    try:
        if zstandard.frame_content_size(body) != expected:  # never decompress more than the table says
            raise WireError("a compressed tensor of another size than its shape's")
        raw = zstandard.ZstdDecompressor().decompress(body, max_output_size=expected) if expected else b""
    except zstandard.ZstdError as error:
        raise WireError(f"a compressed tensor that does not unfold ({error})") from None
    if len(raw) != expected:
        raise WireError("a compressed tensor of another size than its shape's")
    return np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(dtype.itemsize, -1).T).reshape(-1).view(dtype)
