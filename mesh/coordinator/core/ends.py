"""How a session ends, whatever the reason."""

from __future__ import annotations

from typing import Literal

from mesh.coordinator.core import rows
from mesh.coordinator.core.events import Ended
from mesh.coordinator.core.session import Act, Session, State
from mesh.coordinator.core.state import CoreState
from mesh.errors import BadRequest, MeshError, Unavailable

__all__ = ["end", "no_token", "no_vector", "other_version", "settle"]


def end(
    state: CoreState,
    session: Session,
    act: Act,
    reason: Literal["stop", "length", "cancelled", "error"],
    error: MeshError | None = None,
) -> None:
    """`act`: FINISH, FAIL or CANCEL. The session keeps its rows while a frame that names it is out."""
    if session.state is State.QUEUED:
        state.admission.remove(session)
    elif session.state in (State.PREFILLING, State.DECODING):
        state.scheduler.leave(session)
    session.act(act)
    session.ended_at = state.now
    del state.by_id[session.id]
    match session.state:
        case State.FINISHED:
            state.counters.finished += 1
            if session.started_at:
                state.admission.observe(state.now - session.started_at)
        case State.FAILED:
            state.counters.failed += 1
        case _:
            state.counters.cancelled += 1
    settle(state, session)  # before the end is told: whoever goes on with what the rows hold finds it then
    first = session.first_token_at - session.submitted_at if session.first_token_at else None
    started = session.started_at or state.now
    state.effects.append(
        Ended(
            session.id,
            reason,
            session.generated,
            started - session.submitted_at,
            first,
            state.now - session.submitted_at,
            session.restarts,
            error,
            session.cached or 0,
        )
    )


def settle(state: CoreState, session: Session) -> None:
    """Give an ended session's rows back, once no frame names it any more. What they hold is kept for others that begin as it did."""
    if not session.in_flight and session.choices is not None:
        rows.release(state, session, keep=session.state is not State.FAILED)


def other_version() -> MeshError:
    """The error of a session that got a token in place of a hidden state, or the other way round."""
    return Unavailable("a shard has answered a question that was not asked: all processes of a mesh need the same version")


def no_token() -> MeshError:
    """The error of a session whose grammar allowed no token: the shard that samples says so in place of one."""
    return BadRequest(
        "no token continues the answer: its form needs more work at one token than a shard may take, or the tokens that came with the "
        "request do not have it. Ask for a simpler form",
        field="structured_outputs",
    )


def no_vector() -> MeshError:
    """The error of a session whose hidden state is no vector: some number of it is NaN or infinite."""
    return BadRequest(
        "the model makes no vector of this text: numbers of its hidden state are NaN or infinite. Give another text, or import the model "
        "with a wider dtype",
        field="prompt",
    )
