"""What JetStream says of its storage: how much the account takes, and how full the streams of the mesh are."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, field
from typing import Final

from mesh.bus.connection import Bus
from mesh.bus.inspect import jetstream_facts, stream_facts
from mesh.errors import MeshError
from mesh.protocol import subjects

__all__ = ["Storage", "StorageWatch", "StreamSize"]

log = logging.getLogger("mesh.bus")

EVERY_S: Final = 15.0
_STREAMS: Final = (
    f"KV_{subjects.KV_SESSIONS}",
    f"KV_{subjects.KV_SHARDS}",
    f"KV_{subjects.KV_BATCHES}",
    f"KV_{subjects.KV_RESPONSES}",
    subjects.STREAM_BATCH,
    subjects.STREAM_DEAD,
    subjects.STREAM_EVENTS,
)


@dataclass(frozen=True, slots=True)
class StreamSize:
    """limit_bytes: at this size the stream refuses writes; None: it has no limit, or drops what is old."""

    messages: int
    size_bytes: int
    limit_bytes: int | None


@dataclass(frozen=True, slots=True)
class Storage:
    """`reachable`: JetStream answered. limit_bytes: None where the account has no limit. streams: those that exist."""

    reachable: bool = False
    size_bytes: int = 0
    limit_bytes: int | None = None
    streams: dict[str, StreamSize] = field(default_factory=dict)


class StorageWatch:
    """`latest` is None before the first answer, or failure. `run` asks every EVERY_S seconds."""

    def __init__(self, bus: Bus) -> None:
        self.latest: Storage | None = None
        self._bus = bus

    async def run(self) -> None:
        """Ask again and again, until cancelled."""
        while True:
            try:
                self.latest = await self.look()
            except MeshError as error:
                log.debug("asking JetStream about its storage: %s", error)
                self.latest = Storage()
            await asyncio.sleep(EVERY_S)

    async def look(self) -> Storage:
        """What JetStream says now. ServiceError, Unavailable, DeadlineExceeded: it does not answer."""
        account = await jetstream_facts(self._bus)
        streams: dict[str, StreamSize] = {}
        for name in _STREAMS:
            facts = await stream_facts(self._bus, name)
            if facts is not None:
                streams[name] = StreamSize(facts.messages, facts.bytes, _limit(facts.max_bytes) if facts.refuses else None)
        return Storage(True, account.storage_bytes, _limit(account.storage_limit_bytes), streams)


def _limit(size: int) -> int | None:
    return size if size > 0 else None
