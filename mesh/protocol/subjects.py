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
    "KV_SESSIONS",
    "KV_SHARDS",
    "LEASE_TTL_S",
    "OBJECTS_MODELS",
    "REPLICAS_QUEUE",
    "STREAM_BATCH",
    "STREAM_DEAD",
    "STREAM_EVENTS",
    "VERSION",
    "all_frames",
    "check_token",
    "frames",
    "is_inbox",
    "is_token",
    "token",
    "tokens",
]

VERSION: Final = "v1"
COORDINATORS_QUEUE: Final = "coordinators"
REPLICAS_QUEUE: Final = "replicas"

KV_SHARDS: Final = "mesh_shards"
KV_PLACEMENT: Final = "mesh_placement"
KV_SESSIONS: Final = "mesh_sessions"
OBJECTS_MODELS: Final = "mesh_models"
KV_BATCHES: Final = "mesh_batches"
STREAM_BATCH: Final = "mesh_batch"
STREAM_DEAD: Final = "mesh_dead"
STREAM_EVENTS: Final = "mesh_events"

LEASE_TTL_S: Final = 5.0
"""How long a lease counts that is not renewed: the TTL of KV_SHARDS, the same for everyone who opens it."""

MAX_TOKEN = 64
DISCONNECTS: Final = "$SYS.ACCOUNT.*.DISCONNECT"
"""Connections that have ended, as the server tells those whom its system account lets hear it (nats/advisories.conf)."""

_TOKEN = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_TOKEN}}}")


_INBOX = re.compile(rf"{INBOX_ROOT}(\.[!-)+,/-=?-~-]+)+")


def is_inbox(subject: str) -> bool:
    """Whether answers may go to this subject: it is below `_INBOX` or `_INBOX_NAME`. A process that answers has rights that its caller
    lacks, so it must not write where the caller tells it to, such as into a key-value bucket."""
    return _INBOX.fullmatch(subject) is not None


def is_token(text: str) -> bool:
    return _TOKEN.fullmatch(text) is not None


def token(name: str) -> str:
    """`name` as one token of a subject: what else it holds than letters, digits, - and _ becomes _."""
    made = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:MAX_TOKEN]
    if not made:
        raise BadRequest("a name is empty: give letters, digits, - and _", field="name")
    return made


def check_token(text: str, field: str) -> str:
    """`text` itself, or BadRequest naming `field`: nothing a caller writes may reach into another subject."""
    if not is_token(text):
        raise BadRequest(f"{field} is {text!r}: give letters, digits, - and _, at most {MAX_TOKEN}", field=field)
    return text


@lru_cache(maxsize=1024)
def frames(model: str, held: LayerRange, shard: str) -> str:
    return f"mesh.{VERSION}.{token(model)}.layers.{held}.{check_token(shard, 'shard')}"


def all_frames(model: str, held: LayerRange) -> str:
    """The frames of every replica of a range: what a shard in mirror mode follows."""
    return f"mesh.{VERSION}.{token(model)}.layers.{held}.*"


@lru_cache(maxsize=1024)
def tokens(model: str, coordinator: str) -> str:
    return f"mesh.{VERSION}.{token(model)}.tokens.{check_token(coordinator, 'coordinator')}"
