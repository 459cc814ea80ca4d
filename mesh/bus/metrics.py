"""The metrics of a connection to NATS."""

from __future__ import annotations

from collections.abc import Iterator

from mesh.bus.connection import Bus
from mesh.telemetry.registry import Reading

__all__ = ["connection_readings"]


def connection_readings(name: str, bus: Bus) -> Iterator[Reading]:
    """What a process reports of its connection `bus`, under the connection's `name`."""
    yield "mesh_nats_connected", bus.connected, name
    yield "mesh_nats_reconnects_total", bus.counters["reconnects"], name
    for kind in ("dropped", "handler_errors", "task_failures", "rejected"):
        yield "mesh_nats_errors_total", bus.counters[kind], name, kind
    yield "mesh_nats_errors_total", bus.refused_replies, name, "refused_replies"
