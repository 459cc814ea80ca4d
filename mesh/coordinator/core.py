"""The coordinator's decisions: `handle(event, now) -> effects`. No await, no clock, no randomness of its own.

One turn is always the same: the event changes what is known, those in the queue who now fit are started, frames that may go out
go out. `deadline()` says when the core wants to be called with a Tick though nothing happens.

    Submit        -> queued, or Rejected at once (no such length, queue full)
    queue moves   -> OpenRow for each stage of a route
    Opened x all  -> chunks of the history, FrameOut(prefill)
    Result(last)  -> Emit, from then on FrameOut(decode) in waves
    Ended         -> CloseRow for each stage once no frame names the session any more

A loss (refusal, FrameLost, ReplicaGone, a frame past its deadline) sends the session through the queue again; it fails when it
has made no progress for `failover_timeout_s`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from random import Random
from typing import Any, Literal

from mesh.coordinator.admission import Admission
from mesh.coordinator.events import (
    Admitted,
    Cancel,
    CloseRow,
    Effect,
    Emit,
    Ended,
    Event,
    Finish,
    FrameLost,
    FrameOut,
    Opened,
    OpenRefused,
    OpenRow,
    Rejected,
    ReplicaGone,
    ReplicaSeen,
    Result,
    Submit,
    Tick,
)
from mesh.coordinator.routing import Hop, Replicas, Route, Strategy
from mesh.coordinator.scheduler import Scheduler
from mesh.coordinator.session import Act, Request, Session, State
from mesh.errors import BadRequest, Busy, Cancelled, MeshError, PromptTooLong, Unavailable

__all__ = ["Core", "CoreConfig", "Counters"]

_COUNTER_BITS = 24
WAITING_CHECK_S = 0.25
"""How often the queue is looked through for what has waited too long: not at every token."""


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """layers: of the model. queue_limit: requests that may wait. step_timeout_s: the longest a frame may be under way."""

    layers: int
    strategy: Strategy = "least_loaded"
    queue_limit: int = 256
    failover_timeout_s: float = 30.0
    step_timeout_s: float = 15.0


@dataclass(slots=True)
class Counters:
    """Since the start. late: answers for frames or sessions that were no longer waited for."""

    submitted: int = 0
    rejected: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    restarts: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    decode_frames: int = 0
    prefill_frames: int = 0
    late: int = 0

    def as_dict(self) -> dict[str, int]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


class Core:
    """See the module's docstring. `random` draws the coordinator's part of session keys, and the two choices of least_loaded."""

    def __init__(self, config: CoreConfig, random: Random) -> None:
        self.config = config
        self.counters = Counters()
        self.replicas = Replicas(config.layers, config.strategy, random)
        self.admission = Admission(config.queue_limit)
        self.scheduler = Scheduler(self._chunk_of)
        self._base = random.getrandbits(_COUNTER_BITS) << _COUNTER_BITS
        self._count = 0
        self._by_id: dict[str, Session] = {}  # those that have not ended
        self._by_key: dict[int, Session] = {}  # those that hold rows or are being given some, ended ones too
        self._effects: list[Effect] = []
        self._now = 0.0
        self._waiting_seen_at = float("-inf")
        self._incomplete_since: float | None = float("-inf")  # no shard is known yet

    def handle(self, event: Event, now: float) -> list[Effect]:
        """What follows from `event`; to be carried out in order."""
        self._now = now
        self._effects = []
        match event:
            case Submit(request):
                self._submit(request)
            case Cancel(session):
                self._end_by_id(session, Act.CANCEL, "cancelled", Cancelled("the request was cancelled"))
            case Finish(session):
                self._end_by_id(session, Act.FINISH, "stop", None)
            case ReplicaSeen(replica):
                if self.replicas.seen(replica):
                    self._lose_shard(replica.shard)
                self._notice_chain()
            case ReplicaGone(shard):
                self.replicas.gone(shard)
                self._notice_chain()
                self._lose_shard(shard)
            case Opened():
                self._opened(event)
            case OpenRefused():
                self._refused(event)
            case Result():
                self._result(event)
            case FrameLost(frame, keys, shard, error):
                if shard is not None:
                    self.replicas.suspect(shard)
                self._lose_frame(frame, keys, error)
            case Tick():
                pass
        self._expire()
        self._start_waiting()
        for out in self.scheduler.plan(now):
            self._count_frame(out)
            self._effects.append(out)
        effects, self._effects = self._effects, []
        return effects

    def deadline(self) -> float | None:
        """When a Tick is due at the latest; None: never."""
        times = []
        flights = self.scheduler.flights
        if flights:
            oldest = flights[next(iter(flights))]  # frames are kept in the order they were sent
            times.append(oldest.sent_at + self.config.step_timeout_s)
        if len(self.admission):
            times.append(self._waiting_seen_at + WAITING_CHECK_S)
        return min(times, default=None)

    @property
    def live(self) -> int:
        """Sessions that have not ended."""
        return len(self._by_id)

    @property
    def idle(self) -> bool:
        return not self._by_id and not self._by_key

    @property
    def sessions(self) -> Iterable[Session]:
        """Those that have not ended, the oldest first."""
        return self._by_id.values()

    def session(self, id: str) -> Session | None:
        """A session that has not ended."""
        return self._by_id.get(id)

    def check(self) -> None:
        """Raise AssertionError if any two parts of the state disagree."""
        self.admission.check()
        self.replicas.check()
        self.scheduler.check()
        waiting = set(map(id, self.admission))
        for session in self._by_id.values():
            session.check()
            assert not session.ended
            assert (session.state is State.QUEUED) == (id(session) in waiting), "queued, but not in the queue"
        for key, session in self._by_key.items():
            assert session.key == key and session.route is not None
            assert not session.ended or session.in_flight, "an ended session keeps its rows"
        for shard, keys in self.replicas.held().items():
            assert keys <= self._by_key.keys(), f"rows of {shard} are held for nobody"
        for flight in self.scheduler.flights.values():
            for session in flight.sessions:
                assert self._by_key.get(session.key) is session
        if not self.scheduler.flights and not any(s.state is State.OPENING for s in self._by_id.values()):
            assert all(s.state is State.QUEUED for s in self._by_id.values()), "a session is stuck"

    # -- requests ------------------------------------------------------------------------------------------------------

    def _submit(self, request: Request) -> None:
        self.counters.submitted += 1
        error: MeshError | None = None
        longest = self.replicas.longest()
        needed = len(request.prompt) + request.max_tokens
        if request.id in self._by_id:
            error = BadRequest(f"session {request.id} is being generated already", field="session")
        elif longest is not None and needed > longest:
            limit = max(longest - request.max_tokens, 0)
            error = PromptTooLong(
                f"the prompt has {len(request.prompt)} tokens and {request.max_tokens} more are asked for, but rows here hold "
                f"{longest}: shorten the prompt or ask for fewer",
                tokens=len(request.prompt),
                limit=limit,
            )
        elif self.admission.full and not request.resumed:
            wait_s = self.admission.retry_after_s(self.replicas.capacity())
            error = Busy(f"{len(self.admission)} requests are waiting already: try again in {wait_s:.1f} s", retry_after_s=wait_s)
        if error is not None:
            self.counters.rejected += 1
            self._effects.append(Rejected(request.id, error))
            return
        self._count = (self._count + 1) % (1 << _COUNTER_BITS)
        session = Session(request, (self._base | self._count) + 1, self._now)
        self.counters.prompt_tokens += len(request.prompt)
        self._by_id[request.id] = session
        self._effects.append(Admitted(request.id))
        if request.resumed:  # it has waited already, with the coordinator that had it
            session.restarts = 1
            self.admission.push_front(session)
        else:
            self.admission.push(session)
        if session.given >= request.max_tokens:
            self._end(session, Act.FINISH, "length", None)

    def _start_waiting(self) -> None:
        while (session := self.admission.head()) is not None:
            route = self.replicas.route(session.positions, self._now)
            if route is None:
                return
            self.admission.remove(session)
            session.act(Act.START)
            session.epoch += 1
            session.route = route
            if not session.started_at:
                session.started_at = self._now
            self._by_key[session.key] = session
            for stage, hop in enumerate(route):
                if hop.shard is not None:
                    self.replicas.take(hop.shard, session.key)
                self._effects.append(OpenRow(session.key, stage, hop.layers, hop.shard, session.request))

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _opened(self, event: Opened) -> None:
        session = self._by_key.get(event.key)
        if session is None or session.state is not State.OPENING or session.route is None or event.stage in session.rows:
            self.counters.late += 1
            self._effects.append(CloseRow(event.key, event.shard))
            return
        hop = session.route[event.stage]
        if hop.shard is None:  # the queue group has answered
            route = session.route
            session.route = (*route[: event.stage], Hop(hop.layers, event.shard), *route[event.stage + 1 :])
            self.replicas.take(event.shard, event.key)
        session.rows[event.stage] = event.row
        if event.shard not in self.replicas:  # its lease ended meanwhile
            self._lose(session)
        elif len(session.rows) == len(session.route):
            session.act(Act.OPENED)
            self.scheduler.begin(session)

    def _refused(self, event: OpenRefused) -> None:
        session = self._by_key.get(event.key)
        if session is None or session.state is not State.OPENING or session.route is None:
            self.counters.late += 1
            return
        shard = session.route[event.stage].shard
        if shard is not None:
            # Closed all the same: a row may have been given in an answer that did not arrive.
            self.replicas.refused(shard, event.key, full=event.full, now=self._now)
        if event.permanent:
            self._end(session, Act.FAIL, "error", event.error)
        else:
            self._lose(session, blame=not event.full)

    def _release(self, session: Session) -> None:
        """Give every row back, and those that are being asked for."""
        for hop in session.route or ():
            if hop.shard is not None:
                self.replicas.give_back(hop.shard, session.key)
                self._effects.append(CloseRow(session.key, hop.shard))
        self._by_key.pop(session.key, None)
        session.route = None
        session.rows = {}

    # -- frames --------------------------------------------------------------------------------------------------------

    def _result(self, event: Result) -> None:
        flight = self.scheduler.landed(event.frame)
        if flight is None:
            self.counters.late += 1
            return
        answers = {row.key: row for row in event.rows}
        for session, sent in zip(flight.sessions, flight.out.rows, strict=True):
            if session.ended:
                self._settle(session)
                continue
            position = sent.start + len(sent.tokens) - 1
            session.done = max(session.done, position + 1)
            if not flight.out.last:
                continue
            answer = answers.get(sent.key)
            if answer is None or answer.position != position:
                self._lose(session)
                continue
            self._token(session, answer.token)

    def _token(self, session: Session, token: Any) -> None:
        request = session.request
        joins = session.state is State.PREFILLING
        session.trouble_since = None
        if token.id in request.stop_ids:
            self._end(session, Act.FINISH, "stop", None)
            return
        session.act(Act.TOKEN)
        session.history.append(token.id)
        self.counters.tokens += 1
        if not session.first_token_at:
            session.first_token_at = self._now
        self._effects.append(Emit(session.id, session.given - 1, token))
        if session.given >= request.max_tokens:
            self._end(session, Act.FINISH, "length", None)
            return
        session.sent = session.done
        if joins:
            self.scheduler.join(session)

    # -- losses --------------------------------------------------------------------------------------------------------

    def _lose_shard(self, shard: str) -> None:
        """Every session with a row there, or being given one, goes another way; its frames are given up."""
        for number, flight in list(self.scheduler.flights.items()):
            if any(hop.shard == shard for hop in flight.out.route):
                self._lose_frame(number)
        for session in list(self._by_key.values()):
            if session.route is not None and not session.ended and any(hop.shard == shard for hop in session.route):
                self._lose(session)

    def _lose_frame(self, number: int, keys: frozenset[int] | None = None, error: MeshError | None = None) -> None:
        """A frame, or of its rows those of `keys`, will not come back. `error`: the sessions in it fail."""
        flight = self.scheduler.flights.get(number)
        if flight is None:
            self.counters.late += 1
            return
        everyone = frozenset(session.key for session in flight.sessions)
        for session in self.scheduler.drop(number, everyone if keys is None else keys):
            if session.ended:
                self._settle(session)
            elif error is not None:
                self._end(session, Act.FAIL, "error", error)
            else:
                self._lose(session)

    def _lose(self, session: Session, *, blame: bool = True) -> None:
        """Back to the queue. `blame`: something went wrong, so patience runs; not where a row was merely taken by another."""
        if session.route is None:  # another of its frames was lost before
            return
        if blame and session.trouble_since is None:
            session.trouble_since = self._now
        self.scheduler.leave(session)
        for number, flight in list(self.scheduler.flights.items()) if session.in_flight else ():
            if session in flight.sessions and len(flight.sessions) == 1:
                self.scheduler.landed(number)
        session.act(Act.LOST)
        session.sent = session.done = 0
        session.restarts += 1
        self.counters.restarts += 1
        self._release(session)
        self.admission.push_front(session)

    def _expire(self) -> None:
        """Give up frames past their deadline, and sessions that nobody can serve."""
        flights = self.scheduler.flights
        while flights:
            number, flight = next(iter(flights.items()))
            if self._now - flight.sent_at < self.config.step_timeout_s:
                break
            for hop in flight.out.route:
                self.replicas.suspect(str(hop.shard))
            self._lose_frame(number)
        if not len(self.admission) or self._now - self._waiting_seen_at < WAITING_CHECK_S:
            return
        self._waiting_seen_at = self._now
        patience_s = self.config.failover_timeout_s
        for session in self.admission:
            began = session.trouble_since
            if self._incomplete_since is not None:
                began = min(max(self._incomplete_since, session.submitted_at), self._now if began is None else began)
            if began is not None and self._now - began >= patience_s:
                why = "the shards do not answer" if self._incomplete_since is None else "some layer range has no shard that is ready"
                self._end(session, Act.FAIL, "error", Unavailable(f"{why}, for {patience_s:g} s now: see `mesh status`"))

    def _notice_chain(self) -> None:
        """Keep since when no chain of shards is complete. While one is, waiting for a row has no end of its own: it is bounded
        by the sessions that hold the rows."""
        if self.replicas.longest() is not None:
            self._incomplete_since = None
        elif self._incomplete_since is None:
            self._incomplete_since = self._now

    # -- ends ----------------------------------------------------------------------------------------------------------

    def _end_by_id(self, id: str, act: Act, reason: Literal["stop", "cancelled"], error: MeshError | None) -> None:
        session = self._by_id.get(id)
        if session is not None:
            self._end(session, act, reason, error)

    def _end(self, session: Session, act: Act, reason: Literal["stop", "length", "cancelled", "error"], error: MeshError | None) -> None:
        if session.state is State.QUEUED:
            self.admission.remove(session)
        elif session.state in (State.PREFILLING, State.DECODING):
            self.scheduler.leave(session)
        session.act(act)
        session.ended_at = self._now
        del self._by_id[session.id]
        match session.state:
            case State.FINISHED:
                self.counters.finished += 1
                if session.started_at:
                    self.admission.observe(self._now - session.started_at)
            case State.FAILED:
                self.counters.failed += 1
            case _:
                self.counters.cancelled += 1
        first = session.first_token_at - session.submitted_at if session.first_token_at else None
        started = session.started_at or self._now
        self._effects.append(
            Ended(
                session.id,
                reason,
                session.given,
                started - session.submitted_at,
                first,
                self._now - session.submitted_at,
                session.restarts,
                error,
            )
        )
        self._settle(session)

    def _settle(self, session: Session) -> None:
        """An ended session gives its rows back when no frame names it any more."""
        if not session.in_flight and session.route is not None:
            self._release(session)

    # -- small ---------------------------------------------------------------------------------------------------------

    def _chunk_of(self, route: Route) -> int:
        chunks = [replica.chunk for hop in route if (replica := self.replicas.get(str(hop.shard))) is not None]
        return min(chunks)

    def _count_frame(self, out: FrameOut) -> None:
        if out.kind == "decode":
            self.counters.decode_frames += 1
        else:
            self.counters.prefill_frames += 1
