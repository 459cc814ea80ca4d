"""The dead list: messages of a queue that no process can handle, with the reason; a stream that keeps the last ones.

    stream mesh_dead    mesh.v1.dead.MODEL; at most MAX_ENTRIES entries of at most a week. A new entry replaces the oldest one.

An entry says where the message was and what was wrong with it. It does not keep the message itself, which may be large.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

import nats.js.api
import nats.js.client
import nats.js.errors

from mesh.bus.connection import Bus
from mesh.bus.mapping import mapped
from mesh.bus.replicas import replicated
from mesh.errors import MeshError, MessageRejected
from mesh.protocol import subjects, topics
from mesh.protocol.batches import DeadMessage

__all__ = ["DeadList"]

log = logging.getLogger("mesh.bus")

MAX_ENTRIES: Final = 1000
MAX_AGE_S: Final = 7 * 86400.0
MAX_BYTES: Final = 4 * 1024 * 1024
_MAX_TEXT: Final = 512
_AT_ONCE: Final = 32
_TIMEOUT_S: Final = 5.0


class DeadList:
    """Coordinators add to it, and operators read it."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus

    async def add(self, model: str, subject: str, reason: str, size_bytes: int) -> None:
        """Note a message that was set aside. Never raises: the work goes on without the note."""
        log.warning("set aside a message of a batch of %s (%d bytes): `mesh batch dead` says which, and why", model, size_bytes)
        note = DeadMessage(subject=subject[:_MAX_TEXT], reason=reason[:_MAX_TEXT], size_bytes=size_bytes, at_unix_s=time.time())
        try:
            with mapped(f"writing to {subjects.STREAM_DEAD}"):
                try:
                    await self._publish(model, note)
                except nats.js.errors.NoStreamResponseError:
                    await replicated(self._bus, self._make)
                    await self._publish(model, note)
        except MeshError as error:
            log.warning("%s", error)

    async def entries(self, *, last: int = 100) -> list[DeadMessage]:
        """The `last` so many entries, the oldest first. An entry that cannot be read is left out."""
        js = self._js
        with mapped(f"reading {subjects.STREAM_DEAD}"):
            try:
                state = (await js.stream_info(subjects.STREAM_DEAD)).state
            except nats.js.errors.NotFoundError:
                return []
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(sequence: int) -> DeadMessage | None:
            async with gate:
                try:
                    with mapped(f"reading {subjects.STREAM_DEAD}"):
                        return DeadMessage.parse((await js.get_msg(subjects.STREAM_DEAD, seq=sequence)).data or b"")
                except (MessageRejected, nats.js.errors.NotFoundError):
                    return None

        first = max(state.first_seq, state.last_seq - last + 1, 1)
        found = await asyncio.gather(*(one(sequence) for sequence in range(first, state.last_seq + 1)))
        return [entry for entry in found if entry is not None]

    @property
    def _js(self) -> nats.js.client.JetStreamContext:
        return self._bus.client.jetstream(timeout=_TIMEOUT_S)

    async def _publish(self, model: str, note: DeadMessage) -> None:
        await self._js.publish(topics.DEAD.at(model).subject, note.to_bytes(), stream=subjects.STREAM_DEAD)

    async def _make(self, replicas: int) -> None:
        await self._js.add_stream(
            name=subjects.STREAM_DEAD,
            subjects=[topics.DEAD.any().subject],
            max_age=MAX_AGE_S,
            max_msgs=MAX_ENTRIES,
            max_bytes=MAX_BYTES,
            discard=nats.js.api.DiscardPolicy.OLD,
            storage=nats.js.api.StorageType.FILE,
            num_replicas=replicas,
        )
