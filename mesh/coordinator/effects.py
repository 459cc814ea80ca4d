"""What the core wants done is passed to the part that does it.

FrameOut           nothing here: the driver has sent it already
Emit               the token's document to the client
OpenRow, CloseRow  a request or a message to a shard (shards.py)
Ask                a question to a shard (shards.py)
Happened           a line in the log, and an event of the mesh
Admitted           the session is written down from now on; the client of a stream hears that it has been accepted
Rejected           an error to the client
Ended              the last document, or an error, to the client

An effect that fails unexpectedly ends its own session, whose client gets an error. The other effects are carried out.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import assert_never

import orjson

from mesh.bus import Bus
from mesh.coordinator.continuity import Announce, Continuity
from mesh.coordinator.core.events import (
    Admitted,
    Announcement,
    CancelSession,
    CloseRow,
    Effect,
    Emit,
    Ended,
    FinishSession,
    FrameOut,
    OpenRow,
    Probe,
    Rejected,
)
from mesh.coordinator.jobs import Jobs
from mesh.coordinator.outbox import Outbox
from mesh.coordinator.shards import Shards
from mesh.coordinator.trace import Traces
from mesh.errors import MeshError, internal_error
from mesh.telemetry.seldom import Seldom

__all__ = ["Effects"]

log = logging.getLogger("mesh.coordinator")
seldom = Seldom(log)


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
        self.counters: Counter[str] = Counter()
        """effects: those that failed unexpectedly."""

    def carry_out(self, effects: list[Effect]) -> list[CancelSession | FinishSession]:
        """Do what follows from one event, in order. Returns the events that follow in turn: the ends of sessions that a stop text or a
        defect has ended."""
        following: list[CancelSession | FinishSession] = []
        for effect in effects:
            try:
                if self._do(effect):
                    following.append(FinishSession(effect.session))  # type: ignore[union-attr]  # it was an Emit
            except Exception as error:
                self.counters["effects"] += 1
                seldom.error(f"carrying out {type(effect).__name__}", error)
                session = getattr(effect, "session", None)
                if session is not None:
                    self._give_up(session, error)
                    following.append(CancelSession(session))
        return following

    def _do(self, effect: Effect) -> bool:
        """Carry out one effect; whether a stop text has ended its session."""
        match effect:
            case FrameOut():
                pass
            case Emit():
                return self._emit(effect)
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
                self._rejected(effect)
            case Ended():
                self._ended(effect)
            case _:
                assert_never(effect)
        return False

    def _give_up(self, session: str, error: Exception) -> None:
        """Tell the client of a session that it ends over a defect. Nothing of it is kept."""
        job = self._jobs.table.pop(session, None)
        if job is None:
            return
        try:
            self._outbox.error(job.reply, internal_error(error), job.epoch, job.id)
            self._continuity.end(job, None)
        except Exception as another:
            seldom.error(f"giving up session {session}", another)

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

    def _rejected(self, effect: Rejected) -> None:
        self._note_defect(effect.error)
        job = self._jobs.table.pop(effect.session, None)
        if job is not None:
            self._outbox.error(job.reply, effect.error, job.epoch, job.id)

    @staticmethod
    def _note_defect(error: MeshError | None) -> None:
        """Log a defect that the core has met and counted."""
        if error is not None and error.__cause__ is not None:
            seldom.error("a session ends over a defect", error.__cause__)

    def _ended(self, effect: Ended) -> None:
        self._note_defect(effect.error)
        self._traces.end(effect)
        job = self._jobs.table.get(effect.session)
        if job is None:
            return
        if effect.error is not None:
            del self._jobs.table[effect.session]
            self._outbox.error(job.reply, effect.error, job.epoch, job.id)
            self._continuity.end(job, None)
            return
        answer = orjson.dumps(job.finished(effect))
        self._continuity.end(job, answer)
        self._jobs.remember(job, answer)
        self._outbox.message(job.reply, answer)
        del self._jobs.table[effect.session]
