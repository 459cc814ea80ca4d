"""Coordinators that crashed while no other one ran: the next one that starts says so.

Nobody sees the end of the only coordinator. The events of the mesh show that it joined and never left; if it does not answer either, it is
lost. Another coordinator that runs notices at once (mesh/coordinator/continuity.py).
"""

from __future__ import annotations

from typing import Final

from mesh.bus import Bus, EventLog, announce
from mesh.bus.service import endpoint_data
from mesh.errors import MeshError
from mesh.protocol.events import Event
from mesh.protocol.status import CoordinatorStats
from mesh.protocol.subjects import SERVICE_COORDINATOR

__all__ = ["never_left", "report_lost"]

_LOOKED_AT: Final = 500
"""So many events are looked through."""
_OVER: Final = ("coordinator_left", "suspected", "lost")


def never_left(events: list[Event], model: str) -> set[str]:
    """The coordinators of a model that joined, and of which nothing says that they ended."""
    found: set[str] = set()
    for event in events:
        if event.kind == "coordinator_joined" and event.model == model:
            found.add(event.who)
        elif event.kind in _OVER:
            found.discard(event.who)
    return found


async def report_lost(bus: Bus, log: EventLog, model: str, name: str) -> None:
    """Announce the coordinators of `model` that are lost. Never raises: without JetStream nothing is known of them. `name`: this one's."""
    try:
        missing = never_left([event async for event in log.events(last=_LOOKED_AT)], model) - {name}
        if missing:
            missing -= await _answering(bus)
    except MeshError:
        return
    for who in sorted(missing):
        await announce(bus, "lost", who, model=model, detail="the coordinator ended without leaving", coordinator=name)


async def _answering(bus: Bus) -> set[str]:
    """The names of the coordinators that answer."""
    found = set()
    for answer in await bus.gather(f"$SRV.STATS.{SERVICE_COORDINATOR}"):
        try:
            found.add(CoordinatorStats.parse(endpoint_data(answer.data, "generate")).coordinator)
        except MeshError:
            continue  # of another version
    return found
