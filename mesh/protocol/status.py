"""What shards and coordinators report about themselves."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from mesh.protocol.control import PrefixDigest
from mesh.protocol.message import Counts, Label, Line, Message, Natural, Positive, SessionId, Token
from mesh.types import LayerRange

__all__ = [
    "Alive",
    "CoordinatorStats",
    "Heartbeat",
    "Hops",
    "KeptPrefix",
    "LeaseQuery",
    "MachineReport",
    "SessionReport",
    "ShardLease",
    "ShardStats",
    "StatsRequest",
]


class Heartbeat(Message):
    """A coordinator says that it lives. Shards free its rows after `ttl_s` seconds of silence. They also free the row of a session that is
    missing from `sessions` twice in a row, because an Opened or a Close may be lost (None: the coordinator does not list its sessions).
    `instance`: the coordinator's process. `leaving`: it is ending in order, and other coordinators may take over its sessions."""

    coordinator: Token
    ttl_s: Annotated[float, Field(gt=0, le=3600)] = 10.0
    sessions: Annotated[tuple[SessionId, ...], Field(max_length=2048, fail_fast=True)] | None = None
    instance: Token | None = None
    leaving: bool = False


class KeptPrefix(Message):
    """A coordinator tells the others what the rows of a session that has ended hold at these shards: `positions` positions, under the
    name `digest`. `digests`: of its first `every`, 2 * `every` ... blocks (mesh/coordinator/core/prefixes.py), by which others find what a
    prompt has in common with it. There are no tokens in it."""

    coordinator: Token  # its instance
    shards: Annotated[tuple[Token, ...], Field(max_length=4096, fail_fast=True)]
    digest: PrefixDigest
    positions: Positive
    every: Positive
    digests: Annotated[tuple[PrefixDigest, ...], Field(max_length=1024, fail_fast=True)]


class Alive(Message):
    """Ask a coordinator whether it lives. It answers with a Heartbeat."""


class StatsRequest(Message):
    """Ask a shard for its ShardStats. It has no fields."""


class LeaseQuery(Message):
    """Ask every shard for its lease. It has no fields."""


class MachineReport(Message):
    """What a shard's machine gives it (mesh/host/machine.py has the meanings). `quota_cores` 0: no limit. `memory_limit_bytes`: the
    machine's memory, or what its container may have."""

    processor: Label = ""
    features: Annotated[tuple[Label, ...], Field(max_length=64, fail_fast=True)] = ()
    cores: Natural = 0
    usable_cores: Natural = 0
    quota_cores: float = 0.0
    memory_bytes: Natural = 0
    memory_limit_bytes: Natural = 0
    available_bytes: Natural = 0
    open_files: Natural = 0


class ShardStats(Message):
    """A shard's counts and seconds since its start. `rejected`: refused frames and messages, by reason. `storage`: writes of its lease to
    JetStream that failed, and buckets that were lost and made again. `unix_s`: its clock. `predicted_bytes`: what its weights and caches
    were planned to take."""

    shard: Token
    instance: Token
    model: Label
    state: Label
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
    gaps: Counts
    rejected: Counts
    memory_bytes: Natural
    storage: Counts = Field(default_factory=dict)
    unix_s: float = 0.0
    predicted_bytes: Natural = 0
    machine: MachineReport = MachineReport()


class ShardLease(Message):
    """A shard's description of itself. The shard says it every RENEW_S seconds over plain NATS, and keeps a copy in the bucket
    `mesh_shards`, under its own name, which it renews well within the bucket's TTL. `state` "left": the shard has ended in order.

    `load`: share of the last seconds spent computing, 0 to 1. `step_s`: median of recent decode steps in seconds, 0 before any.
    `max_frame_bytes`: the largest frame its connection takes. `weights_bytes`: of the layers it holds.
    `predicted_bytes`: what its process takes once these are loaded. Fields that a later version
    adds are ignored.
    """

    model_config = ConfigDict(extra="ignore")

    shard: Token
    instance: Token  # changes when the process restarts, and with it every row is lost
    model: Annotated[str, Field(min_length=1, max_length=256)]
    model_hash: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    layers_start: Natural
    layers_end: Positive
    held_start: Natural = 0  # the layers it holds, and could serve (`mesh load`)
    held_end: Natural = 0
    total_layers: Positive
    state: Literal["loading", "warming", "ready", "draining", "left"]
    rows: Positive
    free_rows: Natural
    context: Positive
    chunk: Positive
    hidden_size: Positive
    hidden_itemsize: Literal[2, 4]
    max_frame_bytes: Positive
    queue_limit: Positive  # frames it queues before it answers with gaps: a coordinator's credits
    queue_frames: Natural = 0
    mirrors: bool = False  # follows the frames of its range's other replicas for sessions that are open here too
    packs: bool = False  # computes the segments of a packed frame as one step
    kept_rows: Natural = 0  # of the free rows: those that hold what a session may begin with
    load: Annotated[float, Field(ge=0, le=1)] = 0.0
    step_s: Annotated[float, Field(ge=0)] = 0.0
    memory_bytes: Natural = 0
    weights_bytes: Natural = 0
    predicted_bytes: Natural = 0
    frame_version: Natural
    version: Label = ""
    host: Label = ""
    processor: Label = ""  # the name of the processor that computes for it; shards that share a processor have the same name
    kernels: Label = ""  # the compiled kernels that it multiplies with, or "none"
    pid: Natural = 0
    started_unix_s: float = 0.0
    http: Line = ""  # the address of its health page
    metrics: Line = ""  # the address of its metrics

    @model_validator(mode="after")
    def _is_a_range_of_the_model(self) -> Self:
        if not self.layers_start < self.layers_end <= self.total_layers:
            raise ValueError(f"layers {self.layers_start}-{self.layers_end} of {self.total_layers} are no range of a model")
        return self

    @property
    def layers(self) -> LayerRange:
        return LayerRange(self.layers_start, self.layers_end)

    @property
    def first(self) -> bool:
        return self.layers_start == 0

    @property
    def last(self) -> bool:
        return self.layers_end == self.total_layers


class _Reported(Message):
    """Part of what a coordinator reports. Keys that a later version adds are ignored."""

    model_config = ConfigDict(extra="ignore")

    def document(self) -> dict[str, Any]:
        """The keys that were reported, as JSON has them."""
        return self.model_dump(mode="json", exclude_unset=True)


class Hops(_Reported):
    """Means over a coordinator's decode steps, in seconds; `steps`: how many. `hop_s`: what a hop takes beyond computing and queueing."""

    steps: Natural = 0
    step_s: float = 0.0
    compute_s: float = 0.0
    queue_s: float = 0.0
    codec_s: float = 0.0
    hop_s: float = 0.0


class SessionReport(_Reported):
    """One session that runs, or one that ended lately: `began_unix_s` and `error` are of one that ended, `prefilled` of one that
    runs. `trace`: the id of its trace. `route`: the shard of each layer range, None where it is not known yet."""

    request: Label
    trace: Label = ""
    state: Label = ""
    route: Annotated[tuple[Label | None, ...], Field(max_length=4096, fail_fast=True)] = ()
    prompt_tokens: Natural = 0
    max_tokens: Natural = 0
    tokens: Natural = 0
    prefilled: Natural = 0
    queue_s: float = 0.0
    first_token_s: float | None = None
    total_s: float = 0.0
    restarts: Natural = 0
    began_unix_s: float = 0.0
    error: Line | None = None


SessionReports = Annotated[tuple[SessionReport, ...], Field(max_length=4096, fail_fast=True)]


class TraceQuery(Message):
    """Ask a coordinator for the last requests that ended: all, or those that failed, or those that were slow."""

    kind: Literal["last", "failed", "slow"] = "last"
    limit: Annotated[int, Field(ge=1, le=64)] = 32


class TraceList(_Reported):
    """The latest first."""

    requests: SessionReports = ()


class CoordinatorStats(_Reported):
    """What a coordinator reports in $SRV.STATS: its load, counts since its start, and its sessions.

    `live`: sessions it has, `queued` of them without rows. `capacity`: the sessions that its shards have rows for. `serving`: whether
    every layer range has a shard. `context`: the longest context that a session can have. `max_prompt_characters`: a longer
    prompt cannot fit. `last_step_s`: how long ago a step came back.
    `suspected`: shards that did not answer. `failovers`: sessions that lost a shard and went on. `asked`: probes of shards. `late`:
    answers that nothing waited for. `prefix_hits`: sessions that began with positions that rows held, `reused_tokens` in all;
    `prefix_misses`: rows that no longer did.
    `refused_replies`: requests whose answers would have gone to no inbox. `resumed`: sessions taken over from other coordinators.
    `expected`: the shards it waits for.
    `defects`: unexpected errors that have ended a session each. `errors`: what else failed unexpectedly, by where. `prompts`: how
    many were tokenized, and of these late and died, whose process was ended for its time or its memory. `spans`: sent to a
    collector, failed, full (there was no place to wait) and not_kept.
    `remade`: what was lost in JetStream and made again, and how often. `unix_s`: its clock. `http`, `metrics`: where this process answers.
    """

    limit_bytes: ClassVar[int] = 4 * 1024 * 1024

    coordinator: Label
    model: Label
    live: Natural
    queued: Natural
    capacity: Natural
    serving: bool
    instance: Label = ""
    pid: Natural = 0
    unix_s: float = 0.0
    http: Line | None = None
    metrics: Line = ""
    vocab_size: Natural = 0
    context: Natural | None = None
    max_prompt_characters: Natural | None = None
    last_step_s: float | None = None
    resumed: Natural = 0
    submitted: Natural = 0
    rejected: Natural = 0
    finished: Natural = 0
    failed: Natural = 0
    cancelled: Natural = 0
    defects: Natural = 0
    restarts: Natural = 0
    suspected: Natural = 0
    failovers: Natural = 0
    asked: Natural = 0
    tokens: Natural = 0
    prompt_tokens: Natural = 0
    prefix_hits: Natural = 0
    prefix_misses: Natural = 0
    reused_tokens: Natural = 0
    decode_frames: Natural = 0
    prefill_frames: Natural = 0
    packed_frames: Natural = 0
    late: Natural = 0
    refused_replies: Natural = 0
    rejected_frames: Counts = Field(default_factory=dict)
    records: Counts = Field(default_factory=dict)
    batches: Counts = Field(default_factory=dict)
    errors: Counts = Field(default_factory=dict)
    prompts: Counts = Field(default_factory=dict)
    spans: Counts = Field(default_factory=dict)
    expected: Annotated[dict[Label, Any], Field(max_length=256)] | None = None
    remade: Counts = Field(default_factory=dict)
    hops: Hops = Hops()
    sessions: SessionReports = ()
    recent: SessionReports = ()
