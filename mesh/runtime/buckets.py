"""The few shapes that programs are compiled for. Rows, chunk and length of a step are rounded up to one of them, so that the number of
compilations is bounded."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.errors import ConfigError
from mesh.runtime.cache import SLACK, in_blocks

__all__ = ["Buckets"]

_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
_SHORT_LENGTHS = (128, 256, 512, 2048)
"""Of no use where attention reads block by block: there they would save nothing but a part of the mask."""
_LENGTH, _LENGTH_STEP = 8192, 4
_COPY, _COPY_STEP = 256, 4


@dataclass(frozen=True, slots=True)
class Buckets:
    """Sizes in ascending order; the last of each is the largest possible.

    rows: rows of a decode batch. chunks: tokens of a prefill chunk. lengths: the most cache positions that a step reads. copies: positions
    that are copied from row to row.
    """

    rows: tuple[int, ...]
    chunks: tuple[int, ...]
    lengths: tuple[int, ...]
    copies: tuple[int, ...] = ()
    exact: bool = False

    @classmethod
    def plan(cls, *, rows: int, context: int, chunk: int, exact: bool = False) -> Buckets:
        """Buckets for up to `rows` rows of `context` positions, prefilled by up to `chunk` tokens at a time. `exact`: a chunk has no
        padding, because it would get into the states of the row; it is cut into pieces of these sizes instead."""
        for name, value in (("rows", rows), ("context", context), ("chunk", chunk)):
            if value < 1:
                raise ConfigError(f"{name} is {value}: give at least 1")
        row_sizes = [size for size in _ROWS if size < rows] + [rows]
        smallest = 1 if exact else SLACK
        chunk = max(smallest, min(chunk, context))
        chunk_sizes = [smallest]
        while chunk_sizes[-1] * 4 < chunk:
            chunk_sizes.append(chunk_sizes[-1] * 4)
        if chunk > smallest:
            chunk_sizes.append(chunk)
        lengths = [] if in_blocks() else [size for size in _SHORT_LENGTHS if size < context]
        lengths += _powers(_LENGTH, _LENGTH_STEP, context)
        copies = [] if rows == 1 or exact else [*_powers(_COPY, _COPY_STEP, context), context]
        return cls(tuple(row_sizes), tuple(chunk_sizes), (*lengths, context), tuple(copies), exact)

    @staticmethod
    def fit(sizes: tuple[int, ...], value: int) -> int:
        """The smallest size that holds `value`."""
        for size in sizes:
            if value <= size:
                return size
        raise ValueError(f"{value} is over the largest bucket {sizes[-1]}")

    def chunk(self, start: int, count: int) -> int:
        """The chunk size for `count` tokens from `start` on: the smallest that holds them. If its padding would go beyond the row, or
        there may be none, a size that holds only some of them; the caller continues with the rest."""
        if self.exact:
            return max(size for size in self.chunks if size <= count)
        for size in self.chunks:
            if count <= size:
                if start + size <= self.lengths[-1] + SLACK:
                    return size
                return self.chunks[0]
        return self.chunks[-1] if start + self.chunks[-1] <= self.lengths[-1] + SLACK else self.chunks[0]


def _powers(first: int, factor: int, below: int) -> list[int]:
    sizes = []
    while first < below:
        sizes.append(first)
        first *= factor
    return sizes
