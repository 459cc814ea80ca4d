"""What the core wants done is passed to the part that does it.

FrameOut           nothing here: the driver has sent it already
Emit               the token's document to the client
OpenRow, CloseRow  a request or a message to a shard (shards.py)
Ask                a question to a shard (shards.py)
Happened           a line in the log, and an event of the mesh
Admitted           the session is written down from now on; the client of a stream hears that it has been accepted
Rejected           an error to the client
Ended              the last document, or an error, to the client
Waits              the client of a stream hears which layers are missing; the session's record has how long it has waited
"""

from __future__ import annotations

import logging
import time
from typing import assert_never

import orjson

from mesh.bus import Bus
from mesh.coordinator.continuity import Announce, Continuity
from mesh.coordinator.core.events import Admitted, Announcement, CloseRow, Effect, Emit, Ended, FrameOut, OpenRow, Probe, Rejected, Waits
from mesh.coordinator.jobs import Jobs
from mesh.coordinator.outbox import Outbox
from mesh.coordinator.shards import Shards
from mesh.coordinator.trace import Traces

__all__ = ["Effects"]

log = logging.getLogger("mesh.coordinator")


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
        self._continuity.recorder.touch(effect.session)
        if job.message.stream and document is not None:
            self._outbox.document(job, document, len(job.tokens) - 1)
        return stopped

    def _admitted(self, effect: Admitted) -> None:
        job = self._jobs.table[effect.session]
        self._continuity.keep(job)
        request = job.request
        self._traces.begin(request.id, len(request.prompt), request.max_tokens, now=job.began, unix_s=time.time())
        if job.message.stream:
            self._outbox.accepted(job)

    def _waits(self, effect: Waits) -> None:
        job = self._jobs.table.get(effect.session)
        if job is None:
            return
        self._continuity.recorder.touch(effect.session)
        if job.message.stream:
            missing = tuple(map(str, effect.missing))
            self._outbox.document(job, job.waiting(effect.place, missing, effect.waited_s, effect.patience_s))

    def _ended(self, effect: Ended) -> None:
        self._traces.end(effect)
        job = self._jobs.table.pop(effect.session, None)
        if job is None:
            return
        if effect.error is not None:
            self._outbox.error(job.reply, effect.error, job.epoch)
            self._continuity.end(job, None)
            return
        answer = orjson.dumps(job.finished(effect))
        self._continuity.end(job, answer)
        self._jobs.remember(job, answer)
        self._outbox.message(job.reply, answer)
