"""Whether the mesh can do without a shard, and what to start first where it cannot.

A shard that drains, or that is to serve another range, asks the others for their leases over plain NATS. Where none of them can take the
place of this one, the request is refused, unless it says `force`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Final

from mesh.bus import Bus, ModelStore
from mesh.errors import BadRequest, MeshError, MessageRejected
from mesh.protocol import topics
from mesh.protocol.status import ShardLease
from mesh.settings.units import format_bytes
from mesh.types import LayerRange

__all__ = ["can_replace", "others", "refuse_gap"]

_STORE_S: Final = 2.0


async def others(bus: Bus, mine: ShardLease) -> list[ShardLease]:
    """The leases of the shards of the same model that answer, but for this one's."""
    found = []
    for answer in await bus.gather(topics.LEASES.at().subject):
        try:
            lease = ShardLease.parse(answer.data)
        except MessageRejected:  # another version's
            continue
        if lease.model_hash == mine.model_hash and lease.shard != mine.shard:
            found.append(lease)
    return found


def can_replace(others: Sequence[ShardLease], layers: LayerRange, total_layers: int) -> bool:
    """Whether sessions find a way past a shard of `layers`: through others from where it begins to where it ends, or through others
    alone."""
    ready = [lease.layers for lease in others if lease.state == "ready"]
    return _reaches(ready, layers.start, layers.stop) or _reaches(ready, 0, total_layers)


def _reaches(ranges: Iterable[LayerRange], start: int, stop: int) -> bool:
    reached = {start}
    for layers in sorted(ranges, key=lambda layers: layers.start):
        if layers.start in reached:
            reached.add(layers.stop)
    return stop in reached


async def refuse_gap(bus: Bus, mine: ShardLease, needed_bytes: int, doing: str) -> None:
    """BadRequest, naming the range and what to do first, where no other shard can take this one's place. `doing`: what --force does."""
    there = await others(bus, mine)
    layers = mine.layers
    if can_replace(there, layers, mine.total_layers):
        return
    join = f"`mesh join --model {mine.model} --layers {layers}` (it needs {format_bytes(needed_bytes)})"
    if not await _is_pushed(bus, mine):
        join = f"`mesh push MODEL_DIR`, since the mesh has no copy of {mine.model}, and then {join}"
    spare = next((lease for lease in there if _could_move(lease, layers, there)), None)
    load = "" if spare is None else f", or let {spare.shard} serve them with `mesh load {spare.shard} --layers {layers}`"
    raise BadRequest(
        f"layers {layers} would be without a shard: {mine.shard} is the only one that serves them. First start another one with {join}"
        f"{load}; --force {doing} all the same",
        field="force",
    )


def _could_move(lease: ShardLease, layers: LayerRange, there: Sequence[ShardLease]) -> bool:
    """Whether the shard holds `layers` too, and its own range has others."""
    holds = lease.held_start <= layers.start and layers.stop <= lease.held_end
    rest = [other for other in there if other is not lease]
    return lease.state == "ready" and holds and can_replace(rest, lease.layers, lease.total_layers)


async def _is_pushed(bus: Bus, mine: ShardLease) -> bool:
    try:
        async with asyncio.timeout(_STORE_S):
            return (await ModelStore(bus).manifest(mine.model)).model_hash == mine.model_hash
    except (MeshError, TimeoutError):
        return False
