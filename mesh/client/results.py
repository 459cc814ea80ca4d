"""The results that both clients return: frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass

from mesh.errors import MeshError
from mesh.protocol.batches import BatchItem
from mesh.protocol.status import CoordinatorStats, ShardLease
from mesh.protocol.stream import Answer, Timing, Token, Usage, answer_of

__all__ = ["BatchResult", "Chunk", "Completion", "CoordinatorStatus", "Health", "MeshStatus", "Timing", "Token", "Usage"]


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
