"""What the core wants done is passed to the part that does it.

FrameOut           nothing here: the driver has sent it already
Emit               the token's document to the client
OpenRow, CloseRow  a request or a message to a shard (shards.py)
Ask                a question to a shard (shards.py)
Happened           a line in the log, and an event of the mesh
Admitted           the session is written down from now on; then the client of a stream hears that it has been accepted
Rejected           an error to the client
Ended              the last document, or an error, to the client
Waits              the client of a stream hears which layers are missing; the session's record has how long it has waited
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial
from typing import assert_never

import orjson

from mesh.bus import Bus
from mesh.coordinator.continuity import Announce, Continuity
from mesh.coordinator.core.events import Admitted, Announcement, CloseRow, Effect, Emit, Ended, FrameOut, OpenRow, Probe, Rejected, Waits
from mesh.coordinator.jobs import Jobs
from mesh.coordinator.outbox import Outbox
from mesh.coordinator.replies import Job
from mesh.coordinator.shards import Shards
from mesh.coordinator.trace import Traces
from mesh.errors import Unavailable
from mesh.protocol.stream import fitted

__all__ = ["Effects"]

log = logging.getLogger("mesh.coordinator")

_FIRST_WRITE_S = 0.5
"""A stream's first document waits for the first write of the session's record, but no longer than this."""


class Effects:
    """See the module's docstring."""

    def __init__(
        self, bus: Bus, jobs: Jobs, outbox: Outbox, shards: Shards, continuity: Continuity, traces: Traces, announce: Announce
    ) -> None:
        self._bus = bus
        self._jobs = jobs
        self._outbox = outbox
        self._shards = shards
        self._continuity = continuity
        self._traces = traces
        self._announce = announce

    def carry_out(self, effects: list[Effect]) -> list[str]:
        """Do what follows from one event, in order. Returns the sessions that a stop text has ended."""
        stopped: list[str] = []
        for effect in effects:
            match effect:
                case FrameOut():
                    pass
                case Emit():
                    if self._emit(effect):
                        stopped.append(effect.session)
                case OpenRow():
                    self._bus.spawn(self._shards.open(effect), "opening a row")
                case CloseRow():
                    self._shards.close(effect)
                case Probe():
                    self._bus.spawn(self._shards.probe(effect), "probing a shard")
                case Announcement(kind, who, detail):
                    log.info("%s %s: %s", who, kind, detail)
                    self._announce(kind, who, detail)
                case Admitted():
                    self._admitted(effect)
                case Rejected():
                    job = self._jobs.table.pop(effect.session)
                    self._outbox.error(job.reply, effect.error, job.epoch)
                case Ended():
                    self._ended(effect)
                case Waits():
                    self._waits(effect)
                case _:
                    assert_never(effect)
        return stopped

    def _emit(self, effect: Emit) -> bool:
        """Take a token; whether a stop text is complete with it."""
        job = self._jobs.table.get(effect.session)
        if job is None or job.stopped:
            return False
        document, stopped = job.push(effect.token)
        job.wait = None
        self._continuity.recorder.touch(effect.session)
        if job.accepted and job.message.stream and document is not None:
            self._outbox.document(job, document, len(job.tokens) - 1)
        return stopped

    def _admitted(self, effect: Admitted) -> None:
        job = self._jobs.table[effect.session]
        recorder = self._continuity.recorder
        job.recorded = bool(job.revision)
        if job.recorded or not recorder.answering or not job.message.stream:
            self._continuity.keep(job)
            if job.message.stream:
                self._outbox.accepted(job)
        else:
            late = asyncio.get_running_loop().call_later(_FIRST_WRITE_S, self._not_recorded, job)
            self._continuity.keep(job, partial(self._recorded, job, late))
        request = job.request
        self._traces.begin(request.id, len(request.prompt), request.max_tokens, now=job.began, unix_s=time.time())

    def _recorded(self, job: Job, late: asyncio.TimerHandle, there: bool) -> None:
        """The first write of a session's record is over."""
        late.cancel()
        job.recorded = there
        self._accept(job)

    def _not_recorded(self, job: Job) -> None:
        """The first write takes too long to be waited for."""
        self._continuity.recorder.slow()
        self._accept(job)

    def _accept(self, job: Job) -> None:
        if job.accepted or self._jobs.table.get(job.request.id) is not job:
            return
        self._outbox.accepted(job)
        self._outbox.send_now()
        if self._outbox:
            self._bus.spawn(self._outbox.send(), "sending")

    def _waits(self, effect: Waits) -> None:
        job = self._jobs.table.get(effect.session)
        if job is None:
            return
        self._continuity.recorder.touch(effect.session)
        if job.message.stream:
            missing = tuple(map(str, effect.missing))
            self._outbox.waiting(job, job.waiting(effect.place, missing, effect.waited_s, effect.patience_s))

    def _ended(self, effect: Ended) -> None:
        self._traces.end(effect)
        job = self._jobs.table.pop(effect.session, None)
        if job is None:
            return
        if effect.error is not None:
            self._outbox.error(job.reply, effect.error, job.epoch)
            if effect.reason == "cancelled" and isinstance(effect.error, Unavailable):  # the client has left
                self._continuity.park(job)
            else:
                self._continuity.end(job, None)
            return
        if job.message.stream and not job.accepted:
            self._outbox.accepted(job)
        document = fitted(job.finished(effect), self._bus.max_payload)
        answer, whole = orjson.dumps(document), "omitted" not in document
        self._continuity.end(job, answer if whole else None)
        self._jobs.remember(job, answer, whole=whole)
        self._outbox.message(job.reply, answer)
