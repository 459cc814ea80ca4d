"""How much the shards of one machine may take together, and the context that this leaves room for. Pure.

All processes of `mesh up` share the memory that is free. A context that was asked for is used if it fits. One that was not is the longest
for which caches and workspace take no more than CACHES of the free memory: a first try should not take half a machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mesh.errors import DoesNotFit
from mesh.model.manifest import Manifest
from mesh.model.memory import SHARED_BYTES, MemoryNeed, ModelShape, predict
from mesh.settings.units import format_bytes
from mesh.types import LayerRange

__all__ = ["Sizing", "size"]

CACHES = 1 / 8
"""The share of the free memory that caches and workspace take at most, for a context that was not asked for."""
ALL = 0.9
"""The share of the free memory that all shards take at most."""
LEAST_CONTEXT = 256


@dataclass(frozen=True, slots=True)
class Sizing:
    """`context`: positions of a row. `needed_bytes`: of all shards. `allowed_bytes`: the most that a shard of each range may take, None
    where the system does not say how much memory is free."""

    context: int
    needed_bytes: int
    allowed_bytes: tuple[int, ...] | None


def size(
    manifest: Manifest, ranges: Sequence[LayerRange], *, replicas: int, rows: int, context: int | None, available_bytes: int
) -> Sizing:
    """The context and the memory of `replicas` shards of each range. `available_bytes` 0: unknown. DoesNotFit: they need more than there
    is; the error says what would fit."""
    shape = ModelShape.of(manifest)

    def needs(positions: int) -> list[MemoryNeed]:
        return [
            predict(shape, layers, embed=layers.start == 0, head=layers.stop == manifest.layers, rows=rows, context=positions)
            for layers in ranges
        ]

    def total(positions: int) -> int:
        return SHARED_BYTES + replicas * sum(need.total_bytes - SHARED_BYTES for need in needs(positions))

    longest = min(context or manifest.context_length, manifest.context_length)
    if not available_bytes:
        return Sizing(longest, total(longest), None)
    room = ALL * available_bytes
    fixed = SHARED_BYTES + replicas * sum(need.weights_bytes + need.process_bytes - SHARED_BYTES for need in needs(longest))
    lengths = _lengths(longest)
    if context is None:
        modest = [length for length in lengths if total(length) <= min(room, fixed + CACHES * available_bytes)]
        longest = max(modest, default=lengths[-1])
    if total(longest) > room:
        raise _too_big(manifest, longest, rows, total(longest), available_bytes, [length for length in lengths if total(length) <= room])
    share = (room - SHARED_BYTES) / (total(longest) - SHARED_BYTES)
    allowed = (SHARED_BYTES + int((need.total_bytes - SHARED_BYTES) * share) for need in needs(longest))
    return Sizing(longest, total(longest), tuple(allowed))


def _lengths(longest: int) -> list[int]:
    """`longest`, and its halves down to LEAST_CONTEXT."""
    lengths = [longest]
    while lengths[-1] // 2 >= LEAST_CONTEXT:
        lengths.append(lengths[-1] // 2)
    return lengths


def _too_big(manifest: Manifest, context: int, rows: int, needed: int, available: int, fitting: Sequence[int]) -> DoesNotFit:
    better = f"give --context {fitting[0]}" if fitting else "give fewer --rows or --replicas, import at fewer bits, or use more machines"
    return DoesNotFit(
        f"the shards of {manifest.name} need {format_bytes(needed)} together, with {rows} rows of {context:,} tokens, and "
        f"{format_bytes(available)} are free on this machine: {better}",
        needed_bytes=needed,
        allowed_bytes=available,
    )
