"""The coordinator's decisions: `handle(event, now) -> effects`. No await, no clock, no randomness of its own.

One turn is always the same: the event changes what is known, those in the queue who now fit are started, frames that may go out
go out. `deadline()` says when the core wants to be called with a Tick though nothing happens.

    Submit        -> queued, or Rejected at once (no such length, queue full)
    queue moves   -> OpenRow for each stage of a route
    Opened x all  -> chunks of the history, FrameOut(prefill)
    Result(last)  -> Emit, from then on FrameOut(decode) in waves
    Ended         -> CloseRow for each stage once no frame names the session any more

A loss (refusal, FrameLost, ReplicaGone, what mesh/coordinator/core/watch.py finds) sends the session through the queue again, with what
rows it still has if it can go on within the same turn; it fails when it has made no progress for `failover_timeout_s`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, fields
from random import Random
from typing import Any, Literal

from mesh.coordinator.core.admission import Admission
from mesh.coordinator.core.events import (
    Admitted,
    Answered,
    Ask,
    Cancel,
    CloseRow,
    Connection,
    Effect,
    Emit,
    Ended,
    Event,
    Finish,
    FrameLost,
    FrameOut,
    Happened,
    Hint,
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
from mesh.coordinator.core.routing import Hop, Replicas, Route, Strategy
from mesh.coordinator.core.scheduler import Scheduler
from mesh.coordinator.core.session import Act, Request, Session, State
from mesh.coordinator.core.watch import Watch
from mesh.errors import BadRequest, Busy, Cancelled, MeshError, PromptTooLong, Unavailable

__all__ = ["Core", "CoreConfig", "Counters", "Pause"]

_BASE_BITS, _COUNTER_BITS = 38, 24
WAITING_CHECK_S = 0.25
"""How often the queue is looked through for what has waited too long: not at every token."""
MIRROR_LAG = 64
"""A mirror that lacks more positions than this is not waited for: it is given up."""
STUBBORN = 3
"""Losses without a token between them after which the whole route is thought the worse of."""


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """layers: of the model. queue_limit: requests that may wait. step_timeout_s: the longest a frame may be under way."""

    layers: int
    strategy: Strategy = "least_loaded"
    queue_limit: int = 256
    failover_timeout_s: float = 30.0
    step_timeout_s: float = 15.0


@dataclass(frozen=True, slots=True)
class Pause:
    """How long a session that lost its route had no token, from its last one (or from the loss) to the next. kind: `mirror` a
    mirror stepped in, `replay` the history was computed again, `resend` every row was still there; in steps: medians of a step."""

    kind: str
    seconds: float
    step_s: float


@dataclass(slots=True)
class Counters:
    """Since the start. late: answers for frames or sessions that were no longer waited for. suspected: shards that did not answer.
    failovers: sessions that lost a shard in the middle, and went on."""

    submitted: int = 0
    rejected: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    restarts: int = 0
    suspected: int = 0
    failovers: int = 0
    asked: int = 0
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
        self.scheduler = Scheduler(self._chunk_of, self._processors_of)
        self.watch = Watch(config.step_timeout_s)
        self.pauses: deque[Pause] = deque(maxlen=512)
        self._base = random.getrandbits(_BASE_BITS) << _COUNTER_BITS
        self._count = 0
        self._by_id: dict[str, Session] = {}  # those that have not ended
        self._by_key: dict[int, Session] = {}  # those that hold rows or are being given some, ended ones too
        self._torn: list[Session] = []  # lost in this turn, with what rows they still have
        self._online = True
        self._mirror = config.strategy != "queue_group"  # NATS would have to name a second one
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
            case Cancel(session, gone):
                error = Unavailable("nobody listened to the answer: ask again to go on") if gone else Cancelled("the request was cancelled")
                self._end_by_id(session, Act.CANCEL, "cancelled", error)
            case Finish(session):
                self._end_by_id(session, Act.FINISH, "stop", None)
            case ReplicaSeen(replica):
                if self.replicas.seen(replica):
                    self.watch.forget(replica.shard)
                    self._lose_shard(replica.shard)
                if replica.draining:
                    self._move_away(replica.shard)
                self._notice_chain()
            case ReplicaGone(shard):
                self.replicas.gone(shard)
                self.watch.forget(shard)
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
            case Answered(shard, asked_at, pending):
                self.watch.answered(shard, asked_at, pending)
            case Hint():
                self.watch.hurry(now)
            case Connection(online):
                self._connection(online)
            case Tick():
                pass
        if self._online:
            self._look_after_frames()
            self._expire()
        self._start_waiting()
        for out in self.scheduler.plan():
            self._count_frame(out)
            self.watch.sent(out.frame, out.route, out.kind, now)
            self._effects.append(out)
        effects, self._effects = self._effects, []
        return effects

    def deadline(self) -> float | None:
        """When a Tick is due at the latest; None: never."""
        due = self.watch.deadline()
        times = [] if due is None else [due]
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

    @property
    def keys(self) -> tuple[int, ...]:
        """Of the sessions that have rows."""
        return tuple(self._by_key)

    def session(self, id: str) -> Session | None:
        """A session that has not ended."""
        return self._by_id.get(id)

    def check(self) -> None:
        """Raise AssertionError if any two parts of the state disagree."""
        self.admission.check()
        self.replicas.check()
        self.scheduler.check()
        self.watch.check_state(iter(self.scheduler.flights))
        assert not self._torn
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
        torn, self._torn = self._torn, []
        for lost in torn:
            if lost.state is State.QUEUED and not self._go_on(lost):
                self._release(lost)
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
            session.mirrors = self.replicas.mirrors(route, session.positions, self._now) if self._mirror else {}
            self._open_rows(session)

    def _go_on(self, session: Session) -> bool:
        """Continue a session that was lost in this turn: stages that are well stay, the others are replaced. False: no way."""
        assert session.route is not None
        before = session.shards
        mended = self.replicas.mend(session.key, session.route, session.mirrors, session.positions, self._now)
        if mended is None:
            return False
        route, mirrors = mended
        replaced = [(old.shard, new.shard) for old, new in zip(session.route, route, strict=True) if old.shard != new.shard]
        session.replay = session.replay or "resend"
        for old, new in replaced:
            self.counters.failovers += 1
            stepped_in = new in session.mirrors.values()
            session.replay = "mirror" if stepped_in and session.replay != "replay" else "replay"
            how = "its mirror stepped in" if stepped_in else "the history is computed again"
            self._effects.append(Happened("failed_over", str(old), f"session {session.id} goes on at {new}: {how}"))
        if self._mirror and session.replay == "replay":  # everything is computed again, so a new mirror can follow from the start
            mirrors = {**self.replicas.mirrors(route, session.positions, self._now), **mirrors}
        session.route, session.mirrors = route, mirrors
        for shard in before:
            if shard not in session.shards:
                self._give_back(session, shard)
        self.admission.remove(session)
        session.act(Act.START)
        session.epoch += 1
        self._open_rows(session)
        return True

    # -- rows ----------------------------------------------------------------------------------------------------------

    def _open_rows(self, session: Session) -> None:
        assert session.route is not None
        key, epoch, keep = session.key, session.epoch, len(session.history)
        session.rows, session.filled = {}, {}
        for stage, hop in enumerate(session.route):
            if hop.shard is not None:
                self.replicas.take(hop.shard, key)
            self._effects.append(OpenRow(key, epoch, stage, hop.layers, hop.shard, session.request, keep))
        for stage, shard in session.mirrors.items():
            self.replicas.take(shard, key)
            self._effects.append(OpenRow(key, epoch, stage, session.route[stage].layers, shard, session.request, keep, mirror=True))

    def _opened(self, event: Opened) -> None:
        session = self._by_key.get(event.key)
        if session is None or session.state is not State.OPENING or session.route is None or event.epoch != session.epoch:
            self.counters.late += 1
            self._effects.append(CloseRow(event.key, event.epoch, event.shard))
            return
        if session.mirrors.get(event.stage) != event.shard:
            hop = session.route[event.stage]
            # The queue group has answered twice, or a mirror that was given up since.
            if event.stage in session.rows or hop.shard not in (None, event.shard):
                self.counters.late += 1
                self._effects.append(CloseRow(event.key, event.epoch, event.shard))
                return
            if hop.shard is None:  # the queue group has answered
                route = session.route
                session.route = (*route[: event.stage], Hop(hop.layers, event.shard), *route[event.stage + 1 :])
                self.replicas.take(event.shard, event.key)
            session.rows[event.stage] = event.row
        session.filled[event.shard] = event.filled
        if event.shard not in self.replicas:  # its lease ended meanwhile
            self._lose(session)
        else:
            self._begin_if_open(session)

    def _begin_if_open(self, session: Session) -> None:
        """Once every row is there: replay from the first position that one of the stages lacks."""
        assert session.route is not None
        if len(session.rows) < len(session.route) or any(shard not in session.filled for shard in session.mirrors.values()):
            return
        last = len(session.history) - 1
        start = min(last, *(session.filled[str(hop.shard)] for hop in session.route))
        for stage, shard in list(session.mirrors.items()):
            if session.filled[shard] < start - MIRROR_LAG:
                del session.mirrors[stage]
                self._give_back(session, shard)
            else:
                start = min(start, session.filled[shard])
        session.sent = session.done = start
        if session.given and start == last:
            session.act(Act.CAUGHT_UP)
            self.scheduler.resume(session)
        else:
            session.act(Act.OPENED)
            self.scheduler.begin(session)

    def _refused(self, event: OpenRefused) -> None:
        session = self._by_key.get(event.key)
        if session is None or session.state is not State.OPENING or session.route is None or event.epoch != session.epoch:
            self.counters.late += 1
            return
        if event.shard is not None:
            # Closed all the same: a row may have been given in an answer that did not arrive.
            self.replicas.refused(event.shard, event.key, full=event.full, now=self._now)
            if session.mirrors.get(event.stage) == event.shard:  # without a mirror, then
                del session.mirrors[event.stage]
                self._effects.append(CloseRow(session.key, session.epoch, event.shard))
                self._begin_if_open(session)
                return
        if event.permanent:
            self._end(session, Act.FAIL, "error", event.error)
        else:
            self._lose(session, blame=not event.full)

    def _give_back(self, session: Session, shard: str) -> None:
        self.replicas.give_back(shard, session.key)
        self._effects.append(CloseRow(session.key, session.epoch, shard))

    def _release(self, session: Session) -> None:
        """Give every row back, and those that are being asked for."""
        for shard in session.shards:
            self._give_back(session, shard)
        self._by_key.pop(session.key, None)
        session.route = None
        session.rows, session.mirrors, session.filled = {}, {}, {}

    # -- frames --------------------------------------------------------------------------------------------------------

    def _result(self, event: Result) -> None:
        flight = self.scheduler.landed(event.frame)
        if flight is None:
            self.counters.late += 1
            return
        self.scheduler.measured(flight, self.watch.landed(event.frame, self._now) - event.waited_s)
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
        if session.replay:
            since = session.token_at or session.trouble_since or self._now
            self.pauses.append(Pause(session.replay, self._now - since, self.watch.median_s("decode")))
        session.trouble_since, session.losses, session.replay, session.token_at = None, 0, "", self._now
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
        """Every session with a row there, or being given one, goes another way; its frames are given up. A mirror is merely missed."""
        for number, flight in list(self.scheduler.flights.items()):
            if any(hop.shard == shard for hop in flight.out.route):
                self._lose_frame(number)
        for session in list(self._by_key.values()):
            if session.route is None or session.ended or session.state is State.QUEUED:
                continue
            if any(hop.shard == shard for hop in session.route):
                self._lose(session)
            else:
                self._miss_mirror(session, shard)

    def _miss_mirror(self, session: Session, shard: str) -> None:
        for stage, mirror in list(session.mirrors.items()):
            if mirror == shard:
                del session.mirrors[stage]
                self._give_back(session, shard)
                if session.state is State.OPENING:
                    self._begin_if_open(session)

    def _move_away(self, shard: str) -> None:
        """A shard drains: its sessions that another can take go there; the others stay until they end, or until it does."""
        for session in list(self._by_key.values()):
            if session.route is None or session.state not in (State.OPENING, State.PREFILLING, State.DECODING):
                continue
            if all(hop.shard != shard for hop in session.route):
                self._miss_mirror(session, shard)
                continue
            mended = self.replicas.mend(session.key, session.route, session.mirrors, session.positions, self._now)
            if mended is not None and mended[0] != session.route:
                self._lose(session, blame=False)
                if not self._go_on(session):
                    self._release(session)
                self._torn.remove(session)

    def _lose_frame(self, number: int, keys: frozenset[int] | None = None, error: MeshError | None = None) -> None:
        """A frame, or of its rows those of `keys`, will not come back. `error`: the sessions in it fail."""
        flight = self.scheduler.flights.get(number)
        if flight is None:
            self.counters.late += 1
            return
        everyone = frozenset(session.key for session in flight.sessions)
        dropped = self.scheduler.drop(number, everyone if keys is None else keys)
        if number not in self.scheduler.flights:
            self.watch.dropped(number)
        for session in dropped:
            if session.ended:
                self._settle(session)
            elif error is not None:
                self._end(session, Act.FAIL, "error", error)
            else:
                self._lose(session)

    def _lose(self, session: Session, *, blame: bool = True) -> None:
        """Back to the queue, for now with its rows. `blame`: something went wrong, so patience runs; not where a row was merely
        taken by another."""
        if session.route is None or session.state is State.QUEUED:  # another of its frames was lost before
            return
        if blame:
            session.losses += 1
            if session.trouble_since is None:
                session.trouble_since = self._now
            if session.losses % STUBBORN == 0:
                for hop in session.route:
                    self.replicas.suspect(str(hop.shard))
        self.scheduler.leave(session)
        for number, flight in list(self.scheduler.flights.items()) if session.in_flight else ():
            if session in flight.sessions and len(flight.sessions) == 1:
                self.scheduler.landed(number)
                self.watch.dropped(number)
            elif session in flight.sessions:
                self.scheduler.drop(number, frozenset((session.key,)))
        session.act(Act.LOST)
        session.sent = session.done = 0
        session.restarts += 1
        self.counters.restarts += 1
        self.admission.push_front(session)
        self._torn.append(session)

    def _look_after_frames(self) -> None:
        """Frames that are away for too long: ask, suspect, send again, or give up."""
        verdict = self.watch.check(self._now)
        for shard in verdict.ask:
            self.counters.asked += 1
            self._effects.append(Ask(shard, self._now))
        for shard in verdict.silent:
            if self.replicas.suspect(shard):
                self.counters.suspected += 1
                self._effects.append(Happened("suspected", shard, "it has a step and does not answer"))
            self._lose_shard(shard)
        for number in (*verdict.lost, *verdict.given_up):
            flight = self.scheduler.flights.get(number)
            if flight is None:  # lost with a shard above
                continue
            if number in verdict.given_up:
                for hop in flight.out.route:
                    self.replicas.suspect(str(hop.shard))
            self._lose_frame(number)

    def _connection(self, online: bool) -> None:
        """Of the time without a connection nobody is blamed."""
        self._online = online
        self.watch.connection(online, self._now)
        if online:
            for session in self._by_id.values():
                if session.trouble_since is not None:
                    session.trouble_since = self._now
            if self._incomplete_since is not None:
                self._incomplete_since = self._now

    def _expire(self) -> None:
        """Give up sessions that nobody can serve."""
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

    def _processors_of(self, route: Route) -> int:
        replicas = [self.replicas.get(str(hop.shard)) for hop in route]
        return len({replica.processor or replica.shard for replica in replicas if replica is not None})

    def _count_frame(self, out: FrameOut) -> None:
        if out.kind == "decode":
            self.counters.decode_frames += 1
        else:
            self.counters.prefill_frames += 1
