"""Asks shards for the rows of a session, notes which ones are open, and gives them back."""

from __future__ import annotations

from mesh.coordinator.core.events import CloseRow, OpenRow
from mesh.coordinator.core.routing import complete
from mesh.coordinator.core.session import Act, Session
from mesh.coordinator.core.state import CoreState

__all__ = ["begin_if_open", "give_back", "open_rows", "release"]

MIRROR_LAG = 64
"""A mirror that lacks more positions than this is given up, rather than waited for."""


def open_rows(state: CoreState, session: Session) -> None:
    """Ask every stage that was chosen for the session, and every mirror, for a row."""
    assert session.choices is not None
    key, epoch, keep = session.key, session.epoch, len(session.history)
    session.rows, session.filled = {}, {}
    session.route = None
    for stage, choice in enumerate(session.choices):
        if choice.shard is not None:
            state.replicas.take(choice.shard, key)
        state.effects.append(OpenRow(key, epoch, stage, choice.layers, choice.shard, session.request, keep))
    for stage, shard in session.mirrors.items():
        state.replicas.take(shard, key)
        state.effects.append(OpenRow(key, epoch, stage, session.choices[stage].layers, shard, session.request, keep, mirror=True))


def begin_if_open(state: CoreState, session: Session) -> None:
    """Once every row is open, compute the history from the first position that one of the stages lacks."""
    assert session.choices is not None
    route = complete(session.choices)
    if route is None or len(session.rows) < len(route) or any(shard not in session.filled for shard in session.mirrors.values()):
        return
    last = len(session.history) - 1
    start = min(last, *(session.filled[hop.shard] for hop in route))
    for stage, shard in list(session.mirrors.items()):
        if session.filled[shard] < start - MIRROR_LAG:
            del session.mirrors[stage]
            give_back(state, session, shard)
        else:
            start = min(start, session.filled[shard])
    session.route = route
    session.sent = session.done = start
    if session.generated and start == last:
        session.act(Act.CAUGHT_UP)
        state.scheduler.resume(session)
    else:
        session.act(Act.OPENED)
        state.scheduler.begin(session)


def give_back(state: CoreState, session: Session, shard: str) -> None:
    """Close the session's row at one shard."""
    state.replicas.give_back(shard, session.key)
    state.effects.append(CloseRow(session.key, session.epoch, shard))


def release(state: CoreState, session: Session) -> None:
    """Close every row of the session, and those that it has asked for."""
    for shard in session.shards:
        give_back(state, session, shard)
    if state.by_key.pop(session.key, None) is not None:
        state.admission.gave_rows_back(session)
    session.choices = session.route = None
    session.rows, session.mirrors, session.filled = {}, {}, {}
