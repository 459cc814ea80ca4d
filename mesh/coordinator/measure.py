"""How long steps take: from sending a frame to its answer, and what part of that was spent at the stages."""

from __future__ import annotations

import time
from collections.abc import Callable

from mesh.coordinator.core.scheduler import Flight
from mesh.coordinator.replies import HopMeter, Job
from mesh.coordinator.trace import Traces
from mesh.protocol.frame_codec import Frame
from mesh.telemetry.registry import Histogram

__all__ = ["StepMeter"]

_MOST_FRAMES = 4096
"""Frames whose sending time is kept. Frames that never come back would fill the table otherwise."""


class StepMeter:
    """Adds each step to the coordinator's means (`hops`), to the means of its requests, and to their traces. `job_of`: the request
    of a session, if it is still held. `last_step_at`: time.monotonic of the last answer, None before any."""

    def __init__(self, traces: Traces, job_of: Callable[[str], Job | None]) -> None:
        self.hops = HopMeter()
        self.steps = Histogram("mesh_coordinator_step_seconds")
        self.rows = Histogram("mesh_coordinator_decode_batch_rows")
        self.last_step_at: float | None = None
        self._traces = traces
        self._job_of = job_of
        self._sent_at: dict[int, float] = {}  # frame -> time.perf_counter

    def sent(self, frame: int) -> None:
        self._sent_at[frame] = time.perf_counter()
        while len(self._sent_at) > _MOST_FRAMES:
            del self._sent_at[next(iter(self._sent_at))]

    def landed(self, frame: Frame, flight: Flight | None, arrived: float) -> None:
        """The answer `frame` arrived at `arrived` (time.perf_counter). `flight`: the frame as it was sent, None if it is not waited
        for any more."""
        self.last_step_at = time.monotonic()
        sent_at = self._sent_at.pop(frame.step, None)
        if sent_at is None or flight is None:
            return
        wall_s = arrived - sent_at
        sessions = flight.ids
        self._traces.step(flight.out, sessions, at=sent_at, wall_s=wall_s, timings=frame.timings)
        self.steps.observe(wall_s, flight.out.kind)
        if not flight.decode:
            return
        self.rows.observe(len(sessions))
        compute_s, queue_s, codec_s = (
            sum(us) / 1e6 for us in zip(*((t.compute_us, t.queue_us, t.codec_us) for t in frame.timings), strict=True)
        )
        hops = len(frame.route) + 1
        self.hops.add(wall_s, compute_s, queue_s, codec_s, hops)
        for session in sessions:
            job = self._job_of(session)
            if job is not None:
                job.hops.add(wall_s, compute_s, queue_s, codec_s, hops)
