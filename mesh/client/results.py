"""What a client is given: typed, frozen, and the same from both clients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mesh.errors import MeshError
from mesh.protocol.batches import BatchItem
from mesh.protocol.status import ShardLease

__all__ = ["BatchResult", "Chunk", "Completion", "CoordinatorStatus", "Health", "MeshStatus", "Timing", "Token", "Usage"]


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token; the rest only where log probabilities were asked for: `top` is (token, logprob), likeliest first, `piece` and
    `top_pieces` are the texts of these tokens by themselves (None: the model has no tokenizer)."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    piece: str | None = None
    top_pieces: tuple[str | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """One step of a stream. `text` is what became readable with this token, perhaps nothing; `token` is None in the last chunk,
    which carries what was still held back. `received_s` is on the clock of time.perf_counter."""

    text: str
    token: Token | None
    index: int
    received_s: float


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, as the coordinator measured them. queue_s: until rows were asked for; first_token_s: until the first token;
    decode_step_s: the median step. hops: where a decode step went (mean seconds: step_s, compute_s, queue_s, codec_s, hop_s)."""

    queue_s: float
    prefill_s: float
    first_token_s: float | None
    decode_s: float
    decode_step_s: float
    tokens_per_s: float | None
    total_s: float
    restarts: int = 0
    hops: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation. `finish_reason`: "stop" (an end token or a stop text) or "length" (max_tokens). `text` is None for a
    model without a tokenizer. `raw` is the coordinator's document."""

    request: str
    tokens: tuple[int, ...]
    text: str | None
    finish_reason: str
    usage: Usage
    timing: Timing
    logprobs: tuple[Token, ...] | None
    raw: Mapping[str, Any] = field(repr=False, default_factory=dict)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Completion:
        timing = {name: document["timing"].get(name) for name in Timing.__dataclass_fields__}
        logprobs = document.get("logprobs")
        return cls(
            request=document["request"],
            tokens=tuple(document["tokens"]),
            text=document["text"],
            finish_reason=document["finish_reason"],
            usage=Usage(document["usage"]["prompt_tokens"], document["usage"]["completion_tokens"]),
            timing=Timing(**timing),
            logprobs=None if logprobs is None else tuple(token_of(entry) for entry in logprobs),
            raw=document,
        )


@dataclass(frozen=True, slots=True)
class BatchResult:
    """A request of a batch that has ended: its completion, or its error. `index`: its place in the batch, from 0."""

    index: int
    completion: Completion | None
    error: MeshError | None

    @classmethod
    def of(cls, item: BatchItem) -> BatchResult:
        return cls(
            item.index,
            None if item.answer is None else Completion.of(item.answer),
            None if item.error is None else item.error.error(),
        )


@dataclass(frozen=True, slots=True)
class CoordinatorStatus:
    """One coordinator: sessions it runs and holds back, whether every layer range has a shard, its counts since start."""

    name: str
    model: str
    live: int
    queued: int
    capacity: int
    serving: bool
    counters: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MeshStatus:
    """Who is there: every shard's lease (by model, layers and name), every coordinator that answered."""

    shards: tuple[ShardLease, ...]
    coordinators: tuple[CoordinatorStatus, ...]

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(sorted({shard.model for shard in self.shards} | {c.model for c in self.coordinators}))


@dataclass(frozen=True, slots=True)
class Health:
    """`ready`: a request would be generated now. `reason` says why not, or is empty."""

    ready: bool
    reason: str
    model: str | None


def token_of(document: Mapping[str, Any]) -> Token:
    entries = document.get("top") or ()
    top = tuple((entry["token"], entry["logprob"]) for entry in entries)
    return Token(document["token"], document.get("logprob"), top, document.get("piece"), tuple(entry.get("piece") for entry in entries))
