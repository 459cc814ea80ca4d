"""Which range a new shard takes if it was given none: what the mesh lacks most and the shard's memory allows. Pure.

1. the first stretch of layers that no shard holds, as much of it as fits
2. otherwise the range with the fewest replicas; among those the one with the most load, then the longest
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mesh.errors import DoesNotFit
from mesh.settings.units import format_bytes
from mesh.types import LayerRange

__all__ = ["Held", "choose_range", "too_big"]


@dataclass(frozen=True, slots=True)
class Held:
    """A range that a shard holds, or has claimed. `load`: 0 to 1."""

    shard: str
    layers: LayerRange
    load: float = 0.0


def choose_range(total_layers: int, held: Sequence[Held], needed_bytes: Callable[[LayerRange], int], memory_bytes: int) -> LayerRange:
    """The range to take. DoesNotFit: not even the smallest useful range fits; the error has the figures."""
    gap = _first_gap(total_layers, held)
    if gap is not None:
        best = _longest_prefix(gap, needed_bytes, memory_bytes)
        if best is None:
            one = LayerRange(gap.start, gap.start + 1)
            raise too_big(f"the mesh lacks layers {one}, which", needed_bytes(one), memory_bytes)
        return best
    ranges = {item.layers for item in held}

    def rank(layers: LayerRange) -> tuple[int, float, int, int]:
        replicas = [item for item in held if item.layers == layers]
        return (len(replicas), -sum(item.load for item in replicas) / len(replicas), -len(layers), layers.start)

    fitting = [layers for layers in ranges if needed_bytes(layers) <= memory_bytes]
    if not fitting:
        smallest = min(ranges, key=needed_bytes)
        raise too_big(f"the mesh lacks layers {smallest}, which", needed_bytes(smallest), memory_bytes)
    return min(fitting, key=rank)


def _first_gap(total_layers: int, held: Sequence[Held]) -> LayerRange | None:
    covered = {layer for item in held for layer in item.layers}
    start = next((layer for layer in range(total_layers) if layer not in covered), None)
    if start is None:
        return None
    stop = next((layer for layer in range(start, total_layers) if layer in covered), total_layers)
    return LayerRange(start, stop)


def _longest_prefix(gap: LayerRange, needed_bytes: Callable[[LayerRange], int], memory_bytes: int) -> LayerRange | None:
    """The longest range from the start of `gap` that fits. Every length is tried: memory does not only grow with length, because the
    last layer brings the head with it."""
    for stop in range(gap.stop, gap.start, -1):
        layers = LayerRange(gap.start, stop)
        if needed_bytes(layers) <= memory_bytes:
            return layers
    return None


def too_big(what: str, needed: int, memory: int) -> DoesNotFit:
    """The error for a range that needs more bytes than are allowed; `what` begins the sentence."""
    return DoesNotFit(
        f"{what} need {format_bytes(needed)}, and {format_bytes(memory)} are allowed: "
        "give more with --memory, or fewer --rows or a shorter --context",
        needed_bytes=needed,
        allowed_bytes=memory,
    )
