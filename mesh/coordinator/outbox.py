"""What goes out, in one queue and in that order: frames to the first stage, documents to clients, messages to shards.

`send_now` writes as much as it can without waiting; `send` waits where the connection is slow. Only one of them works at a time, so the
order holds whichever is called.

The records' rule: a token counts as delivered only once its document has been handed to the connection. NATS keeps the order of a
connection, and a session's record is written after that. So a coordinator that takes the session over may repeat a document, but never
skips one.

Every token document carries a reply subject that no process uses. When the client's own subject has no subscriber any more, the server
answers on that reply subject, and the coordinator cancels the request (intake.py).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from mesh.bus import Bus
from mesh.bus.connection import reply_error
from mesh.coordinator.core.events import FrameOut
from mesh.coordinator.replies import Job
from mesh.coordinator.translate import frame_of
from mesh.errors import MeshError, internal_error
from mesh.protocol import frame_codec, topics
from mesh.protocol.frame import traced_headers
from mesh.protocol.frame_codec import Flags
from mesh.protocol.headers import EPOCH_HEADER, REQUEST_HEADER
from mesh.telemetry.seldom import Seldom

__all__ = ["Outbox"]

log = logging.getLogger("mesh.coordinator")
seldom = Seldom(log)


@dataclass(frozen=True, slots=True)
class _Outgoing:
    subject: str
    data: bytes
    reply: str = ""
    headers: dict[str, str] | None = None
    token_of: tuple[Job, int] | None = None  # the message is the document of this job's token, counted from 0


class _Clock(Protocol):
    def traceparent(self, out: FrameOut) -> str | None: ...

    def sent(self, frame: int) -> None: ...


class Outbox:
    """`name` is this coordinator's name, `instance` its process: shards know it by that alone, so that two coordinators of one name do not
    meet there. `flags`: how hidden states travel. `clock.sent` is called just before a frame is written;
    `clock.traceparent` says whether its step is traced.
    `frame_lost` is called with the number of a frame that could not be sent, and with the error that its sessions end with, if they do.
    `failed`: messages and frames that could not be made."""

    def __init__(
        self,
        bus: Bus,
        *,
        model: str,
        model_hash: str,
        name: str,
        instance: str,
        flags: Flags,
        clock: _Clock,
        frame_lost: Callable[[int, MeshError | None], None],
    ) -> None:
        self.bus = bus
        self.unheard = bus.new_inbox()
        """UNHEARD.ID is where the server says that the client of a session no longer listens. ID is the public id: clients see it."""
        self._model = model
        self._model_hash = model_hash
        self._name = name
        self._instance = instance
        self._flags = flags
        self._clock = clock
        self._frame_lost = frame_lost
        self._queue: deque[_Outgoing | FrameOut] = deque()
        self._sending = False
        self.failed = 0

    def __len__(self) -> int:
        return len(self._queue)

    # -- putting in ----------------------------------------------------------------------------------------------------

    def frames(self, frames: Iterable[FrameOut]) -> None:
        self._queue.extend(frames)

    def message(self, subject: str, data: bytes) -> None:
        """Send a message that no process answers."""
        self._queue.append(_Outgoing(subject, data))

    def accepted(self, job: Job) -> None:
        """Tell the client of a stream which coordinator has its request, and send the token documents that it does not have yet."""
        job.accepted = True
        self.document(job, job.acceptance(self._model, topics.CANCEL.at(self._model, self._name).subject))
        for index, document in job.documents():
            self.document(job, document, index)
        if job.wait is not None:
            self.document(job, job.wait)

    def waiting(self, job: Job, document: bytes | None) -> None:
        """Tell the client of a stream why its request waits. None: it waits no longer."""
        job.wait = document
        if document is not None and job.accepted:
            self.document(job, document)

    def document(self, job: Job, document: bytes, index: int | None = None) -> None:
        """A document of a stream before the last one. `index`: it is the document of this token."""
        token_of = None if index is None else (job, index)
        self._queue.append(_Outgoing(job.reply, document, f"{self.unheard}.{job.id}", token_of=token_of))

    def error(self, reply: str, error: MeshError, epoch: int, id: str) -> None:
        """An error as the last message to a client. `id`: the public id of its request."""
        data, headers = reply_error(error)
        self._queue.append(_Outgoing(reply, data, headers={**headers, EPOCH_HEADER: str(epoch), REQUEST_HEADER: id}))

    # -- sending -------------------------------------------------------------------------------------------------------

    def send_now(self) -> None:
        """Send in order, up to the first message that cannot be written at once."""
        while self._queue and not self._sending:
            item = self._queue.popleft()
            try:
                subject, data, reply, headers = self._encoded(item)
                if isinstance(item, FrameOut):
                    written = self.bus.post_now(subject, data, headers=headers) or self.bus.post(subject, data, headers=headers)
                else:  # an error's headers hold text, which nats-py checks
                    written = headers is None and self.bus.post(subject, data, reply=reply)
                if not written:
                    self._queue.appendleft(item)
                    return
            except Exception as error:
                self._not_sent(item, error)
            else:
                self._sent(item)

    async def send(self) -> None:
        """Send everything, in order; at once where another task is sending already."""
        if self._sending:
            return
        self._sending = True
        try:
            while self._queue:
                item = self._queue.popleft()
                try:
                    subject, data, reply, headers = self._encoded(item)
                    await self.bus.publish(subject, data, reply=reply, headers=headers)
                except Exception as error:
                    self._not_sent(item, error)
                else:
                    self._sent(item)
        finally:
            self._sending = False

    def _encoded(self, item: _Outgoing | FrameOut) -> tuple[str, bytes, str, dict[str, str] | None]:
        """(subject, data, reply, headers)"""
        if isinstance(item, _Outgoing):
            return item.subject, item.data, item.reply, item.headers
        traceparent = self._clock.traceparent(item)
        frame = frame_of(item, model_hash=self._model_hash, coordinator=self._instance, flags=self._flags, traceparent=traceparent)
        data = frame_codec.encode(frame)
        self._clock.sent(item.frame)
        return frame.subject(self._model), data, "", traced_headers(frame)

    def _sent(self, item: _Outgoing | FrameOut) -> None:
        if isinstance(item, _Outgoing) and item.token_of is not None:
            job, index = item.token_of
            if index == job.delivered:
                job.delivered += 1

    def _not_sent(self, item: _Outgoing | FrameOut, error: Exception) -> None:
        """A message that could not be sent is dropped, and a frame is lost. A frame that cannot be made ends its sessions: made again, it
        would fail again."""
        expected = isinstance(error, MeshError)
        if expected:
            log.warning("%s", error)
        else:
            self.failed += 1
            seldom.error("sending", error)
        if isinstance(item, FrameOut):
            self._frame_lost(item.frame, None if expected else internal_error(error))
