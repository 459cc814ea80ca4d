"""The coordinator's decisions: `handle(event, now) -> effects`. No await, no clock, no randomness of its own.

Every turn is the same: the event changes what is known; sessions that were lost in it go on; sessions in the queue that now fit are
started; frames that may go out go out. `deadline()` says when the core wants to be called with a Tick although nothing happens.

    Submit           -> queued, or Rejected at once (longer than any row, queue full)
    queue moves      -> OpenRow for each stage of a route
    RowOpened x all  -> FrameOut with the history, whole or in parts, beside those of other sessions
    Result           -> Emit, once the whole history is computed; from then on one token a FrameOut. A hidden state that was asked for in
                        place of tokens is emitted in the same way, and ends its session
    Ended            -> CloseRow for each stage, once no frame names the session any more

A loss (a refused row, FrameLost, ReplicaGone, what watch.py finds) sends the session through the queue again: see losses.py.

Outside core/ only the methods of Core are used, and the values that they return.
"""

from __future__ import annotations

from functools import cache, partial
from itertools import islice
from random import Random
from typing import Any, Literal, NamedTuple

from mesh.coordinator.core import ends, losses, rows
from mesh.coordinator.core.admission import AdmissionQueue
from mesh.coordinator.core.events import (
    Admitted,
    CancelSession,
    CloseRow,
    Connection,
    Effect,
    Emit,
    Event,
    FinishSession,
    FrameLost,
    FrameOut,
    OpenRefused,
    PrefixKept,
    Probe,
    ProbeAnswered,
    Rejected,
    ReplicaGone,
    ReplicaSeen,
    Result,
    RowOpened,
    RowsAnswered,
    Submit,
    Suspicion,
    Tick,
)
from mesh.coordinator.core.routing import Choice, Replica, Replicas, Reuse
from mesh.coordinator.core.scheduler import Flight, Scheduler
from mesh.coordinator.core.session import Act, GenerationRequest, Session, SessionView, State
from mesh.coordinator.core.state import CoreConfig, CoreCounters, CoreState, Pause
from mesh.coordinator.core.watch import FrameWatch
from mesh.errors import BadRequest, Busy, Cancelled, MeshError, PromptTooLong, Unavailable, internal_error
from mesh.protocol.frame import EMBEDDED

__all__ = ["Core", "CoreConfig", "CoreLoad"]

_BASE_BITS, _COUNTER_BITS = 38, 24


class CoreLoad(NamedTuple):
    """live: sessions that have not ended, of which `queued` wait. capacity: sessions that fit at once; free: those that would find rows
    now. context: the most positions that a session can have, None while no chain of shards is complete."""

    live: int
    queued: int
    capacity: int
    free: int
    context: int | None


class Core:
    """`random` draws the coordinator's part of session keys, and the two choices of least_loaded."""

    def __init__(self, config: CoreConfig, random: Random) -> None:
        replicas = Replicas(config.layers, config.strategy, random)
        self._state = CoreState(
            config,
            replicas,
            AdmissionQueue(config.queue_limit),
            Scheduler(replicas.chunk_of, replicas.processors_of, replicas.packs, config.slowdown),
            FrameWatch(config.step_timeout_s),
            mirrors=config.strategy != "queue_group",  # NATS would have to name a second shard
        )
        self._base = random.getrandbits(_BASE_BITS) << _COUNTER_BITS
        self._count = 0

    def handle(self, event: Event, now: float) -> list[Effect]:
        """The effects of `event`, to be carried out in order. `now`: seconds on any one clock."""
        state = self._state
        state.now = now
        state.effects = []
        match event:
            case Result():
                self._result(event)
            case Submit(request):
                self._submit(request)
            case CancelSession(session, gone):
                error = (
                    Unavailable("the client no longer listened to the answer: send the request again to go on")
                    if gone
                    else Cancelled("the request was cancelled")
                )
                self._end_by_id(session, Act.CANCEL, "cancelled", error)
            case FinishSession(session):
                self._end_by_id(session, Act.FINISH, "stop", None)
            case ReplicaSeen(replica):
                if state.replicas.seen(replica):
                    state.watch.forget(replica.shard)
                    state.prefixes.forget(replica.shard)
                    losses.lose_shard(state, replica.shard)
                if replica.draining:
                    losses.move_away(state, replica.shard)
                if state.replicas.on_trial(replica.shard, now):
                    state.effects.append(Probe(replica.shard, now))
                losses.note_chain(state)
            case ReplicaGone(shard):
                state.replicas.gone(shard)
                state.watch.forget(shard)
                state.prefixes.forget(shard)
                losses.note_chain(state)
                losses.lose_shard(state, shard)
            case RowOpened():
                self._opened(event)
            case OpenRefused():
                losses.row_refused(state, event)
            case RowsAnswered(answers):
                self._answered(answers)
            case FrameLost(frame, keys, shard, error):
                if shard is not None:
                    state.replicas.suspect(shard)
                losses.lose_frame(state, frame, keys, error)
            case ProbeAnswered(shard, asked_at, pending):
                state.watch.answered(shard, asked_at, pending)
                state.replicas.answered(shard, asked_at)
            case PrefixKept():
                rows.note_kept(state, event)
            case Suspicion():
                state.watch.hurry(now)
            case Connection(online):
                losses.connection_changed(state, online)
            case Tick():
                pass
        if state.online:
            losses.look_after_frames(state)
            losses.expire(state)
        losses.mend_torn(state)
        self._start_waiting()
        losses.tell_waiting(state)
        for out in state.scheduler.plan():
            self._count_frame(out)
            state.watch.sent(out.frame, out.route, out.kind, now)
            state.effects.append(out)
        effects, state.effects = state.effects, []
        return effects

    def after_defect(self, event: Event, error: Exception) -> list[Effect]:
        """What is left to do where `handle` has raised: the effects that it had decided before, and the end of the session that the event
        is about, if it is about one."""
        state = self._state
        match event:
            case Submit(request):
                if request.id not in state.by_id:
                    state.effects.append(Rejected(request.id, internal_error(error)))
                self._give_up(request.id, error)
            case CancelSession(session) | FinishSession(session):
                self._give_up(session, error)
        effects, state.effects = state.effects, []
        return effects

    def _give_up(self, id: str, error: Exception) -> None:
        """End a session over a defect, as far as its state allows."""
        state = self._state
        state.counters.defects += 1
        session = state.by_id.get(id)
        if session is None:
            return
        try:
            ends.end(state, session, Act.FAIL, "error", internal_error(error))
        except Exception:  # its state does not allow an end: its client hears of it, and it is not scheduled again
            state.by_id.pop(id, None)
            state.effects.append(Rejected(id, internal_error(error)))

    def deadline(self) -> float | None:
        """When a Tick is due at the latest; None: never."""
        due = self._state.watch.deadline()
        times = [] if due is None else [due]
        if len(self._state.admission):
            times.append(self._state.queue_checked_at + losses.QUEUE_CHECK_S)
        return min(times, default=None)

    # -- what others may see -------------------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """No session is left, and no row."""
        return not self._state.by_id and not self._state.by_key

    @property
    def counters(self) -> CoreCounters:
        """To be read only."""
        return self._state.counters

    @property
    def pauses(self) -> tuple[Pause, ...]:
        """The last ones."""
        return tuple(self._state.pauses)

    def counts(self) -> dict[str, int]:
        """The counters, by name."""
        return self._state.counters.as_dict()

    def load(self, now: float) -> CoreLoad:
        state = self._state
        return CoreLoad(
            len(state.by_id), len(state.admission), state.replicas.capacity(), state.replicas.free(now), state.replicas.longest()
        )

    def waiting(self) -> tuple[str, ...]:
        """The sessions in the queue, the next one first."""
        return tuple(session.id for session in self._state.admission)

    def waited_s(self, id: str, now: float) -> float:
        """How long a session has waited for shards to serve it, without a token."""
        session = self._state.by_id.get(id)
        began = None if session is None else losses.waiting_since(self._state, session)
        return 0.0 if began is None else max(now - began, 0.0)

    def session_keys(self) -> tuple[int, ...]:
        """The keys of the sessions that have rows."""
        return tuple(self._state.by_key)

    def session(self, id: str, now: float) -> SessionView | None:
        """A session that has not ended, as it is now."""
        session = self._state.by_id.get(id)
        return None if session is None else session.view(now)

    def sessions(self, now: float, most: int) -> list[SessionView]:
        """At most so many of the sessions that have not ended, the oldest first, as they are now."""
        return [session.view(now) for session in islice(self._state.by_id.values(), most)]

    def flight(self, frame: int) -> Flight | None:
        """A frame that is out."""
        return self._state.scheduler.flights.get(frame)

    def replicas(self) -> tuple[Replica, ...]:
        """The shards that take part."""
        return tuple(self._state.replicas)

    def knows(self, shard: str) -> bool:
        """Whether the shard takes part."""
        return shard in self._state.replicas

    def check(self) -> None:
        """Raise AssertionError if any two parts of the state disagree."""
        state = self._state
        state.admission.check(state.by_key.values())
        state.replicas.check()
        state.scheduler.check()
        state.watch.check_state(iter(state.scheduler.flights))
        assert not state.torn
        waiting = set(map(id, state.admission))
        for session in state.by_id.values():
            session.check()
            assert not session.ended
            assert (session.state is State.QUEUED) == (id(session) in waiting), "queued, but not in the queue"
        for key, session in state.by_key.items():
            assert session.key == key and session.choices is not None
            assert not session.ended or session.in_flight, "an ended session keeps its rows"
        for shard, keys in state.replicas.held().items():
            assert keys <= state.by_key.keys(), f"rows of {shard} are held for no session"
        for shard, names in state.prefixes.names().items():
            assert names <= rows.most_names(state, shard), f"more is remembered of {shard} than it can hold"
        for flight in state.scheduler.flights.values():
            for session in flight.sessions:
                assert state.by_key.get(session.key) is session
        if not state.scheduler.flights and not any(s.state is State.OPENING for s in state.by_id.values()):
            assert all(s.state is State.QUEUED for s in state.by_id.values()), "a session is stuck"

    # -- requests ------------------------------------------------------------------------------------------------------

    def _submit(self, request: GenerationRequest) -> None:
        state = self._state
        state.counters.submitted += 1
        error = self._reason_to_refuse(request)
        if error is not None:
            state.counters.rejected += 1
            state.effects.append(Rejected(request.id, error))
            return
        self._count = (self._count + 1) % (1 << _COUNTER_BITS)
        session = Session(request, (self._base | self._count) + 1, state.now)
        state.counters.prompt_tokens += len(request.prompt)
        state.by_id[request.id] = session
        state.effects.append(Admitted(request.id))
        if request.waited_s:
            session.trouble_since = state.now - request.waited_s
        if request.resumed:  # it has waited already, with the coordinator that had it
            session.restarts = 1
            state.admission.push_front(session)
        else:
            state.admission.push(session)
        if session.generated >= request.max_tokens and not request.embed:
            ends.end(state, session, Act.FINISH, "length")

    def _reason_to_refuse(self, request: GenerationRequest) -> MeshError | None:
        state = self._state
        longest = state.replicas.longest()
        if request.id in state.by_id:
            return BadRequest("this session is being generated already", field="session")
        if longest is not None and len(request.prompt) + request.max_tokens > longest:
            return PromptTooLong(
                f"the prompt has {len(request.prompt)} tokens{_more(request.max_tokens)}, but rows here hold {longest}: shorten the prompt"
                f"{' or ask for fewer' if request.max_tokens else ''}",
                tokens=len(request.prompt),
                limit=max(longest - request.max_tokens, 0),
            )
        if state.admission.full(request.caller) and not request.resumed:
            wait_s = state.admission.retry_after_s(state.replicas.capacity())
            mine = state.admission.waiting(request.caller)
            whose = f", {mine} of them yours" if request.caller else ""
            return Busy(f"{len(state.admission)} requests are waiting already{whose}: try again in {wait_s:.1f} s", retry_after_s=wait_s)
        return None

    def _end_by_id(self, id: str, act: Act, reason: Literal["stop", "cancelled"], error: MeshError | None) -> None:
        session = self._state.by_id.get(id)
        if session is not None:
            ends.end(self._state, session, act, reason, error)

    def _start_waiting(self) -> None:
        """Start the sessions at the front of the queue for which there are rows."""
        state = self._state
        while (session := state.admission.head()) is not None:
            reuse = None
            if session.chain is not None:
                reuse = Reuse(cache(partial(rows.reusable_at, state, session)), len(session.request.prompt))
            choices = state.replicas.choose(session.positions, state.now, reuse)
            if choices is None:
                return
            state.admission.remove(session)
            session.act(Act.START)
            session.epoch += 1
            session.choices = choices
            if not session.started_at:
                session.started_at = state.now
            state.by_key[session.key] = session
            state.admission.took_rows(session)
            session.mirrors = state.replicas.mirrors(choices, session.positions, state.now, reuse) if state.mirrors else {}
            rows.open_rows(state, session)

    def _answered(self, answers: tuple[RowOpened | OpenRefused, ...]) -> None:
        """Several sessions at once; a defect ends its own session."""
        for answer in answers:
            try:
                self._opened(answer) if isinstance(answer, RowOpened) else losses.row_refused(self._state, answer)
            except Exception as error:
                session = self._state.by_key.get(answer.key)
                self._give_up("" if session is None else session.id, error)

    def _opened(self, event: RowOpened) -> None:
        state = self._state
        session = state.by_key.get(event.key)
        if session is None or session.state is not State.OPENING or session.choices is None or event.epoch != session.epoch:
            self._opened_late(event, session)
            return
        if session.mirrors.get(event.stage) != event.shard:
            choice = session.choices[event.stage]
            # The queue group has answered twice, or a mirror that was given up since.
            if event.stage in session.rows or choice.shard not in (None, event.shard):
                self._opened_late(event, session)
                return
            if choice.shard is None:  # the queue group has answered
                before, after = session.choices[: event.stage], session.choices[event.stage + 1 :]
                session.choices = (*before, Choice(choice.layers, event.shard), *after)
                state.replicas.take(event.shard, event.key)
            session.rows[event.stage] = event.row
        session.filled[event.shard] = event.filled
        session.begins[event.shard] = event.begins
        rows.note_found(state, session, event.shard)
        if event.shard not in state.replicas:  # its lease ended meanwhile
            losses.lose(state, session)
        else:
            rows.begin_if_open(state, session)

    def _opened_late(self, event: RowOpened, session: Session | None) -> None:
        """A row was opened that nothing waits for. It is closed, unless the session has asked the shard again since: the shard then keeps
        the row and what is in it."""
        self._state.counters.late += 1
        if session is None or event.shard not in session.shards:
            self._state.effects.append(CloseRow(event.key, event.epoch, event.shard))

    # -- answers -------------------------------------------------------------------------------------------------------

    def _result(self, event: Result) -> None:
        state = self._state
        flight = state.scheduler.landed(event.frame, state.watch.landed(event.frame, state.now) - event.waited_s)
        if flight is None:
            state.counters.late += 1
            return
        answers = {row.key: row for row in event.rows}
        for session, sent in zip(flight.sessions, flight.out.rows, strict=True):
            if session.ended:
                ends.settle(state, session)
                continue
            position = sent.start + len(sent.tokens) - 1
            answer = answers.get(sent.key)
            acknowledged = not answers and not sent.wants  # a prefill chunk that wants nothing is answered without rows
            if not acknowledged and (answer is None or answer.position != position or (answer.token is None) is sent.wants):
                losses.lose(state, session)
                continue
            session.done = max(session.done, position + 1)
            if answer is None or not sent.wants:
                continue
            try:
                self._token(session, answer.token)
            except Exception as error:  # a defect: it ends this session, and the other sessions of the step have their tokens
                self._give_up(session.id, error)

    def _token(self, session: Session, token: Any) -> None:
        state = self._state
        request = session.request
        joins = session.state is State.PREFILLING
        if session.replay:
            since = session.token_at or session.trouble_since or state.now
            state.pauses.append(Pause(session.replay, state.now - since, state.watch.median_s("decode")))
        session.trouble_since, session.losses, session.replay, session.token_at = None, 0, "", state.now
        if request.embed is not (token.id == EMBEDDED):
            ends.end(state, session, Act.FAIL, "error", ends.other_version())
            return
        if request.embed:
            if not token.finite:
                ends.end(state, session, Act.FAIL, "error", ends.no_vector())
                return
            session.first_token_at = state.now
            state.effects.append(Emit(session.id, 0, token))
            ends.end(state, session, Act.FINISH, "stop")
            return
        if token.id < 0:
            ends.end(state, session, Act.FAIL, "error", ends.no_token())
            return
        if token.id in request.stop_ids:
            ends.end(state, session, Act.FINISH, "stop")
            return
        session.act(Act.TOKEN)
        session.history.append(token.id)
        state.counters.tokens += 1
        if not session.first_token_at:
            session.first_token_at = state.now
        state.effects.append(Emit(session.id, session.generated - 1, token))
        if session.generated >= request.max_tokens:
            ends.end(state, session, Act.FINISH, "length")
            return
        session.sent = session.done
        if joins:
            state.scheduler.join(session)
            rows.note_held(state, session)

    def _count_frame(self, out: FrameOut) -> None:
        counters = self._state.counters
        if out.kind == "decode":
            counters.decode_frames += 1
        elif out.kind == "prefill":
            counters.prefill_frames += 1
        else:
            counters.packed_frames += 1


def _more(tokens: int) -> str:
    return f" and {tokens} more are asked for" if tokens else ""
