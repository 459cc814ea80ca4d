"""The results that both clients return: frozen dataclasses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from mesh.errors import MeshError
from mesh.protocol.batches import BatchItem
from mesh.protocol.status import CoordinatorStats, ShardLease
from mesh.protocol.stream import Answer, Timing, Token, Usage, answer_of
from mesh.protocol.usage import SubjectUsage, UsageReport

__all__ = [
    "BatchResult",
    "Chunk",
    "Completion",
    "CoordinatorStatus",
    "Embeddings",
    "Health",
    "MeshStatus",
    "MeshUsage",
    "Timing",
    "Token",
    "Usage",
]


@dataclass(frozen=True, slots=True)
class Chunk:
    """One step of a stream. `text` is what became readable with this token, perhaps nothing; `token` is None in the last chunk,
    which carries what was still held back. `received_s` is on the clock of time.perf_counter."""

    text: str
    token: Token | None
    index: int
    received_s: float


@dataclass(frozen=True)
class Completion(Answer):
    """A finished generation: what the coordinator's last document says. `request` is its public id. `session`: the name by which its owner
    asks for its trace; empty for a result of a batch."""

    session: str = ""

    @classmethod
    def of(cls, answer: Answer, session: str = "") -> Completion:
        return cls(**vars(answer), session=session)


@dataclass(frozen=True, slots=True)
class Embeddings:
    """The vectors of several texts, in their order, and the tokens that they had together."""

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The result of one request of a batch: its completion, or its error. `index`: its place in the batch, from 0."""

    index: int
    completion: Completion | None
    error: MeshError | None

    @classmethod
    def of(cls, item: BatchItem) -> BatchResult:
        return cls(
            item.index,
            None if item.answer is None else Completion.of(answer_of(item.answer)),
            None if item.error is None else item.error.error(),
        )


@dataclass(frozen=True, slots=True)
class CoordinatorStatus:
    """One coordinator that answered, with its report."""

    stats: CoordinatorStats

    @property
    def name(self) -> str:
        return self.stats.coordinator

    @property
    def model(self) -> str:
        return self.stats.model

    @property
    def live(self) -> int:
        return self.stats.live

    @property
    def queued(self) -> int:
        return self.stats.queued

    @property
    def capacity(self) -> int:
        return self.stats.capacity

    @property
    def serving(self) -> bool:
        return self.stats.serving


@dataclass(frozen=True, slots=True)
class MeshStatus:
    """The processes of a mesh: every shard's lease (sorted by model, layers and name), and every coordinator that answered. `jetstream`:
    whether JetStream answered too; tokens flow without it."""

    shards: tuple[ShardLease, ...]
    coordinators: tuple[CoordinatorStatus, ...]
    jetstream: bool = True

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(sorted({shard.model for shard in self.shards} | {c.model for c in self.coordinators}))


@dataclass(frozen=True, slots=True)
class Health:
    """`ready`: a request would be generated now. `reason` says why not, or is empty."""

    ready: bool
    reason: str
    model: str | None


@dataclass(frozen=True, slots=True)
class MeshUsage:
    """What subjects have used at the gateways that have answered, summed over them; those with the most tokens first. since_unix_s:
    when the first of these gateways started; None: no gateway has answered. omitted: subjects that a gateway left out."""

    gateways: int
    since_unix_s: float | None
    omitted: int
    subjects: tuple[SubjectUsage, ...]

    @classmethod
    def of(cls, reports: Iterable[UsageReport]) -> MeshUsage:
        answered = {report.gateway: report for report in reports}.values()
        sums: dict[str, dict[str, int]] = {}
        for report in answered:
            for each in report.subjects:
                have = sums.setdefault(each.subject, {})
                for name, value in each.model_dump(exclude={"subject"}).items():
                    have[name] = have.get(name, 0) + value
        subjects = [SubjectUsage(subject=subject, **counts) for subject, counts in sums.items()]
        subjects.sort(key=lambda each: (-(each.prompt_tokens + each.completion_tokens + each.batch_tokens), each.subject))
        since = min((report.since_unix_s for report in answered), default=None)
        return cls(len(answered), since, sum(report.omitted for report in answered), tuple(subjects))

    def document(self) -> dict[str, Any]:
        return {
            "gateways": self.gateways,
            "since_unix_s": self.since_unix_s,
            "omitted": self.omitted,
            "subjects": [each.model_dump(mode="json") for each in self.subjects],
        }
