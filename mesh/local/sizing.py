"""How much the shards of one machine may take together, and the context that this leaves room for. Pure.

All processes of `mesh up` share the memory that is free. A context that was asked for is used if it fits. One that was not is the longest
for which caches and workspace take no more than CACHES of the free memory: a first try should not take half a machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mesh.errors import DoesNotFit
from mesh.model.manifest import Manifest
from mesh.model.memory import SHARED_BYTES, MemoryNeed, ModelShape, predict
from mesh.settings.units import format_bytes
from mesh.types import LayerRange

__all__ = ["Demand", "Sizing", "size_together"]

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


@dataclass(frozen=True)
class Demand:
    """A model that is to be served: `replicas` shards of each range. `context` None: as long as there is room for."""

    manifest: Manifest
    ranges: Sequence[LayerRange]
    replicas: int
    rows: int
    context: int | None

    @cached_property
    def shape(self) -> ModelShape:
        return ModelShape.of(self.manifest)

    @property
    def longest(self) -> int:
        return min(self.context or self.manifest.context_length, self.manifest.context_length)

    def needs(self, positions: int) -> list[MemoryNeed]:
        """Of a shard of each range."""
        last = self.manifest.layers
        return [
            predict(self.shape, layers, embed=layers.start == 0, head=layers.stop == last, rows=self.rows, context=positions)
            for layers in self.ranges
        ]

    def own(self, positions: int) -> int:
        """What all shards take, beside what all processes of a machine share."""
        return self.replicas * sum(need.total_bytes - SHARED_BYTES for need in self.needs(positions))

    def fixed(self, positions: int) -> int:
        """The same without caches and workspace."""
        return self.replicas * sum(need.weights_bytes + need.process_bytes - SHARED_BYTES for need in self.needs(positions))


def size_together(wanted: Sequence[Demand], *, available_bytes: int) -> tuple[Sizing, ...]:
    """The context and the memory of each model of one machine: what one takes, the others do not have. Where the room is small, the context
    of the model with the largest caches is halved first. `available_bytes` 0: unknown. DoesNotFit: they need more than there is; the error
    says what would fit."""
    contexts = [each.longest for each in wanted]

    def total() -> int:
        return SHARED_BYTES + sum(each.own(positions) for each, positions in zip(wanted, contexts, strict=True))

    if not available_bytes:
        return tuple(Sizing(each.longest, SHARED_BYTES + each.own(each.longest), None) for each in wanted)
    room = ALL * available_bytes
    fixed = SHARED_BYTES + sum(each.fixed(each.longest) for each in wanted)
    while total() > min(room, fixed + CACHES * available_bytes):
        shorter = [place for place, each in enumerate(wanted) if each.context is None and contexts[place] // 2 >= LEAST_CONTEXT]
        if not shorter:
            break
        largest = max(shorter, key=lambda place: wanted[place].own(contexts[place]) - wanted[place].fixed(contexts[place]))
        contexts[largest] //= 2
    if total() > room:
        raise _too_big(wanted, contexts, total(), available_bytes)
    share = (room - SHARED_BYTES) / (total() - SHARED_BYTES)
    return tuple(
        Sizing(
            positions,
            SHARED_BYTES + each.own(positions),
            tuple(SHARED_BYTES + int((need.total_bytes - SHARED_BYTES) * share) for need in each.needs(positions)),
        )
        for each, positions in zip(wanted, contexts, strict=True)
    )


def _too_big(wanted: Sequence[Demand], contexts: Sequence[int], needed: int, available: int) -> DoesNotFit:
    names = " and ".join(each.manifest.name for each in wanted)
    lengths = " and ".join(f"{positions:,}" for positions in dict.fromkeys(contexts))
    fitting = _fitting(wanted, contexts, ALL * available)
    fewer = "fewer models, " if len(wanted) > 1 else ""
    less = f"give {fewer}fewer --rows or --replicas, import at fewer bits, or use more machines"
    better = f"give --context {fitting}" if fitting else less
    return DoesNotFit(
        f"the shards of {names} need {format_bytes(needed)} together, with {wanted[0].rows} rows of {lengths} tokens, and "
        f"{format_bytes(available)} are free on this machine: {better}",
        needed_bytes=needed,
        allowed_bytes=available,
    )


def _fitting(wanted: Sequence[Demand], contexts: Sequence[int], room: float) -> int | None:
    """The longest context, of the halves of what was tried, with which all of them fit."""
    length = max(contexts)
    while length // 2 >= LEAST_CONTEXT:
        length //= 2
        if SHARED_BYTES + sum(each.own(min(length, each.longest)) for each in wanted) <= room:
            return length
    return None
