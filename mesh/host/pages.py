"""Memory of large arrays: where it begins, in which pages, and how mapped files are copied so that file and copy are not in it together."""

from __future__ import annotations

import mmap
import threading
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["PIECE_BYTES", "aligned", "copy_mapped", "forget_pages", "in_large_pages"]

Array = npt.NDArray[Any]

PIECE_BYTES = 64 << 20
"""As much of a file is in memory while it is copied."""

_ALIGNMENT = 64
_LARGE_PAGE = 2 << 20
_REGION_BYTES = 32 << 20


def aligned(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """An array without values whose memory begins where XLA takes it over without another copy."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    whole = np.empty(size + _ALIGNMENT, np.uint8)
    start = -whole.__array_interface__["data"][0] % _ALIGNMENT
    return whole[start : start + size].view(dtype).reshape(shape)


class _Region:
    """Memory that arrays are cut from, one after the other. It lives as long as one of them."""

    def __init__(self, whole: Array) -> None:
        self._whole = weakref.ref(whole)
        self._next = -whole.__array_interface__["data"][0] % _LARGE_PAGE

    def cut(self, size: int) -> Array | None:
        """The next `size` bytes, or None where they are not left."""
        whole, begin = self._whole(), self._next
        if whole is None or begin + size > whole.size:
            return None
        self._next += -(-size // _ALIGNMENT) * _ALIGNMENT
        return whole[begin : begin + size]


_regions = threading.Lock()
_region: _Region | None = None


def in_large_pages(shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """An array like one of `aligned`, in pages of 2 MB where the system has them: smaller arrays share these. Weights are asked for
    ahead of their use, and a processor knows the places of only so many pages."""
    global _region
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    with _regions:
        array = None if _region is None else _region.cut(size)
        if array is None:
            whole = np.empty(max(_REGION_BYTES, size) + _LARGE_PAGE, np.uint8)  # numpy asks for large pages for so much
            _region = _Region(whole)
            array = _region.cut(size)
    assert array is not None  # a region of its own has room
    return array.view(dtype).reshape(shape)


def copy_mapped(source: Array, target: Array) -> None:
    """Copy `source` to `target` of the same shape, piece by piece; each piece's pages are dropped, if it is in a mapped file."""
    if source.ndim and source.nbytes > PIECE_BYTES:
        if source[0].nbytes > PIECE_BYTES:
            for part, into in zip(source, target, strict=True):
                copy_mapped(part, into)
            return
        height = PIECE_BYTES // source[0].nbytes
        for start in range(0, len(source), height):
            target[start : start + height] = source[start : start + height]
            forget_pages(source[start : start + height])
        return
    target[...] = source
    forget_pages(source)


def forget_pages(array: Array) -> None:
    """Let the system drop the pages of a mapped file that was read: otherwise its numbers would be in memory twice."""
    mapped: Any = array
    while mapped is not None and not isinstance(mapped, mmap.mmap):
        mapped = getattr(mapped, "base", None)
    if mapped is None or not hasattr(mapped, "madvise") or not array.flags.c_contiguous:
        return
    whole = np.frombuffer(mapped, np.uint8)
    start = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        mapped.madvise(mmap.MADV_DONTNEED, first, length)
