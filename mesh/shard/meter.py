"""What a shard counts: frames, bytes and time. Only the event loop writes here."""

from __future__ import annotations

import os
import statistics
from collections import Counter, deque
from dataclasses import dataclass, field

from mesh.protocol.frame_codec import StageTiming
from mesh.telemetry.registry import Histogram

__all__ = ["Meter", "resident_bytes"]

_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass
class Meter:
    """Counts and seconds since the start. `rejected` counts by reason."""

    frames_in: int = 0
    frames_out: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    queue_s: float = 0.0
    codec_s: float = 0.0
    rejected: Counter[str] = field(default_factory=Counter)
    steps: Histogram = field(default_factory=lambda: Histogram("mesh_shard_step_seconds"))
    waits: Histogram = field(default_factory=lambda: Histogram("mesh_shard_queue_wait_seconds"))
    _steps: deque[float] = field(default_factory=lambda: deque(maxlen=64))
    _window: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=8))

    def stepped(self, phase: str, timing: StageTiming) -> None:
        """A frame of this phase, prefill, decode or packed, was computed."""
        compute_s, queue_s = timing.compute_us / 1e6, timing.queue_us / 1e6
        self.queue_s += queue_s
        self.codec_s += timing.codec_us / 1e6
        self.steps.observe(compute_s, phase)
        self.waits.observe(queue_s)
        if phase == "decode":
            self._steps.append(compute_s)

    @property
    def step_s(self) -> float:
        """Median of the last decode steps, in seconds; 0 before the first one."""
        return statistics.median(self._steps) if self._steps else 0.0

    def load(self, now: float, busy_s: float) -> float:
        """The share of recent time that was spent computing, 0 to 1. Call it at regular times with the compute thread's busy time; it
        looks back over the last 8 calls."""
        self._window.append((now, busy_s))
        (began, before), (end, after) = self._window[0], self._window[-1]
        return min(1.0, max(0.0, (after - before) / (end - began))) if end > began else 0.0


def resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 if the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123  # no file of a user's
            return int(file.read().split()[1]) * _PAGE
    except OSError:
        return 0
