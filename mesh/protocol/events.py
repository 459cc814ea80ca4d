"""What has happened in the mesh, for people and monitors."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from mesh.protocol.message import Label, Line, Message, Token

__all__ = ["Event", "EventKind"]

EventKind = Literal[
    "joined",  # a shard, before it loads
    "ready",
    "drained",
    "left",
    "lost",  # a shard, or a coordinator, is gone without having left
    "suspected",  # a shard, or a coordinator, does not answer
    "failed_over",  # sessions take another route
    "plan_changed",
    "rejected",  # a shard of another version or model is not used
    "forgotten",  # removed by an operator
    "coordinator_joined",
    "coordinator_left",
    "resumed",  # sessions of another coordinator were taken over
]


class Event(Message):
    """Something that happened, for people and monitors. `who`: a shard or a coordinator."""

    kind: EventKind
    who: Token
    model: Label = ""
    at_unix_s: float
    detail: Line = ""
    data: dict[Label, Any] = Field(default_factory=dict, max_length=256)
