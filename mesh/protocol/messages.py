"""The JSON messages of the mesh: frozen, strict, and one type a subject (TOPICS).

Frames (mesh/protocol/frame_codec.py) carry what is computed; these carry what is asked and said about it. No token between shards
is ever one of these.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mesh.errors import (
    BadRequest,
    Busy,
    Cancelled,
    DeadlineExceeded,
    Denied,
    MeshError,
    MessageRejected,
    PayloadTooLarge,
    PromptTooLong,
    Unavailable,
)
from mesh.protocol import subjects
from mesh.types import LayerRange

__all__ = [
    "TOPICS",
    "Alive",
    "BatchItem",
    "BatchQuery",
    "BatchResults",
    "BatchState",
    "BatchStatus",
    "BatchSubmit",
    "Beat",
    "Cancel",
    "ChatMessage",
    "Close",
    "Closed",
    "Drain",
    "Drained",
    "ErrorReply",
    "Event",
    "EventKind",
    "Generate",
    "Message",
    "Open",
    "Opened",
    "Ping",
    "Pong",
    "Sampling",
    "ShardLease",
    "ShardStats",
    "StatsRequest",
    "Topic",
    "TraceRequest",
]

M = TypeVar("M", bound="Message")

Token = Annotated[str, Field(pattern=rf"^[A-Za-z0-9_-]{{1,{subjects.MAX_TOKEN}}}$")]
SessionId = Annotated[int, Field(ge=1, lt=2**63)]
Epoch = Annotated[int, Field(ge=0, lt=2**32)]
Natural = Annotated[int, Field(ge=0)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Message(BaseModel):
    """Base of all. `to_bytes` and `parse` are inverse; what cannot be parsed is a MessageRejected that names the key."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    limit_bytes: ClassVar[int] = 64 * 1024  # the most a message of this type may be, so that nobody parses what nobody needs

    def to_bytes(self) -> bytes:
        return orjson.dumps(self.model_dump(mode="json"))

    @classmethod
    def parse(cls: type[M], data: bytes) -> M:
        if len(data) > cls.limit_bytes:
            raise MessageRejected(f"a {cls.__name__} of {len(data):,} bytes: at most {cls.limit_bytes:,} are read")
        try:
            return cls.model_validate_json(data)
        except ValidationError as error:
            first = min(error.errors(include_url=False, include_context=False), key=lambda problem: problem["type"] != "extra_forbidden")
            field = ".".join(str(part) for part in first["loc"])
            message = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
            if first["type"] == "json_invalid":
                message = "this is not JSON: send one JSON object"
            elif first["type"] == "extra_forbidden":
                message = f"is not a key here: there are {', '.join(cls.model_fields)}"
            raise MessageRejected(f"{field}: {message}" if field else message, field=field) from None


# -- asking a coordinator ----------------------------------------------------------------------------------------------


class ChatMessage(Message):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Sampling(Message):
    """How the next token is chosen; the fields, ranges and defaults of mesh.runtime.sampling.SamplingParams, checked there."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Generate(Message):
    """A generation request: exactly one of prompt, messages and tokens.

    `seed` None: drawn by the coordinator. `session`: the caller's own name for the request, so that a repeated one is the same.
    `raw`: the prompt goes as it is, without the chat template that a chat model otherwise has around it.
    `attempt`: how often a named request was asked before; 0 promises that it is the first time. `given`: the tokens of it that the
    caller has: the answer goes on after them.
    """

    limit_bytes: ClassVar[int] = 4 * 1024 * 1024

    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    tokens: tuple[TokenId, ...] | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    raw: bool = False
    stream: bool = False
    session: Token | None = None
    attempt: Natural | None = None
    given: tuple[TokenId, ...] = ()

    @model_validator(mode="after")
    def _one_input(self) -> Generate:
        if sum(given is not None for given in (self.prompt, self.messages, self.tokens)) != 1:
            raise ValueError("give exactly one of prompt, messages and tokens")
        return self


class Cancel(Message):
    """`request` is what the coordinator named the generation in its first message."""

    request: Token


class TraceRequest(Message):
    """Ask a coordinator where the time of a generation went, by its name: one that runs, or one of the last that ended."""

    request: Token


# -- between coordinator and shard -------------------------------------------------------------------------------------


class Open(Message):
    """Take a row for a session on this range. Idempotent: a session already open here keeps its row and what is in it.

    A higher epoch fences every frame of a lower one; a lower one is refused (MessageRejected, field epoch). `keep` says how many
    positions of the row's cache may be kept when the session was open here before: those computed from the same tokens.
    """

    session: SessionId
    epoch: Epoch
    coordinator: Token
    model_hash: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    prompt_length: Natural  # penalties count from here on
    keep: Natural = 0
    sampling: Sampling = Sampling()  # used by the last stage


class Opened(Message):
    """The replica that took it, its row, and the positions its cache already holds (0 unless the session was here before)."""

    session: SessionId
    epoch: Epoch
    shard: Token
    instance: Token
    layers_start: Natural
    layers_end: Natural
    row: Natural
    filled: Natural
    context: Annotated[int, Field(ge=1)]
    chunk: Annotated[int, Field(ge=1)]

    @property
    def layers(self) -> LayerRange:
        return LayerRange(self.layers_start, self.layers_end)


class Close(Message):
    """Free the rows of these sessions, or with `all` of every session of this coordinator. Unknown ones are no error.
    A session that was opened again with a later epoch than `epoch` stays: the message may have been overtaken."""

    coordinator: Token
    sessions: Annotated[tuple[SessionId, ...], Field(max_length=4096)] = ()
    all: bool = False
    epoch: Epoch = 2**32 - 1


class Closed(Message):
    closed: Natural
    free_rows: Natural


class Beat(Message):
    """A coordinator lives. Shards free what it held when it has been silent for `ttl_s`, and what is missing from `sessions` twice in
    a row (None: it does not say): an answer to an opening, or a closing, may be lost. `instance`: its process. `leaving`: it has
    ended in order, and what it had not finished is there for the others."""

    coordinator: Token
    ttl_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    sessions: Annotated[tuple[SessionId, ...], Field(max_length=2048)] | None = None
    instance: Token | None = None
    leaving: bool = False


class Alive(Message):
    """Ask a coordinator whether it lives; its Beat is the answer."""


class Ping(Message):
    """Are you there, and have you work of mine? Answered by the event loop, however busy the compute thread is."""

    coordinator: Token


class Pong(Message):
    """`pending`: the steps of that coordinator that have arrived here and have not gone on yet."""

    shard: Token
    instance: Token
    pending: tuple[Natural, ...] = ()


class Drain(Message):
    """Take no new sessions, wait up to `timeout_s` for the open ones to be moved or finished, then stop (`stop`)."""

    timeout_s: Annotated[float, Field(ge=0, le=86400)] = 30.0
    stop: bool = True


class Drained(Message):
    """Draining has begun; `sessions` are still open."""

    shard: Token
    sessions: Natural


class Load(Message):
    """Serve another range, of the layers that are held. Sessions that are open may end for `timeout_s`; then they go on elsewhere."""

    layers_start: Natural
    layers_end: Annotated[int, Field(ge=1)]
    timeout_s: Annotated[float, Field(ge=0, le=86400)] = 30.0


class Loaded(Message):
    """It is served. `sessions` were still open and are not any more; `took_s`: from the last of them on."""

    shard: Token
    layers_start: Natural
    layers_end: Natural
    sessions: Natural
    took_s: float


class StatsRequest(Message):
    """Ask a shard for its figures; nothing to say."""


class ShardStats(Message):
    """Counts since start; seconds. `rejected`: frames and messages refused, by reason."""

    shard: Token
    instance: Token
    model: str
    state: str
    uptime_s: float
    rows: Natural
    free_rows: Natural
    sessions: Natural
    queue_frames: Natural
    prefill_steps: Natural
    prefill_tokens: Natural
    prefill_s: float
    decode_steps: Natural
    decode_tokens: Natural
    decode_s: float
    queue_s: float
    codec_s: float
    frames_in: Natural
    frames_out: Natural
    bytes_in: Natural
    bytes_out: Natural
    gaps: dict[str, int]
    rejected: dict[str, int]
    memory_bytes: Natural


class ShardLease(Message):
    """What a shard says of itself in KV `mesh_shards` under its own name, renewed well within the bucket's TTL.

    `load`: share of the last seconds spent computing, 0 to 1. `step_s`: median decode step of late; 0 before any.
    `max_frame_bytes`: the largest frame its connection takes. `weights_bytes`: of the layers it holds. A later version may say more.
    """

    model_config = ConfigDict(extra="ignore")

    shard: Token
    instance: Token  # another one: the process was restarted, and every row with it
    model: Annotated[str, Field(min_length=1)]
    model_hash: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    layers_start: Natural
    layers_end: Annotated[int, Field(ge=1)]
    total_layers: Annotated[int, Field(ge=1)]
    state: Literal["loading", "warming", "ready", "draining"]
    rows: Annotated[int, Field(ge=1)]
    free_rows: Natural
    context: Annotated[int, Field(ge=1)]
    chunk: Annotated[int, Field(ge=1)]
    hidden_size: Annotated[int, Field(ge=1)]
    hidden_itemsize: Literal[2, 4]
    max_frame_bytes: Annotated[int, Field(ge=1)]
    queue_limit: Annotated[int, Field(ge=1)]  # frames it holds before it answers with gaps: a coordinator's credits
    queue_frames: Natural = 0
    mirrors: bool = False  # follows the frames of its range's other replicas, for sessions that are open here too
    load: Annotated[float, Field(ge=0, le=1)] = 0.0
    step_s: Annotated[float, Field(ge=0)] = 0.0
    memory_bytes: Natural = 0
    weights_bytes: Natural = 0
    frame_version: Natural
    version: str = ""
    host: str = ""
    processor: str = ""  # what computes for it; the same for shards that share it
    pid: Natural = 0
    started_unix_s: float = 0.0
    http: str = ""  # where it says how it is

    @property
    def layers(self) -> LayerRange:
        return LayerRange(self.layers_start, self.layers_end)

    @property
    def first(self) -> bool:
        return self.layers_start == 0

    @property
    def last(self) -> bool:
        return self.layers_end == self.total_layers


EventKind = Literal[
    "joined",  # a shard, before it loads
    "ready",
    "drained",
    "left",
    "suspected",  # a shard, or a coordinator, does not answer
    "failed_over",  # sessions go another way
    "plan_changed",
    "rejected",  # a shard of another version or model takes no part
    "forgotten",  # by hand
    "coordinator_joined",
    "coordinator_left",
    "resumed",  # sessions of another coordinator
]


class Event(Message):
    """Something that happened, for people and monitors. `who`: a shard or a coordinator."""

    kind: EventKind
    who: Token
    model: str = ""
    at_unix_s: float
    detail: str = ""
    data: dict[str, Any] = Field(default_factory=dict)


# -- errors ------------------------------------------------------------------------------------------------------------

_STATUS: dict[str, int] = {  # Nats-Service-Error-Code, in the way of HTTP
    "bad_request": 400,
    "message_rejected": 400,
    "frame_rejected": 400,
    "prompt_too_long": 400,
    "payload_too_large": 413,
    "denied": 403,
    "busy": 429,
    "cancelled": 499,
    "unavailable": 503,
    "deadline_exceeded": 504,
}


class ErrorReply(Message):
    """The body beside the Nats-Service-Error headers, from which the caller's side makes the same error again."""

    code: str
    message: str
    retryable: bool = False
    field: str | None = None
    retry_after_s: float | None = None
    tokens: int | None = None
    limit: int | None = None

    @property
    def status(self) -> int:
        return _STATUS.get(self.code, 500)

    @classmethod
    def of(cls, error: MeshError) -> ErrorReply:
        """`error` as a reply."""
        values = {name: getattr(error, name, None) for name in ("field", "retry_after_s", "tokens", "limit")}
        return cls(code=error.code, message=str(error), retryable=error.retryable, **values)

    def error(self) -> MeshError:
        """The error this reply was made of; an unknown code is a plain MeshError."""
        match self.code:
            case "bad_request":
                return BadRequest(self.message, field=self.field or "")
            case "message_rejected":
                return MessageRejected(self.message, field=self.field or "")
            case "prompt_too_long":
                return PromptTooLong(self.message, tokens=self.tokens or 0, limit=self.limit or 0)
            case "busy":
                return Busy(self.message, retry_after_s=1.0 if self.retry_after_s is None else self.retry_after_s)
            case "payload_too_large":
                return PayloadTooLarge(self.message, size_bytes=0, limit_bytes=self.limit or 0)
            case "unavailable":
                return Unavailable(self.message)
            case "deadline_exceeded":
                return DeadlineExceeded(self.message)
            case "cancelled":
                return Cancelled(self.message)
            case "denied":
                return Denied(self.message)
        return MeshError(self.message)


# -- durable batches ---------------------------------------------------------------------------------------------------

MAX_BATCH = 10_000
BatchId = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,48}$")]
BatchState = Literal["queued", "running", "done", "failed"]


class BatchSubmit(Message):
    """Requests to be answered some time, whatever dies meanwhile. `id`: the caller's own name for it: a repeated one is the same."""

    limit_bytes: ClassVar[int] = 8 * 1024 * 1024

    requests: Annotated[tuple[Generate, ...], Field(min_length=1, max_length=MAX_BATCH)]
    id: BatchId | None = None


class BatchQuery(Message):
    """Of the results: those from `offset` on, `limit` at most."""

    id: BatchId
    offset: Natural = 0
    limit: Annotated[int, Field(ge=1, le=1000)] = 100


class BatchStatus(Message):
    """`total` = waiting + `running` + `done` + `failed`. `state`: done when all have ended, failed when all have failed."""

    id: BatchId
    model: str
    state: BatchState
    total: Natural
    running: Natural
    done: Natural
    failed: Natural
    submitted_unix_s: float


class BatchItem(Message):
    """A request of a batch that has ended: `answer` is the document of a generation; `error` where it `failed`."""

    limit_bytes: ClassVar[int] = 8 * 1024 * 1024

    index: Natural
    state: Literal["done", "failed"]
    answer: dict[str, Any] | None = None
    error: ErrorReply | None = None


class BatchResults(Message):
    """`items`: of those asked for, what has ended; `next`: the offset to ask with for more, None at the end."""

    limit_bytes: ClassVar[int] = 8 * 1024 * 1024

    id: BatchId
    items: tuple[BatchItem, ...]
    next: Natural | None


# -- which subject carries which ----------------------------------------------------------------------------------------


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
