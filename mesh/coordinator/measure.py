"""How long steps take: from sending a frame to its answer, and what part of that was spent at the stages."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final

from mesh.coordinator.clocks import Clocks
from mesh.coordinator.core.events import FrameOut
from mesh.coordinator.core.scheduler import Flight
from mesh.coordinator.replies import HopMeter, Job
from mesh.coordinator.server_traces import read_report
from mesh.coordinator.trace import Traces
from mesh.coordinator.trace_steps import Step
from mesh.protocol.frame_codec import Frame
from mesh.telemetry.registry import Histogram

__all__ = ["StepMeter"]

_MOST_FRAMES: Final = 4096
"""Frames whose sending time is kept. Frames that never come back would fill the table otherwise."""
_TRACED_A_SECOND: Final = 50.0
"""The most steps whose frames nats-server reports, in a second; so many may be saved up."""
_MOST_TRACED: Final = 256
"""Steps that nats-server may still report."""


class StepMeter:
    """Adds each step to the coordinator's means (`hops`), to the means of its requests, and to their traces. `job_of`: the request
    of a session, if it is still held. `flight_of`: a frame that is out. `last_step_at`: time.monotonic of the last answer, None before any.

    A step of a request whose sender keeps its trace is traced in nats-server too, as far as _TRACED_A_SECOND allows.
    """

    def __init__(
        self, traces: Traces, clocks: Clocks, job_of: Callable[[str], Job | None], flight_of: Callable[[int], Flight | None]
    ) -> None:
        self.hops = HopMeter()
        self.steps = Histogram("mesh_coordinator_step_seconds")
        self.rows = Histogram("mesh_coordinator_decode_batch_rows")
        self.last_step_at: float | None = None
        self._traces = traces
        self._clocks = clocks
        self._job_of = job_of
        self._flight_of = flight_of
        self._sent_at: dict[int, float] = {}  # frame -> time.perf_counter
        self._traced: OrderedDict[int, tuple[str, ...]] = OrderedDict()  # frame -> sessions
        self._may_trace = _TRACED_A_SECOND
        self._counted_at = time.perf_counter()

    def traceparent(self, out: FrameOut) -> str | None:
        """The trace context with which a frame goes out, if nats-server is to report it."""
        if not self._traces.sampled:
            return None
        now = time.perf_counter()
        self._may_trace = min(self._may_trace + (now - self._counted_at) * _TRACED_A_SECOND, _TRACED_A_SECOND)
        self._counted_at = now
        flight = self._flight_of(out.frame)
        if self._may_trace < 1 or flight is None:
            return None
        sessions = flight.ids
        for session in sessions:
            trace = self._traces.running(session)
            if trace is not None and trace.context.sampled:
                self._may_trace -= 1
                self._traced[out.frame] = sessions
                if len(self._traced) > _MOST_TRACED:
                    self._traced.popitem(last=False)
                return trace.context.header(trace.span, sampled=True)
        return None

    def server_report(self, data: bytes) -> None:
        """Take what nats-server reports of a frame."""
        report = read_report(data)
        if report is not None:
            self._traces.server_hop(self._traced.get(report.frame, ()), report.frame, report.way, report.hop)

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
        wall_s, sessions = arrived - sent_at, flight.ids
        if self._traces.sampling.enabled:
            self._record(frame, flight.out, sessions, sent_at, arrived)
        self.steps.observe(wall_s, flight.out.kind)
        if not flight.decode:
            return
        self.rows.observe(len(sessions))
        queue_us = compute_us = codec_us = 0
        for timing in frame.timings:
            queue_us += timing.queue_us
            compute_us += timing.compute_us
            codec_us += timing.codec_us
        compute_s, queue_s, codec_s = compute_us / 1e6, queue_us / 1e6, codec_us / 1e6
        hops = len(frame.route) + 1
        self.hops.add(wall_s, compute_s, queue_s, codec_s, hops)
        for session in sessions:
            job = self._job_of(session)
            if job is not None:
                job.hops.add(wall_s, compute_s, queue_s, codec_s, hops)

    def _record(self, frame: Frame, out: FrameOut, sessions: tuple[str, ...], sent_at: float, arrived: float) -> None:
        """Add the step to the traces of its requests."""
        timings = frame.timings
        zero_us = (time.time() - time.perf_counter()) * 1e6
        ways_us = self._clocks.ways(out.route, timings, zero_us + sent_at * 1e6, zero_us + arrived * 1e6)
        tokens = sum(len(row.tokens) for row in out.rows)
        self._traces.step(out, Step(sent_at, arrived - sent_at, tokens, timings, ways_us, sessions, frame.step, out.rows[0].start))
