"""Asks shards for the rows of a session, notes which ones are open, and gives them back. Where a shard holds what the session begins with
(prefixes.py), it is asked for that; what the session leaves is kept."""

from __future__ import annotations

from collections.abc import Sequence

from mesh.coordinator.core.events import CloseRow, OpenRow, PrefixKept
from mesh.coordinator.core.prefixes import Beginning, Remembered
from mesh.coordinator.core.routing import complete
from mesh.coordinator.core.session import Act, Session
from mesh.coordinator.core.state import CoreState

__all__ = ["begin_if_open", "give_back", "most_names", "note_found", "note_held", "note_kept", "open_rows", "release", "reusable_at"]

_NAMES = 2
"""A row may be known by the name under which it was kept, and by that of the session that has it."""
MIRROR_LAG = 64
"""A mirror that lacks more positions than this is given up, rather than waited for."""


def open_rows(state: CoreState, session: Session) -> None:
    """Ask every stage that was chosen for the session, and every mirror, for a row."""
    assert session.choices is not None
    key, epoch, keep = session.key, session.epoch, len(session.history)
    session.rows, session.filled, session.begins, session.asked = {}, {}, {}, {}
    session.route = None
    prompt = None if session.chain is None else session.chain.whole(len(session.request.prompt))
    for stage, choice in enumerate(session.choices):
        if choice.shard is not None:
            state.replicas.take(choice.shard, key)
        reuse = _ask(state, session, choice.shard)
        state.effects.append(OpenRow(key, epoch, stage, choice.layers, choice.shard, session.request, keep, False, reuse, prompt))
    for stage, shard in session.mirrors.items():
        state.replicas.take(shard, key)
        layers, reuse = session.choices[stage].layers, _ask(state, session, shard)
        state.effects.append(OpenRow(key, epoch, stage, layers, shard, session.request, keep, True, reuse, prompt))


def reusable_at(state: CoreState, session: Session, shard: str) -> int:
    """How many positions the session could begin with at a shard."""
    best = None if session.chain is None else state.prefixes.best(shard, session.chain, session.reusable)
    return 0 if best is None else best.positions


def _ask(state: CoreState, session: Session, shard: str | None) -> Beginning | None:
    """What to ask a shard for, of what its rows hold."""
    if shard is None or session.chain is None:
        return None
    best = state.prefixes.best(shard, session.chain, session.reusable)
    if best is not None:
        session.asked[shard] = best
    return best


def note_found(state: CoreState, session: Session, shard: str) -> None:
    """A shard has opened a row: does it begin with what was asked for?"""
    asked = session.asked.pop(shard, None)
    if asked is not None and session.filled[shard] < asked.positions:
        state.counters.prefix_misses += 1
        state.prefixes.missed(shard, asked.digest)


def begin_if_open(state: CoreState, session: Session) -> None:
    """Once every row is open, compute the history from the first position that one of the stages lacks."""
    assert session.choices is not None
    route = complete(session.choices)
    if route is None or len(session.rows) < len(route) or any(shard not in session.filled for shard in session.mirrors.values()):
        return
    last = len(session.history) - 1
    followed = [hop.shard for hop in route]
    start = _common(session, last, followed)
    for stage, shard in list(session.mirrors.items()):
        with_it = _common(session, start, [*followed, shard])
        if with_it < start - MIRROR_LAG:
            del session.mirrors[stage]
            give_back(state, session, shard)
        else:
            start = with_it
            followed.append(shard)
    session.route = route
    session.sent = session.done = start
    if session.cached is None:
        session.cached = min(start, len(session.request.prompt))
        state.counters.prefix_hits += session.cached > 0
        state.counters.reused_tokens += session.cached
    if session.generated and start == last:
        session.act(Act.CAUGHT_UP)
        state.scheduler.resume(session)
    else:
        session.act(Act.OPENED)
        state.scheduler.begin(session)


def _common(session: Session, most: int, shards: Sequence[str]) -> int:
    """The last position up to `most` at which the session may go on at all of these shards; 0 always is one."""
    start = min(most, *(session.filled[shard] for shard in shards))
    begins = [set(own) for shard in shards if (own := session.begins.get(shard)) is not None]
    return start if not begins else max((at for at in set.intersection(*begins) if at <= start), default=0)


def note_kept(state: CoreState, kept: PrefixKept) -> None:
    """Another coordinator's session has left its rows."""
    _note(state, kept.shards, kept.held)


def note_held(state: CoreState, session: Session) -> None:
    """The prompt of a session is computed: others may begin with it while the session runs."""
    held = None if session.chain is None else session.chain.remembered(len(session.request.prompt))
    if held is not None:
        _note(state, session.shards, held)


def _note(state: CoreState, shards: tuple[str, ...], held: Remembered) -> None:
    for shard in shards:
        state.prefixes.note(shard, held, most_names(state, shard))


def most_names(state: CoreState, shard: str) -> int:
    """Of how many beginnings it is known that a shard holds them. Whatever callers ask for, there are no more."""
    return _NAMES * state.replicas.rows_of(shard)


def give_back(state: CoreState, session: Session, shard: str, kept: Beginning | None = None) -> None:
    """Close the session's row at one shard."""
    state.replicas.give_back(shard, session.key)
    state.effects.append(CloseRow(session.key, session.epoch, shard, kept))


def release(state: CoreState, session: Session, *, keep: bool = False) -> None:
    """Close every row of the session, and those that it has asked for. `keep`: what they hold may be reused."""
    kept = _keep(state, session) if keep and session.chain is not None else None
    for shard in session.shards:
        give_back(state, session, shard, kept)
    if state.by_key.pop(session.key, None) is not None:
        state.admission.gave_rows_back(session)
    session.choices = session.route = None
    session.rows, session.mirrors, session.filled, session.begins, session.asked = {}, {}, {}, {}, {}


def _keep(state: CoreState, session: Session) -> Beginning | None:
    """What the rows of a session hold by now, noted for others."""
    assert session.chain is not None
    session.chain.add(session.history, session.done)
    held = session.chain.remembered(session.done)
    if held is None:
        return None
    _note(state, session.shards, held)
    state.effects.append(PrefixKept(session.shards, held))
    return Beginning(held.digest, held.positions)
