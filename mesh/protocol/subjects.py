"""The names of the mesh on NATS: version, tokens, buckets, streams and queue groups, and the subjects of frames.

The version of the protocol is in every subject, so that processes of different versions do not meet. Models, shards and coordinators
are named by tokens: letters, digits, `-` and `_`. `token` makes one of any name. The subjects of JSON messages are made by
mesh/protocol/topics.py, which also describes those of frames; the functions here are their fast path.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final

from mesh.errors import BadRequest
from mesh.settings.defaults import INBOX_ROOT
from mesh.types import LayerRange

__all__ = [
    "COORDINATORS_QUEUE",
    "DISCONNECTS",
    "KV_BATCHES",
    "KV_PLACEMENT",
    "KV_RESPONSES",
    "KV_SESSIONS",
    "KV_SHARDS",
    "LEASE_TTL_S",
    "OBJECTS_MODELS",
    "RENEW_S",
    "REPLICAS_QUEUE",
    "SERVER_TRACES",
    "SERVICE_COORDINATOR",
    "SERVICE_SHARD",
    "STREAM_BATCH",
    "STREAM_DEAD",
    "STREAM_EVENTS",
    "VERSION",
    "all_frames",
    "check_token",
    "frames",
    "is_inbox",
    "is_token",
    "server_traces",
    "token",
    "tokens",
]

VERSION: Final = "v1"
COORDINATORS_QUEUE: Final = "coordinators"
REPLICAS_QUEUE: Final = "replicas"

SERVICE_COORDINATOR: Final = "mesh-coordinator"
SERVICE_SHARD: Final = "mesh-shard"
"""The names of the micro services: $SRV.PING.mesh-shard asks every shard."""

KV_SHARDS: Final = "mesh_shards"
KV_PLACEMENT: Final = "mesh_placement"
KV_SESSIONS: Final = "mesh_sessions"
OBJECTS_MODELS: Final = "mesh_models"
KV_BATCHES: Final = "mesh_batches"
KV_RESPONSES: Final = "mesh_responses"
STREAM_BATCH: Final = "mesh_batch"
STREAM_DEAD: Final = "mesh_dead"
STREAM_EVENTS: Final = "mesh_events"

RENEW_S: Final = 1.5
"""How often a shard says its lease."""
LEASE_TTL_S: Final = 5.0
"""How long a lease counts that is not renewed: the TTL of KV_SHARDS. Every process that opens the bucket uses the same one."""

MAX_TOKEN = 64
DISCONNECTS: Final = "$SYS.ACCOUNT.*.DISCONNECT"
"""The server's reports of connections that have ended. nats/advisories.conf lets coordinators hear them."""

_TOKEN = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_TOKEN}}}")


_INBOX = re.compile(rf"{INBOX_ROOT}(\.[!-)+,/-=?-~-]+)+")


def is_inbox(subject: str) -> bool:
    """Whether answers may go to this subject: it is below `_INBOX` or `_INBOX_NAME`. A process that answers has rights that its caller
    lacks, so it must not write where the caller tells it to, such as into a key-value bucket."""
    return _INBOX.fullmatch(subject) is not None


def is_token(text: str) -> bool:
    return _TOKEN.fullmatch(text) is not None


def token(name: str) -> str:
    """`name` as one token of a subject: every character except letters, digits, - and _ becomes _."""
    made = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:MAX_TOKEN]
    if not made:
        raise BadRequest("a name is empty: give letters, digits, - and _", field="name")
    return made


def check_token(text: str, field: str) -> str:
    """`text` itself if it is a token. BadRequest names `field`. So no text of a caller can reach into another subject."""
    if not is_token(text):
        raise BadRequest(f"{field} is {text!r}: give letters, digits, - and _, at most {MAX_TOKEN}", field=field)
    return text


@lru_cache(maxsize=1024)
def frames(model: str, held: LayerRange, shard: str) -> str:
    return f"mesh.{VERSION}.{token(model)}.layers.{held}.{check_token(shard, 'shard')}"


def all_frames(model: str, held: LayerRange) -> str:
    """The subject of the frames of every replica of a range. A shard in mirror mode follows it."""
    return f"mesh.{VERSION}.{token(model)}.layers.{held}.*"


@lru_cache(maxsize=1024)
def tokens(model: str, coordinator: str) -> str:
    return f"mesh.{VERSION}.{token(model)}.tokens.{check_token(coordinator, 'coordinator')}"


SERVER_TRACES: Final = f"mesh.{VERSION}.servertraces.*"
"""Every subject of `server_traces`."""


@lru_cache(maxsize=1024)
def server_traces(coordinator: str) -> str:
    """Where nats-server reports the frames of traced steps of this coordinator."""
    return f"mesh.{VERSION}.servertraces.{check_token(coordinator, 'coordinator')}"
