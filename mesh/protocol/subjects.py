"""The names of the mesh on NATS: every subject, bucket, stream and queue group, made and taken apart here and nowhere else.

    mesh.v1.MODEL.generate                  a generation request                        queue group `coordinators`
    mesh.v1.MODEL.generate.INSTANCE         a request for a generation it has           that coordinator's process
    mesh.v1.MODEL.alive.INSTANCE            whether it lives                            that coordinator's process
    mesh.v1.MODEL.cancel.COORDINATOR        take a generation back                      that coordinator
    mesh.v1.MODEL.trace.COORDINATOR         where the time of a generation went         that coordinator
    mesh.v1.MODEL.layers.A-B                open a session on layers [A, B)             queue group `replicas`
    mesh.v1.MODEL.layers.A-B.SHARD          frames for that shard                       and, in mirror mode, the range's other shards
    mesh.v1.MODEL.tokens.COORDINATOR        frames for that coordinator: sampled tokens, acknowledgements, nacks
    mesh.v1.MODEL.coordinators              coordinators saying that they live          every shard and coordinator of the model
    mesh.v1.control.SHARD.VERB              open, close, drain, load, ping, stats       that shard
    mesh.v1.MODEL.batch                     a durable batch; .status, .result: of one   queue group `coordinators`
    mesh.v1.batches.MODEL.BATCH.INDEX       a request of a batch                        stream `mesh_batch`
    mesh.v1.events.KIND                     what happened                               anyone

The version of the protocol is in the name: other versions cannot meet. MODEL, SHARD and COORDINATOR are tokens: letters,
digits, `-` and `_`; `token` makes one of any name. INSTANCE is another one for each process.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Final, Literal

from mesh.errors import BadRequest
from mesh.types import LayerRange

__all__ = [
    "ANY_EVENT",
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
    "STREAM_EVENTS",
    "VERSION",
    "Verb",
    "alive",
    "all_frames",
    "batch",
    "batch_item",
    "batch_items",
    "cancel",
    "check_token",
    "control",
    "coordinators",
    "event",
    "frames",
    "generate",
    "generate_at",
    "is_token",
    "layers",
    "token",
    "tokens",
    "trace",
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
STREAM_EVENTS: Final = "mesh_events"

LEASE_TTL_S: Final = 5.0
"""How long a lease counts that is not renewed: the TTL of KV_SHARDS, the same for everyone who opens it."""

MAX_TOKEN = 64
ANY_EVENT: Final = f"mesh.{VERSION}.events.>"
DISCONNECTS: Final = "$SYS.ACCOUNT.*.DISCONNECT"
"""Connections that have ended, as the server tells those whom its system account lets hear it (nats/advisories.conf)."""

Verb = Literal["open", "close", "drain", "load", "ping", "stats"]

_TOKEN = re.compile(rf"[A-Za-z0-9_-]{{1,{MAX_TOKEN}}}")


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


def generate(model: str) -> str:
    return f"mesh.{VERSION}.{token(model)}.generate"


def generate_at(model: str, instance: str) -> str:
    return f"{generate(model)}.{check_token(instance, 'instance')}"


def alive(model: str, instance: str) -> str:
    return f"mesh.{VERSION}.{token(model)}.alive.{check_token(instance, 'instance')}"


def batch(model: str, verb: Literal["submit", "status", "result"] = "submit") -> str:
    subject = f"mesh.{VERSION}.{token(model)}.batch"
    return subject if verb == "submit" else f"{subject}.{verb}"


def batch_item(model: str, id: str, index: int) -> str:
    return f"mesh.{VERSION}.batches.{token(model)}.{check_token(id, 'id')}.{index}"


def batch_items(model: str = "*") -> str:
    """Of one model, or of all."""
    return f"mesh.{VERSION}.batches.{model if model == '*' else token(model)}.>"


def cancel(model: str, coordinator: str) -> str:
    return f"mesh.{VERSION}.{token(model)}.cancel.{check_token(coordinator, 'coordinator')}"


def trace(model: str, coordinator: str) -> str:
    return f"mesh.{VERSION}.{token(model)}.trace.{check_token(coordinator, 'coordinator')}"


def layers(model: str, held: LayerRange) -> str:
    return f"mesh.{VERSION}.{token(model)}.layers.{held}"


@lru_cache(maxsize=1024)
def frames(model: str, held: LayerRange, shard: str) -> str:
    return f"{layers(model, held)}.{check_token(shard, 'shard')}"


def all_frames(model: str, held: LayerRange) -> str:
    """The frames of every replica of a range: what a shard in mirror mode follows."""
    return f"{layers(model, held)}.*"


@lru_cache(maxsize=1024)
def tokens(model: str, coordinator: str) -> str:
    return f"mesh.{VERSION}.{token(model)}.tokens.{check_token(coordinator, 'coordinator')}"


def coordinators(model: str) -> str:
    return f"mesh.{VERSION}.{token(model)}.coordinators"


def control(shard: str, verb: Verb) -> str:
    return f"mesh.{VERSION}.control.{check_token(shard, 'shard')}.{verb}"


def event(kind: str) -> str:
    return f"mesh.{VERSION}.events.{check_token(kind, 'kind')}"
