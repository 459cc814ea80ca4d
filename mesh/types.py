"""Names shared by every part. Imports nothing of mesh."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LayerRange"]


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
