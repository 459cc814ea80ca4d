"""Which subject carries which message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mesh.protocol import subjects
from mesh.protocol.batches import BatchQuery, BatchResults, BatchStatus, BatchSubmit
from mesh.protocol.control import Close, Closed, Drain, Drained, Load, Loaded, Open, Opened, Ping, Pong
from mesh.protocol.events import Event
from mesh.protocol.generation import Cancel, Generate, TraceRequest
from mesh.protocol.message import Message
from mesh.protocol.status import Alive, Beat, ShardStats, StatsRequest

__all__ = ["TOPICS", "Topic"]


@dataclass(frozen=True, slots=True)
class Topic:
    """One kind of subject. `request` and `reply` are message types; None is no reply; "frame" is mesh.protocol.frame.Frame.

    `generate` answers with a document the coordinator's service describes (streams are many), so its reply is "json".
    """

    pattern: str
    request: type[Message] | Literal["frame"]
    reply: type[Message] | Literal["json"] | None
    queue: str | None = None


TOPICS: tuple[Topic, ...] = (
    Topic("mesh.v1.MODEL.generate", Generate, "json", subjects.COORDINATORS_QUEUE),
    Topic("mesh.v1.MODEL.generate.INSTANCE", Generate, "json"),
    Topic("mesh.v1.MODEL.alive.INSTANCE", Alive, Beat),
    Topic("mesh.v1.MODEL.cancel.COORDINATOR", Cancel, None),
    Topic("mesh.v1.MODEL.trace.COORDINATOR", TraceRequest, "json"),
    Topic("mesh.v1.MODEL.layers.A-B", Open, Opened, subjects.REPLICAS_QUEUE),
    Topic("mesh.v1.MODEL.layers.A-B.SHARD", "frame", None),
    Topic("mesh.v1.MODEL.tokens.COORDINATOR", "frame", None),
    Topic("mesh.v1.MODEL.coordinators", Beat, None),
    Topic("mesh.v1.control.SHARD.open", Open, Opened),
    Topic("mesh.v1.control.SHARD.close", Close, Closed),
    Topic("mesh.v1.control.SHARD.drain", Drain, Drained),
    Topic("mesh.v1.control.SHARD.load", Load, Loaded),
    Topic("mesh.v1.control.SHARD.ping", Ping, Pong),
    Topic("mesh.v1.control.SHARD.stats", StatsRequest, ShardStats),
    Topic("mesh.v1.MODEL.batch", BatchSubmit, BatchStatus, subjects.COORDINATORS_QUEUE),
    Topic("mesh.v1.MODEL.batch.status", BatchQuery, BatchStatus, subjects.COORDINATORS_QUEUE),
    Topic("mesh.v1.MODEL.batch.result", BatchQuery, BatchResults, subjects.COORDINATORS_QUEUE),
    Topic("mesh.v1.batches.MODEL.BATCH.INDEX", Generate, None),
    Topic("mesh.v1.events.KIND", Event, None),
)
