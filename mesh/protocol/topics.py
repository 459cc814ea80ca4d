"""Which subject carries which message: every topic of the mesh, declared once.

A topic has a subject template, the types of its request and its reply, its queue group, and who listens. `TOPIC.at(...)` is an Address:
a subject that knows its topic. The bus sends and requests JSON on addresses alone, so both ends agree on the types. A topic also names the
roles that send it and those that hear it: users of NATS get their permissions from that (mesh/protocol/rights.py).

`python -m mesh.protocol.topics` prints the table in nats/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from mesh.errors import MessageRejected
from mesh.protocol import subjects
from mesh.protocol.batches import BatchQuery, BatchResults, BatchStatus, BatchSubmit, DeadMessage
from mesh.protocol.control import Close, Closed, Drain, Drained, Load, Loaded, Open, Opened, OpenedMany, OpenMany, Ping, Pong
from mesh.protocol.events import Event
from mesh.protocol.frame import Frame
from mesh.protocol.generation import Cancel, Generate, TraceReply, TraceRequest
from mesh.protocol.message import Message
from mesh.protocol.roles import Role
from mesh.protocol.spans import SpanBatch
from mesh.protocol.status import Alive, Heartbeat, KeptPrefix, LeaseQuery, ShardLease, ShardStats, StatsRequest, TraceList, TraceQuery
from mesh.protocol.tokenizing import Detokenize, Detokenized, Tokenize, Tokenized
from mesh.protocol.usage import UsageQuery, UsageReport, UsageSpent
from mesh.types import LayerRange

__all__ = [
    "ALIVE",
    "BATCH_CANCEL",
    "BATCH_ITEM",
    "BATCH_RESULT",
    "BATCH_STATUS",
    "BATCH_SUBMIT",
    "CANCEL",
    "CLOSE",
    "DEAD",
    "DETOKENIZE",
    "DRAIN",
    "EVENTS",
    "FRAMES",
    "GENERATE",
    "GENERATE_AT",
    "HEARTBEATS",
    "INSPECT",
    "KEPT",
    "LEASE",
    "LEASES",
    "LOAD",
    "OPEN",
    "OPEN_ANY",
    "OPEN_MANY",
    "PING",
    "SPANS",
    "STATS",
    "TOKENIZE",
    "TOKENS",
    "TOPICS",
    "TRACE",
    "TRACES",
    "USAGE",
    "USAGE_SPENT",
    "Address",
    "Topic",
    "table",
]

Request = TypeVar("Request")
Reply = TypeVar("Reply")
M = TypeVar("M", bound=Message)


@dataclass(frozen=True, slots=True)
class Topic(Generic[Request, Reply]):
    """One kind of subject. A word in capitals in `template` stands for one token.

    `request` is a Message, or Frame. `reply` None: there is no reply, or `answers` says which. `purpose` and `listens` are words for
    people; with a queue group, one of its members gets each request. `sends`, `hears`: the roles that publish it, and those that subscribe
    to it. An operator may do both, and is in neither.
    """

    template: str
    request: type[Request]
    reply: type[Reply] | None
    purpose: str
    listens: str = ""
    queue: str = ""
    answers: str = ""
    sends: tuple[Role, ...] = ()
    hears: tuple[Role, ...] = ()

    def at(self, *parts: str | int | LayerRange) -> Address[Request, Reply]:
        """The address with `parts` in the places of the template, in order. BadRequest: a part is not a token."""
        words, values = self.template.split("."), iter(parts)
        if sum(word.isupper() for word in words) != len(parts):
            raise TypeError(f"{self.template} does not have {len(parts)} places")
        return Address(".".join([_token(word, next(values)) if word.isupper() else word for word in words]), self)

    def pattern(self, **places: str) -> str:
        """The subject of a permission: `*` in each place of the template that `places` does not fill (SHARD="shard-1")."""
        words = self.template.split(".")
        return ".".join(places.get(word.replace("-", "_"), "*") if word.isupper() else word for word in words)

    def every(self, *parts: str) -> Address[Request, Reply]:
        """The address with `parts` in the first places of the template, in order, and `*` in all others."""
        values = iter(parts)
        words = [
            (_token(word, part) if (part := next(values, None)) else "*") if word.isupper() else word for word in self.template.split(".")
        ]
        return Address(".".join(words), self)

    def any(self, *parts: str) -> Address[Request, Reply]:
        """The wildcard address of every subject that begins with `parts`; a part may be `*`."""
        made, values = [], iter(parts)
        for word in self.template.split("."):
            part = next(values, None) if word.isupper() else word
            if part is None:
                break
            made.append(_token(word, part) if word.isupper() and part != "*" else part)
        return Address(".".join([*made, ">"]), self)

    def read(self, subject: str) -> Address[Request, Reply]:
        """The address of a subject that another process named. MessageRejected: it is not a subject of this topic."""
        words, given = self.template.split("."), subject.split(".")
        same = (subjects.is_token(part) if word.isupper() else part == word for word, part in zip(words, given, strict=False))
        if len(words) != len(given) or not all(same):
            raise MessageRejected(f"{subject!r} is not a subject of the kind {self.template}")
        return Address(subject, self)

    def parse(self: Topic[M, Any], data: bytes) -> M:
        """The request in `data`; no data is a request without fields. MessageRejected names the key that is wrong."""
        return self.request.parse(data or b"{}")


@dataclass(frozen=True, slots=True)
class Address(Generic[Request, Reply]):
    """One subject of a topic. Topics make them."""

    subject: str
    topic: Topic[Request, Reply]

    def __str__(self) -> str:
        return self.subject


def _token(place: str, part: str | int | LayerRange) -> str:
    if not isinstance(part, str):
        return str(part)
    return subjects.token(part) if place == "MODEL" else subjects.check_token(part, "id" if place == "BATCH" else place.lower())


_ASK: tuple[Role, ...] = ("client", "gateway", "coordinator")  # a coordinator serves HTTP itself, as its own user
_LOOK: tuple[Role, ...] = ("gateway", "coordinator", "monitor")
_STREAM = "documents of `mesh/protocol/stream.py`"

GENERATE: Topic[Generate, None] = Topic(
    "mesh.v1.MODEL.generate",
    Generate,
    None,
    "generate text or tokens",
    queue=subjects.COORDINATORS_QUEUE,
    answers=_STREAM,
    sends=_ASK,
    hears=("coordinator",),
)
GENERATE_AT: Topic[Generate, None] = Topic(
    "mesh.v1.MODEL.generate.INSTANCE",
    Generate,
    None,
    "go on with a generation that this coordinator has",
    "that coordinator's process",
    answers=_STREAM,
    sends=("coordinator",),
    hears=("coordinator",),
)
CANCEL: Topic[Cancel, None] = Topic(
    "mesh.v1.MODEL.cancel.COORDINATOR",
    Cancel,
    None,
    "stop a generation",
    "that coordinator",
    sends=_ASK,
    hears=("coordinator",),
)
TOKENIZE: Topic[Tokenize, Tokenized] = Topic(
    "mesh.v1.MODEL.tokenize",
    Tokenize,
    Tokenized,
    "say which tokens a text or messages are",
    queue=subjects.COORDINATORS_QUEUE,
    sends=_ASK,
    hears=("coordinator",),
)
DETOKENIZE: Topic[Detokenize, Detokenized] = Topic(
    "mesh.v1.MODEL.detokenize",
    Detokenize,
    Detokenized,
    "say which text tokens are",
    queue=subjects.COORDINATORS_QUEUE,
    sends=_ASK,
    hears=("coordinator",),
)
TRACE: Topic[TraceRequest, TraceReply] = Topic(
    "mesh.v1.MODEL.trace.COORDINATOR",
    TraceRequest,
    TraceReply,
    "say where the time of a generation went",
    "that coordinator",
    sends=_ASK,
    hears=("coordinator",),
)
INSPECT: Topic[TraceRequest, TraceReply] = Topic(
    "mesh.v1.MODEL.inspect.COORDINATOR",
    TraceRequest,
    TraceReply,
    "the same by its public id, for operators",
    "that coordinator",
    sends=_LOOK,
    hears=("coordinator",),
)
TRACES: Topic[TraceQuery, TraceList] = Topic(
    "mesh.v1.MODEL.traces.COORDINATOR",
    TraceQuery,
    TraceList,
    "list the last generations, for operators",
    "that coordinator",
    sends=_LOOK,
    hears=("coordinator",),
)
SPANS: Topic[SpanBatch, None] = Topic(
    "mesh.v1.spans",
    SpanBatch,
    None,
    "keep the spans of a gateway or a shard",
    "every coordinator",
    sends=("gateway", "shard", "coordinator"),
    hears=("coordinator",),
)
ALIVE: Topic[Alive, Heartbeat] = Topic(
    "mesh.v1.MODEL.alive.INSTANCE",
    Alive,
    Heartbeat,
    "ask a coordinator whether it lives",
    "that coordinator's process",
    sends=("coordinator",),
    hears=("coordinator",),
)
HEARTBEATS: Topic[Heartbeat, None] = Topic(
    "mesh.v1.MODEL.coordinators",
    Heartbeat,
    None,
    "a coordinator says that it lives",
    "every shard and coordinator of the model",
    sends=("coordinator",),
    hears=("coordinator", "shard"),
)
KEPT: Topic[KeptPrefix, None] = Topic(
    "mesh.v1.MODEL.kept",
    KeptPrefix,
    None,
    "say what rows of shards hold that another session may begin with",
    "every coordinator of the model",
    sends=("coordinator",),
    hears=("coordinator",),
)
LEASE: Topic[ShardLease, None] = Topic(
    "mesh.v1.MODEL.shards.SHARD",
    ShardLease,
    None,
    "a shard says what it serves",
    "every coordinator of the model",
    sends=("shard", "provisioner"),
    hears=("coordinator", "shard", "monitor"),
)
LEASES: Topic[LeaseQuery, ShardLease] = Topic(
    "mesh.v1.shards",
    LeaseQuery,
    ShardLease,
    "ask what every shard serves",
    "every shard",
    sends=("client", "gateway", "coordinator", "shard", "monitor", "provisioner"),
    hears=("shard",),
)
OPEN_ANY: Topic[Open, Opened] = Topic(
    "mesh.v1.MODEL.layers.A-B",
    Open,
    Opened,
    "open a session on layers [A, B)",
    queue=subjects.REPLICAS_QUEUE,
    sends=("coordinator",),
    hears=("shard",),
)
FRAMES: Topic[Frame, Frame] = Topic(
    "mesh.v1.MODEL.layers.A-B.SHARD",
    Frame,
    Frame,
    "compute a step",
    "that shard; in mirror mode its range",
    answers="to the frame's next subject",
    sends=("coordinator", "shard"),
    hears=("shard",),
)
TOKENS: Topic[Frame, None] = Topic(
    "mesh.v1.MODEL.tokens.INSTANCE",
    Frame,
    None,
    "give a coordinator sampled tokens, acknowledgements and nacks",
    "that coordinator's process",
    sends=("shard",),
    hears=("coordinator",),
)
OPEN: Topic[Open, Opened] = Topic(
    "mesh.v1.control.SHARD.open",
    Open,
    Opened,
    "open a session on this shard",
    "that shard",
    sends=("coordinator",),
    hears=("shard",),
)
OPEN_MANY: Topic[OpenMany, OpenedMany] = Topic(
    "mesh.v1.control.SHARD.open-many",
    OpenMany,
    OpenedMany,
    "open several sessions on this shard",
    "that shard",
    sends=("coordinator",),
    hears=("shard",),
)
CLOSE: Topic[Close, Closed] = Topic(
    "mesh.v1.control.SHARD.close",
    Close,
    Closed,
    "close sessions and free their rows",
    "that shard",
    sends=("coordinator",),
    hears=("shard",),
)
DRAIN: Topic[Drain, Drained] = Topic(
    "mesh.v1.control.SHARD.drain",
    Drain,
    Drained,
    "take no new sessions, and stop",
    "that shard",
    sends=("provisioner",),
    hears=("shard",),
)
LOAD: Topic[Load, Loaded] = Topic(
    "mesh.v1.control.SHARD.load",
    Load,
    Loaded,
    "serve another range of layers",
    "that shard",
    sends=("provisioner",),
    hears=("shard",),
)
PING: Topic[Ping, Pong] = Topic(
    "mesh.v1.control.SHARD.ping",
    Ping,
    Pong,
    "ask a shard whether it lives, and what it is doing",
    "that shard",
    sends=("coordinator", "monitor"),
    hears=("shard",),
)
STATS: Topic[StatsRequest, ShardStats] = Topic(
    "mesh.v1.control.SHARD.stats",
    StatsRequest,
    ShardStats,
    "report counts and times",
    "that shard",
    sends=("coordinator", "shard", "monitor", "provisioner"),
    hears=("shard",),
)
BATCH_SUBMIT: Topic[BatchSubmit, BatchStatus] = Topic(
    "mesh.v1.MODEL.batch",
    BatchSubmit,
    BatchStatus,
    "submit a durable batch",
    queue=subjects.COORDINATORS_QUEUE,
    sends=_ASK,
    hears=("coordinator",),
)
BATCH_STATUS: Topic[BatchQuery, BatchStatus] = Topic(
    "mesh.v1.MODEL.batch.status",
    BatchQuery,
    BatchStatus,
    "say how far a batch is",
    queue=subjects.COORDINATORS_QUEUE,
    sends=_ASK,
    hears=("coordinator",),
)
BATCH_RESULT: Topic[BatchQuery, BatchResults] = Topic(
    "mesh.v1.MODEL.batch.result",
    BatchQuery,
    BatchResults,
    "give results of a batch",
    queue=subjects.COORDINATORS_QUEUE,
    sends=_ASK,
    hears=("coordinator",),
)
BATCH_CANCEL: Topic[BatchQuery, BatchStatus] = Topic(
    "mesh.v1.MODEL.batch.cancel",
    BatchQuery,
    BatchStatus,
    "take a batch back",
    queue=subjects.COORDINATORS_QUEUE,
    sends=_ASK,
    hears=("coordinator",),
)
BATCH_ITEM: Topic[Generate, None] = Topic(
    "mesh.v1.batches.MODEL.BATCH.INDEX",
    Generate,
    None,
    "keep one request of a batch",
    "the stream `mesh_batch`",
    sends=_ASK,
)
DEAD: Topic[DeadMessage, None] = Topic(
    "mesh.v1.dead.MODEL",
    DeadMessage,
    None,
    "say which message of a queue was set aside",
    "the stream `mesh_dead`",
    sends=("coordinator",),
)
EVENTS: Topic[Event, None] = Topic(
    "mesh.v1.events.KIND",
    Event,
    None,
    "say what has happened",
    "anyone, and the stream `mesh_events`",
    sends=("coordinator", "shard", "provisioner"),
    hears=("coordinator", "gateway", "monitor"),
)
USAGE_SPENT: Topic[UsageSpent, None] = Topic(
    "mesh.v1.usage.spent",
    UsageSpent,
    None,
    "say what callers of a gateway have spent of their quotas",
    "every gateway",
    sends=("gateway", "coordinator"),
    hears=("gateway", "coordinator"),
)
USAGE: Topic[UsageQuery, UsageReport] = Topic(
    "mesh.v1.usage",
    UsageQuery,
    UsageReport,
    "ask every gateway what subjects have used",
    "every gateway",
    sends=("gateway", "coordinator", "monitor"),
    hears=("gateway", "coordinator"),
)

TOPICS: tuple[Topic[Any, Any], ...] = (
    GENERATE,
    GENERATE_AT,
    CANCEL,
    TOKENIZE,
    DETOKENIZE,
    TRACE,
    INSPECT,
    TRACES,
    SPANS,
    ALIVE,
    HEARTBEATS,
    KEPT,
    LEASE,
    LEASES,
    OPEN_ANY,
    FRAMES,
    TOKENS,
    OPEN,
    OPEN_MANY,
    CLOSE,
    DRAIN,
    LOAD,
    PING,
    STATS,
    BATCH_SUBMIT,
    BATCH_STATUS,
    BATCH_RESULT,
    BATCH_CANCEL,
    BATCH_ITEM,
    DEAD,
    EVENTS,
    USAGE_SPENT,
    USAGE,
)


def table() -> str:
    """Every topic as one line of a Markdown table."""
    lines = ["| subject | what for | who listens | request | reply |", "|---|---|---|---|---|"]
    for topic in TOPICS:
        listens = topic.listens or f"queue group `{topic.queue}`"
        request = "frame" if topic.request is Frame else f"`{topic.request.__name__}`"
        reply = topic.answers or ("" if topic.reply is None else f"`{topic.reply.__name__}`")
        lines.append(f"| `{topic.template}` | {topic.purpose} | {listens} | {request} | {reply} |".replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
