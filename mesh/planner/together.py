"""Several models on the same nodes: they are placed one after the other, each on what those before it leave. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from mesh.errors import DoesNotFit
from mesh.planner.placement import Placement
from mesh.planner.plan import plan
from mesh.planner.request import PlanRequest
from mesh.settings.units import format_bytes

__all__ = ["plan_together"]


def plan_together(requests: Sequence[PlanRequest]) -> list[Placement]:
    """A placement of each request, in order. `memory_bytes` of a node is what is left of it for that model; a note says what others take.
    DoesNotFit: those before a model leave it too few nodes."""
    placements: list[Placement] = []
    taken: Counter[str] = Counter()
    names: list[str] = []
    for request in requests:
        placement = plan(_on_what_is_left(request, taken, names)) if names else plan(request)
        if names:
            said = ", ".join(f"{node} {format_bytes(size)}" for node, size in sorted(taken.items()))
            placement = placement.model_copy(update={"notes": (*placement.notes, f"{' and '.join(names)} take {said} before")})
            placement = placement.numbered_from(1 + sum(len(each.shards) for each in placements))
        placements.append(placement)
        names.append(request.model.name)
        for shard in placement.shards:
            taken[shard.node] += shard.total_bytes
    return placements


def _on_what_is_left(request: PlanRequest, taken: Counter[str], names: Sequence[str]) -> PlanRequest:
    """The same request, for the nodes with something left, those with the most first."""
    left = [node.model_copy(update={"memory_bytes": node.memory_bytes - taken[node.name]}) for node in request.nodes]
    nodes = tuple(sorted((node for node in left if node.memory_bytes > 0), key=lambda node: -node.memory_bytes))
    if len(nodes) < request.replication_factor:
        needed, there = sum(taken.values()), sum(node.memory_bytes for node in request.nodes)
        raise DoesNotFit(
            f"{' and '.join(names)} take {format_bytes(needed)} of {format_bytes(there)}, and leave {request.model.name} "
            f"{len(nodes)} of {len(request.nodes)} nodes: give more nodes, or nodes with more memory",
            needed_bytes=needed,
            allowed_bytes=there,
        )
    return replace(request, nodes=nodes)
