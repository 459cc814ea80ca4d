"""What the core wants done is passed to the part that does it.

FrameOut           nothing here: the driver has sent it already
Emit               the token's document to the client
OpenRow, CloseRow  a request or a message to a shard (shards.py)
Probe              a question to a shard (shards.py)
PrefixKept         a message to the other coordinators, where there are any (kept.py)
Announcement       a line in the log, and an event of the mesh
Admitted           the session is written down from now on; then the client of a stream hears that it has been accepted
Rejected           an error to the client
Ended              the last document, or an error, to the client
Waits              the client of a stream hears which layers are missing; the session's record has how long it has waited

An effect that fails unexpectedly ends its own session, whose client gets an error. The other effects are carried out.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from functools import partial
from typing import assert_never

import orjson

from mesh.bus import Bus
from mesh.coordinator.access import log_ended, log_rejected
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
    PrefixKept,
    Probe,
    Rejected,
    Waits,
)
from mesh.coordinator.generations import GenerationMeter
from mesh.coordinator.jobs import Jobs
from mesh.coordinator.kept import KeptPrefixes
from mesh.coordinator.outbox import Outbox
from mesh.coordinator.replies import Job
from mesh.coordinator.shards import Shards
from mesh.coordinator.tracing import Tracing
from mesh.coordinator.translate import HiddenState
from mesh.errors import MeshError, Unavailable, internal_error
from mesh.protocol.generation import public_id
from mesh.protocol.stream import fitted
from mesh.telemetry.seldom import Seldom

__all__ = ["Effects"]

log = logging.getLogger("mesh.coordinator")
seldom = Seldom(log)

_FIRST_WRITE_S = 0.5
"""A stream's first document waits for the first write of the session's record, but no longer than this."""


class Effects:
    """See the module's docstring."""

    def __init__(
        self,
        bus: Bus,
        jobs: Jobs,
        outbox: Outbox,
        shards: Shards,
        continuity: Continuity,
        tracing: Tracing,
        announce: Announce,
        generations: GenerationMeter,
        kept: KeptPrefixes,
    ) -> None:
        self._bus = bus
        self._jobs = jobs
        self._outbox = outbox
        self._shards = shards
        self._continuity = continuity
        self._tracing = tracing
        self._announce = announce
        self._generations = generations
        self._kept = kept
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
        self._shards.send_closes()
        return following

    def _do(self, effect: Effect) -> bool:
        """Carry out one effect; whether a stop text has ended its session."""
        match effect:
            case FrameOut():
                pass
            case Emit():
                return self._emit(effect)
            case OpenRow():
                self._shards.open(effect)
            case CloseRow():
                self._shards.close(effect)
            case Probe():
                self._bus.spawn(self._shards.probe(effect), "probing a shard")
            case PrefixKept():
                self._kept.tell(effect)
            case Announcement(kind, who, detail):
                log.info("%s %s: %s", who, kind, detail)
                self._announce(kind, who, detail)
            case Admitted():
                self._admitted(effect)
            case Rejected():
                self._rejected(effect)
            case Ended():
                self._ended(effect)
            case Waits():
                self._waits(effect)
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
            seldom.error(f"giving up request {public_id(session)}", another)

    def _emit(self, effect: Emit) -> bool:
        """Take a token; whether a stop text is complete with it."""
        job = self._jobs.table.get(effect.session)
        if job is None or job.stopped:
            return False
        if isinstance(effect.token, HiddenState):
            job.state = effect.token.values.tolist()
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
        self._tracing.begin(job)

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

    def _rejected(self, effect: Rejected) -> None:
        self._note_defect(effect.error)
        job = self._jobs.table.pop(effect.session, None)
        self._generations.rejected(effect.error, job)
        self._tracing.traces.forget(effect.session)
        if job is not None:
            log_rejected(job, effect)
            self._outbox.error(job.reply, effect.error, job.epoch, job.id)

    @staticmethod
    def _note_defect(error: MeshError | None) -> None:
        """Log a defect that the core has met and counted."""
        if error is not None and error.__cause__ is not None:
            seldom.error("a session ends over a defect", error.__cause__)

    def _ended(self, effect: Ended) -> None:
        self._note_defect(effect.error)
        job = self._jobs.table.get(effect.session)
        self._generations.ended(effect, job)
        self._tracing.end(effect, job)
        if job is None:
            return
        log_ended(job, effect)
        if effect.error is not None:
            del self._jobs.table[effect.session]
            self._outbox.error(job.reply, effect.error, job.epoch, job.id)
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
        del self._jobs.table[effect.session]
