"""What the core knows, and the effects of the turn that is under way. The files that decide (machine.py, rows.py, losses.py, ends.py)
share it; nothing outside core/ sees it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, fields

from mesh.coordinator.core.admission import AdmissionQueue
from mesh.coordinator.core.events import Effect
from mesh.coordinator.core.pace import SLOWDOWN
from mesh.coordinator.core.prefixes import PrefixIndex
from mesh.coordinator.core.routing import Replicas, Strategy
from mesh.coordinator.core.scheduler import Scheduler
from mesh.coordinator.core.session import Session
from mesh.coordinator.core.watch import FrameWatch

__all__ = ["CoreConfig", "CoreCounters", "CoreState", "Pause"]


@dataclass(frozen=True, slots=True)
class CoreConfig:
    """layers: of the model. queue_limit: requests that may wait. step_timeout_s: the longest a frame may be under way. slowdown: how many
    times as long a step may take because of prompts (pace.py)."""

    layers: int
    strategy: Strategy = "least_loaded"
    queue_limit: int = 256
    failover_timeout_s: float = 30.0
    step_timeout_s: float = 15.0
    slowdown: float = SLOWDOWN


@dataclass(frozen=True, slots=True)
class Pause:
    """How long a session that lost its route had no token: from its last one (or from the loss) to the next. kind: `mirror` where a
    mirror stepped in, `replay` where the history was computed again, `resend` where every row was still there. step_s: the median of a
    decode step then."""

    kind: str
    seconds: float
    step_s: float


@dataclass(slots=True)
class CoreCounters:
    """Since the start. late: answers for frames or sessions that were no longer waited for. defects: errors that
    nobody expected, each of which has ended a session. suspected: shards that did not answer.
    failovers: sessions that lost a shard in the middle and went on. asked: probes of shards. prefix_hits: sessions that began with
    positions that were there, `reused_tokens` in all. prefix_misses: rows that a shard no longer held."""

    submitted: int = 0
    rejected: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    defects: int = 0
    restarts: int = 0
    suspected: int = 0
    failovers: int = 0
    asked: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    prefix_hits: int = 0
    prefix_misses: int = 0
    reused_tokens: int = 0
    decode_frames: int = 0
    prefill_frames: int = 0
    packed_frames: int = 0
    late: int = 0

    def as_dict(self) -> dict[str, int]:
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass(slots=True)
class CoreState:
    """`now` and `effects` belong to the turn. Times are seconds on the clock of `now`."""

    config: CoreConfig
    replicas: Replicas
    admission: AdmissionQueue
    scheduler: Scheduler
    watch: FrameWatch
    counters: CoreCounters = field(default_factory=CoreCounters)
    prefixes: PrefixIndex = field(default_factory=PrefixIndex)
    pauses: deque[Pause] = field(default_factory=lambda: deque(maxlen=512))
    by_id: dict[str, Session] = field(default_factory=dict)  # the sessions that have not ended
    by_key: dict[int, Session] = field(default_factory=dict)  # those with rows, open or asked for; they may have ended
    torn: list[Session] = field(default_factory=list)  # lost in this turn; they still have their rows
    now: float = 0.0
    effects: list[Effect] = field(default_factory=list)
    online: bool = True
    queue_checked_at: float = float("-inf")
    incomplete_since: float | None = float("-inf")  # since when no chain of shards is complete; None while one is
    mirrors: bool = True  # whether sessions get mirrors
