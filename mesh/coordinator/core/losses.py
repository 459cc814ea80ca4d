"""How the core answers losses: of a shard, a frame or a row. It decides how the sessions go on.

    a shard is gone, is another process, is suspected or drains  -> the sessions with rows there go another way
    a frame, or some of its rows, will not come back             -> the sessions in it go another way, or fail
    a row is refused                                             -> the session goes another way; it does without a mirror
    a frame is away for too long (watch.py)                      -> its shards are probed, suspected; it is sent again or given up
    nothing has helped for `failover_timeout_s`                  -> the session fails

A lost session always takes the same way. It leaves the scheduler, its frames are dropped, and it goes to the front of the queue; for the
rest of the turn it keeps its rows (`lose`). At the end of the turn it goes on with the stages that are well (`go_on`), or it gives its
rows back and waits (`mend_torn`).
"""

from __future__ import annotations

from mesh.coordinator.core import ends, rows
from mesh.coordinator.core.events import Announcement, CloseRow, OpenRefused, Probe, Waits
from mesh.coordinator.core.session import Act, Session, State
from mesh.coordinator.core.state import CoreState
from mesh.errors import MeshError, Unavailable
from mesh.protocol.generation import public_id
from mesh.types import LayerRange

__all__ = [
    "QUEUE_CHECK_S",
    "connection_changed",
    "expire",
    "look_after_frames",
    "lose",
    "lose_frame",
    "lose_shard",
    "mend_torn",
    "move_away",
    "note_chain",
    "row_refused",
    "tell_waiting",
    "waiting_since",
]

QUEUE_CHECK_S = 0.25
"""How often the queue is looked through for sessions that have waited too long. At every token would be too often."""
TELL_S = 1.0
"""How often a client is told that its request waits for layers that no shard serves. The first time it is told at once."""
STUBBORN = 3
"""After so many losses without a token between them, every shard of the route is suspected."""


# -- shards ------------------------------------------------------------------------------------------------------------


def lose_shard(state: CoreState, shard: str) -> None:
    """A shard's rows are gone, or must not be used. Its frames are given up. Every session that has a row there, or asks for one, goes
    another way. A session that the shard only mirrors does without the mirror."""
    for number, flight in list(state.scheduler.flights.items()):
        if any(hop.shard == shard for hop in flight.out.route):
            lose_frame(state, number)
    for session in list(state.by_key.values()):
        if session.choices is None or session.ended or session.state is State.QUEUED:
            continue
        if any(choice.shard == shard for choice in session.choices):
            lose(state, session)
        else:
            _miss_mirror(state, session, shard)


def _miss_mirror(state: CoreState, session: Session, shard: str) -> None:
    for stage, mirror in list(session.mirrors.items()):
        if mirror == shard:
            del session.mirrors[stage]
            rows.give_back(state, session, shard)
            if session.state is State.OPENING:
                rows.begin_if_open(state, session)


def move_away(state: CoreState, shard: str) -> None:
    """A shard drains. Its sessions go to other shards where there are any; the others stay until they end, or until the shard does."""
    for session in list(state.by_key.values()):
        if session.choices is None or session.state not in (State.OPENING, State.PREFILLING, State.DECODING):
            continue
        if all(choice.shard != shard for choice in session.choices):
            _miss_mirror(state, session, shard)
            continue
        mended = state.replicas.mend(session.key, session.choices, session.mirrors, session.positions, state.now)
        if mended is not None and mended[0] != session.choices:
            lose(state, session, blame=False)
            if not _go_on(state, session):
                rows.release(state, session)
            state.torn.remove(session)


def row_refused(state: CoreState, event: OpenRefused) -> None:
    session = state.by_key.get(event.key)
    if session is None or session.state is not State.OPENING or session.choices is None or event.epoch != session.epoch:
        state.counters.late += 1
        return
    if event.shard is not None:
        # The row is closed all the same: the shard may have opened it, in an answer that did not arrive.
        state.replicas.refused(event.shard, event.key, full=event.full, now=state.now)
        if session.mirrors.get(event.stage) == event.shard:
            del session.mirrors[event.stage]
            state.effects.append(CloseRow(session.key, session.epoch, event.shard))
            rows.begin_if_open(state, session)
            return
    if event.permanent:
        ends.end(state, session, Act.FAIL, "error", event.error)
    else:
        lose(state, session, blame=not event.full)


# -- frames ------------------------------------------------------------------------------------------------------------


def lose_frame(state: CoreState, number: int, keys: frozenset[int] | None = None, error: MeshError | None = None) -> None:
    """A frame will not come back, or its rows that belong to `keys` will not. With `error`, the sessions of these rows fail."""
    flight = state.scheduler.flights.get(number)
    if flight is None:
        state.counters.late += 1
        return
    everyone = frozenset(session.key for session in flight.sessions)
    for session in _drop(state, number, everyone if keys is None else keys):
        if session.ended:
            ends.settle(state, session)
        elif error is not None:
            ends.end(state, session, Act.FAIL, "error", error)
        else:
            lose(state, session)


def _drop(state: CoreState, number: int, keys: frozenset[int]) -> list[Session]:
    """Stop waiting for these rows of a frame. Returns their sessions."""
    dropped = state.scheduler.drop(number, keys)
    if number not in state.scheduler.flights:
        state.watch.dropped(number)
    return dropped


def look_after_frames(state: CoreState) -> None:
    """Frames that are away for too long: probe their shards, suspect those, send the frames again, or give them up."""
    verdict = state.watch.check(state.now)
    for shard in verdict.probe:
        state.counters.asked += 1
        state.effects.append(Probe(shard, state.now))
    for shard in verdict.silent:
        if state.replicas.suspect(shard):
            state.counters.suspected += 1
            state.effects.append(Announcement("suspected", shard, "it has a step and does not answer"))
        lose_shard(state, shard)
    for number in (*verdict.lost, *verdict.given_up):
        flight = state.scheduler.flights.get(number)
        if flight is None:  # lost with a shard above
            continue
        if number in verdict.given_up:
            for hop in flight.out.route:
                state.replicas.suspect(hop.shard)
        lose_frame(state, number)


# -- sessions ----------------------------------------------------------------------------------------------------------


def lose(state: CoreState, session: Session, *, blame: bool = True) -> None:
    """Put a session back to the front of the queue; it keeps its rows for the rest of the turn. `blame`: something went wrong, so the
    time until the session fails runs. It does not run if another session merely took a row first."""
    if session.choices is None or session.state is State.QUEUED:  # another of its frames was lost before
        return
    if blame:
        session.losses += 1
        if session.trouble_since is None:
            session.trouble_since = state.now
        if session.losses % STUBBORN == 0:
            for choice in session.choices:
                if choice.shard is not None:
                    state.replicas.suspect(choice.shard)
    state.scheduler.leave(session)
    for number, flight in list(state.scheduler.flights.items()) if session.in_flight else ():
        if session in flight.sessions:
            _drop(state, number, frozenset((session.key,)))
    session.act(Act.LOST)
    session.sent = session.done = 0
    session.restarts += 1
    state.counters.restarts += 1
    state.admission.push_front(session)
    state.torn.append(session)


def mend_torn(state: CoreState) -> None:
    """The sessions that were lost in this turn go on, or give their rows back and wait."""
    torn, state.torn = state.torn, []
    for session in torn:
        if session.state is State.QUEUED and not _go_on(state, session):
            rows.release(state, session)


def _go_on(state: CoreState, session: Session) -> bool:
    """Open a route that keeps the healthy stages and replaces the others. False: there is no such route."""
    assert session.choices is not None
    before = session.shards
    mended = state.replicas.mend(session.key, session.choices, session.mirrors, session.positions, state.now)
    if mended is None:
        return False
    choices, mirrors = mended
    replaced = [(old.shard, new.shard) for old, new in zip(session.choices, choices, strict=True) if old.shard != new.shard]
    session.replay = session.replay or "resend"
    for old, new in replaced:
        state.counters.failovers += 1
        stepped_in = new in session.mirrors.values()
        session.replay = "mirror" if stepped_in and session.replay != "replay" else "replay"
        how = "its mirror stepped in" if stepped_in else "the history is computed again"
        state.effects.append(Announcement("failed_over", str(old), f"request {public_id(session.id)} goes on at {new}: {how}"))
    if state.mirrors and session.replay == "replay":  # everything is computed again, so a new mirror can follow from the start
        mirrors = {**state.replicas.mirrors(choices, session.positions, state.now), **mirrors}
    session.choices, session.mirrors = choices, mirrors
    for shard in before:
        if shard not in session.shards:
            rows.give_back(state, session, shard)
    state.admission.remove(session)
    session.act(Act.START)
    session.epoch += 1
    rows.open_rows(state, session)
    return True


# -- patience ----------------------------------------------------------------------------------------------------------


def connection_changed(state: CoreState, online: bool) -> None:
    """The time without a connection does not count against any session."""
    state.online = online
    state.watch.connection(online, state.now)
    if online:
        for session in state.by_id.values():
            if session.trouble_since is not None:
                session.trouble_since = state.now
        if state.incomplete_since is not None:
            state.incomplete_since = state.now


def note_chain(state: CoreState) -> None:
    """Keep since when no chain of shards is complete. While one is, a session may wait for a row for as long as it takes: the sessions
    that hold the rows will end."""
    if state.replicas.longest() is not None:
        state.incomplete_since = None
    elif state.incomplete_since is None:
        state.incomplete_since = state.now


def expire(state: CoreState) -> None:
    """Fail the waiting sessions that no shards have been able to serve for `failover_timeout_s`."""
    if not len(state.admission) or state.now - state.queue_checked_at < QUEUE_CHECK_S:
        return
    state.queue_checked_at = state.now
    patience_s = state.config.failover_timeout_s
    for session in state.admission:
        began = waiting_since(state, session)
        if began is not None and state.now - began >= patience_s:
            ends.end(state, session, Act.FAIL, "error", Unavailable(_reason(state, patience_s), waited_s=patience_s))


def waiting_since(state: CoreState, session: Session) -> float | None:
    """Since when the session has waited for shards to serve it, with whichever coordinator; None where nothing is wrong."""
    began = session.trouble_since
    if session.state is not State.QUEUED or state.incomplete_since is None:
        return began
    return min(max(state.incomplete_since, session.submitted_at), state.now if began is None else began)


def _reason(state: CoreState, patience_s: float) -> str:
    if state.incomplete_since is None:
        return f"the shards do not answer, for {patience_s:g} s now: see `mesh status`"
    layers = ", ".join(map(str, state.replicas.missing()))
    return f"layers {layers} have no shard that is ready, for {patience_s:g} s now: start one with `mesh join`, or see `mesh status`"


def tell_waiting(state: CoreState) -> None:
    """Say of each waiting session that no shard serves some layers: at once, and then every TELL_S."""
    if state.incomplete_since is None or not len(state.admission) or not state.online:
        return
    missing: tuple[LayerRange, ...] | None = None
    for place, session in enumerate(state.admission):
        if state.now - session.told_at < TELL_S:
            continue
        session.told_at = state.now
        missing = state.replicas.missing() if missing is None else missing
        began = waiting_since(state, session)
        waited_s = 0.0 if began is None else state.now - began
        state.effects.append(Waits(session.id, place, missing, waited_s, state.config.failover_timeout_s))
