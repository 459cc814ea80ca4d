"""Names shared by every part. Imports nothing of mesh but its errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mesh.errors import BadRequest

__all__ = ["DType", "LayerRange", "even_ranges"]

DType = Literal["float32", "bfloat16", "float16"]
"""The name of an element type that a model computes in. mesh/dtypes.py has the numpy type of each."""


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


def even_ranges(layers: int, shards: int) -> list[LayerRange]:
    """Layers 0 .. layers cut into `shards` contiguous ranges whose lengths differ by at most one, the longer ones first."""
    if not 1 <= shards <= layers:
        raise BadRequest(f"{shards} shards cannot share {layers} layers: give 1 to {layers}", field="shards")
    bounds = [index * (layers // shards) + min(index, layers % shards) for index in range(shards + 1)]
    return [LayerRange(bounds[index], bounds[index + 1]) for index in range(shards)]
