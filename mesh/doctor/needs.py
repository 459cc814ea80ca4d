"""The subjects that each role publishes to and subscribes to, as `mesh doctor` tries them.

Each is a subject of a process that does not exist, so that trying it disturbs nobody: a permission is for a pattern, such as
`mesh.v1.control.*.ping`. JetStream's subjects are those of reading; what a role writes to a bucket is tried with a message that the
bucket never stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from mesh.protocol import subjects, topics
from mesh.types import LayerRange

__all__ = ["NOBODY", "ROLES", "Needs", "Role", "needs_of"]

Role = Literal["client", "gateway", "coordinator", "shard", "operator"]
ROLES: Final[tuple[Role, ...]] = ("client", "gateway", "coordinator", "shard", "operator")

NOBODY: Final = "doctor-nobody"
_RANGE: Final = LayerRange(0, 1)


@dataclass(frozen=True, slots=True)
class Needs:
    """Subjects that a role publishes to, and subscribes to."""

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]


def needs_of(role: Role, *, inbox: str) -> Needs:
    """`inbox`: a subject for answers of this connection."""
    publish, subscribe = _NEEDS[role]
    return Needs(publish, (inbox, *subscribe))


def _client() -> tuple[str, ...]:
    return (
        topics.GENERATE.at(NOBODY).subject,
        topics.CANCEL.at(NOBODY, NOBODY).subject,
        topics.TRACE.at(NOBODY, NOBODY).subject,
        topics.BATCH_SUBMIT.at(NOBODY).subject,
        topics.BATCH_STATUS.at(NOBODY).subject,
        topics.BATCH_RESULT.at(NOBODY).subject,
        topics.BATCH_CANCEL.at(NOBODY).subject,
        topics.LEASES.at().subject,
        f"$SRV.STATS.{NOBODY}",
        f"$SRV.PING.{NOBODY}",
        topics.BATCH_ITEM.at(NOBODY, NOBODY, 0).subject,
        f"$KV.{subjects.KV_BATCHES}.{NOBODY}.batch",
        f"$JS.API.STREAM.INFO.KV_{subjects.KV_SHARDS}",
    )


_GATEWAY: Final = (
    *_client(),
    topics.INSPECT.at(NOBODY, NOBODY).subject,
    f"$JS.API.STREAM.INFO.{subjects.STREAM_EVENTS}",
)
_COORDINATOR: Final = (
    topics.FRAMES.at(NOBODY, _RANGE, NOBODY).subject,
    topics.OPEN_ANY.at(NOBODY, _RANGE).subject,
    topics.OPEN.at(NOBODY).subject,
    topics.CLOSE.at(NOBODY).subject,
    topics.PING.at(NOBODY).subject,
    topics.STATS.at(NOBODY).subject,
    topics.LEASES.at().subject,
    topics.HEARTBEATS.at(NOBODY).subject,
    topics.ALIVE.at(NOBODY, NOBODY).subject,
    topics.GENERATE_AT.at(NOBODY, NOBODY).subject,
    topics.DEAD.at(NOBODY).subject,
    topics.EVENTS.at(NOBODY).subject,
    f"$KV.{subjects.KV_SESSIONS}.{NOBODY}.{NOBODY}",
    f"$KV.{subjects.KV_BATCHES}.{NOBODY}.running.0",
    "$JS.API.INFO",
    f"$JS.API.STREAM.INFO.KV_{subjects.KV_SESSIONS}",
    f"$JS.API.STREAM.INFO.{subjects.STREAM_BATCH}",
)
_SHARD: Final = (
    topics.FRAMES.at(NOBODY, _RANGE, NOBODY).subject,
    topics.TOKENS.at(NOBODY, NOBODY).subject,
    topics.LEASE.at(NOBODY, NOBODY).subject,
    topics.LEASES.at().subject,
    topics.EVENTS.at(NOBODY).subject,
    f"$KV.{subjects.KV_SHARDS}.{NOBODY}",
    f"$KV.{subjects.KV_PLACEMENT}.{NOBODY}",
    "$JS.API.INFO",
    f"$JS.API.STREAM.INFO.KV_{subjects.KV_SHARDS}",
    f"$JS.API.STREAM.INFO.OBJ_{subjects.OBJECTS_MODELS}",
)
_EVENTS: Final = (topics.EVENTS.any().subject,)

_NEEDS: Final[dict[Role, tuple[tuple[str, ...], tuple[str, ...]]]] = {
    "client": (_client(), ()),
    "gateway": (_GATEWAY, _EVENTS),
    "coordinator": (
        _COORDINATOR,
        (
            *_EVENTS,
            topics.GENERATE.at(NOBODY).subject,
            topics.GENERATE_AT.at(NOBODY, NOBODY).subject,
            topics.TOKENS.at(NOBODY, NOBODY).subject,
            topics.CANCEL.at(NOBODY, NOBODY).subject,
            topics.TRACE.at(NOBODY, NOBODY).subject,
            topics.INSPECT.at(NOBODY, NOBODY).subject,
            topics.ALIVE.at(NOBODY, NOBODY).subject,
            topics.HEARTBEATS.at(NOBODY).subject,
            topics.LEASE.at(NOBODY, NOBODY).subject,
            topics.BATCH_SUBMIT.at(NOBODY).subject,
            f"$SRV.PING.{NOBODY}",
        ),
    ),
    "shard": (
        _SHARD,
        (
            topics.FRAMES.at(NOBODY, _RANGE, NOBODY).subject,
            topics.OPEN_ANY.at(NOBODY, _RANGE).subject,
            topics.OPEN.at(NOBODY).subject,
            topics.DRAIN.at(NOBODY).subject,
            topics.LEASES.at().subject,
            topics.LEASE.at(NOBODY, NOBODY).subject,
            topics.HEARTBEATS.at(NOBODY).subject,
            f"$SRV.PING.{NOBODY}",
        ),
    ),
    "operator": (
        (
            *_GATEWAY,
            topics.DRAIN.at(NOBODY).subject,
            topics.LOAD.at(NOBODY).subject,
            topics.OPEN.at(NOBODY).subject,
            topics.CLOSE.at(NOBODY).subject,
            topics.PING.at(NOBODY).subject,
            topics.STATS.at(NOBODY).subject,
            topics.FRAMES.at(NOBODY, _RANGE, NOBODY).subject,
            f"$KV.{subjects.KV_PLACEMENT}.{NOBODY}",
            "$JS.API.INFO",
            f"$JS.API.STREAM.INFO.OBJ_{subjects.OBJECTS_MODELS}",
            f"$JS.API.STREAM.INFO.{subjects.STREAM_DEAD}",
        ),
        (*_EVENTS, topics.TOKENS.at(NOBODY, NOBODY).subject),
    ),
}
