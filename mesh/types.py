"""Names shared by every part. Imports nothing of mesh but its errors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mesh.errors import BadRequest

__all__ = ["CacheDType", "DType", "LayerRange", "Progress", "even_ranges", "no_progress"]

DType = Literal["float32", "bfloat16", "float16"]
"""The name of an element type that a model computes in. mesh/dtypes.py has the numpy type of each."""

CacheDType = Literal["float32", "bfloat16", "float16", "int8"]
"""The name of a type that keys and values are held in."""

Progress = Callable[[str, int, int], None]
"""Called with (what, done, total) as long work goes on."""


def no_progress(what: str, done: int, total: int) -> None:
    """A Progress that does nothing."""


@dataclass(frozen=True, order=True, slots=True)
class LayerRange:
    """Half-open range of decoder layers [start, stop)."""

    start: int
    stop: int

    def __str__(self) -> str:
        return f"{self.start}-{self.stop}"

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(range(self.start, self.stop))

    def widened(self, overlap: int, layers: int) -> LayerRange:
        """This range and `overlap` layers on either side, as far as a model of so many `layers` has them: what a shard holds."""
        return LayerRange(max(0, self.start - overlap), min(layers, self.stop + overlap))


def even_ranges(layers: int, shards: int) -> list[LayerRange]:
    """Layers 0 .. layers cut into `shards` contiguous ranges whose lengths differ by at most one. BadRequest: that many shards cannot
    share them.

    The longer ranges are in the middle, because the first range holds the embedding as well and the last one the head.
    """
    if not 1 <= shards <= layers:
        raise BadRequest(f"{shards} shards cannot share {layers} layers: give 1 to {layers}", field="shards")
    short, longer = divmod(layers, shards)
    first_longer = (shards - longer) // 2
    ranges, start = [], 0
    for index in range(shards):
        stop = start + short + (first_longer <= index < first_longer + longer)
        ranges.append(LayerRange(start, stop))
        start = stop
    return ranges
