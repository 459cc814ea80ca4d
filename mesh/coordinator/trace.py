"""Where the time of each request went: sums for every stage of every route that it took, and its last steps one by one.

The coordinator keeps a trace of each request that runs, and of the last ones that ended, so that a slow request, or one that moved, can be
looked at afterwards. A trace is bounded whatever a request does: a step is one tuple, shared by the sessions of its decode batch, and
only the last steps are kept. The time of a step beyond its stages' own times is that of its hops. Shards have clocks of their own, so
single hops cannot be told apart.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mesh.coordinator.core.events import Ended, FrameOut
from mesh.coordinator.core.routing import Route
from mesh.coordinator.core.session import SessionView
from mesh.protocol.documents import short
from mesh.protocol.frame_codec import StageTiming
from mesh.protocol.generation import public_id
from mesh.protocol.message import MAX_LINE
from mesh.protocol.status import SessionReport

__all__ = ["SHOWN_SESSIONS", "Trace", "Traces"]

KEPT_REQUESTS = 64
KEPT_DECODES = 48
KEPT_PREFILLS = 16
KEPT_LEGS = 16
SHOWN_SESSIONS = 32


class _Step(NamedTuple):
    """at: when it was sent (time.perf_counter). tokens: of a prefill, or the rows of a decode."""

    at: float
    wall_s: float
    tokens: int
    timings: tuple[StageTiming, ...]
    leg: int = 0


@dataclass(slots=True)
class _Sum:
    """The steps of one kind over one route. stages: microseconds in (queue, compute, codec), for each stage."""

    steps: int = 0
    wall_s: float = 0.0
    stages: list[list[int]] = field(default_factory=list)

    def add(self, wall_s: float, timings: Sequence[StageTiming]) -> None:
        if not self.steps:
            self.stages = [[0, 0, 0] for _ in timings]
        self.steps += 1
        self.wall_s += wall_s
        for total, timing in zip(self.stages, timings, strict=False):
            total[0] += timing.queue_us
            total[1] += timing.compute_us
            total[2] += timing.codec_us

    def as_dict(self) -> dict[str, Any]:
        inside_s = sum(map(sum, self.stages)) / 1e6
        return {
            "steps": self.steps,
            "wall_s": self.wall_s,
            "stages": [{"queue_s": q / 1e6, "compute_s": c / 1e6, "codec_s": x / 1e6} for q, c, x in self.stages],
            "hops_s": max(self.wall_s - inside_s, 0.0),
        }


@dataclass(slots=True)
class _Leg:
    """A route, from the first frame on it."""

    route: Route
    at: float
    prefill: _Sum = field(default_factory=_Sum)
    decode: _Sum = field(default_factory=_Sum)


@dataclass(slots=True)
class Trace:
    """The trace of one request. `id` is its session, which no report shows. Times are those of time.perf_counter, except `began_unix_s`."""

    id: str
    began: float
    began_unix_s: float
    prompt_tokens: int
    max_tokens: int
    legs: list[_Leg] = field(default_factory=list)
    moves: int = 0  # legs that are no longer kept
    prefills: deque[_Step] = field(default_factory=lambda: deque(maxlen=KEPT_PREFILLS))
    decodes: deque[_Step] = field(default_factory=lambda: deque(maxlen=KEPT_DECODES))
    ended: Ended | None = None

    @property
    def public_id(self) -> str:
        return public_id(self.id)

    def add(self, out: FrameOut, step: _Step) -> None:
        route = out.route
        if not self.legs or (self.legs[-1].route is not route and self.legs[-1].route != route):
            if len(self.legs) == KEPT_LEGS:
                del self.legs[0]
                self.moves += 1
            self.legs.append(_Leg(route, step.at))
        leg = self.legs[-1]
        step = step._replace(leg=self.moves + len(self.legs) - 1)
        if out.kind == "decode":
            leg.decode.add(step.wall_s, step.timings)
            self.decodes.append(step)
        else:
            leg.prefill.add(step.wall_s, step.timings)
            self.prefills.append(step)

    def check(self) -> None:
        assert len(self.legs) <= KEPT_LEGS and len(self.decodes) <= KEPT_DECODES and len(self.prefills) <= KEPT_PREFILLS

    def as_dict(self) -> dict[str, Any]:
        """In seconds; `at_s` counts from the request's arrival. `steps` are the last ones, in the order in which they were sent. A stage of
        a step is [queue, compute, codec] in microseconds; `leg` is the index in `legs` of the route that it took."""
        first = self.moves
        steps = [(step, "prefill") for step in self.prefills] + [(step, "decode") for step in self.decodes]
        steps.sort(key=lambda pair: pair[0].at)
        return {
            "request": self.public_id,
            "began_unix_s": self.began_unix_s,
            "prompt_tokens": self.prompt_tokens,
            "max_tokens": self.max_tokens,
            "legs": [
                {
                    "at_s": leg.at - self.began,
                    "stages": [{"shard": hop.shard, "layers": str(hop.layers)} for hop in leg.route],
                    "prefill": leg.prefill.as_dict(),
                    "decode": leg.decode.as_dict(),
                }
                for leg in self.legs
            ],
            "steps": [
                {
                    "phase": phase,
                    "at_s": step.at - self.began,
                    "wall_s": step.wall_s,
                    "tokens": step.tokens,
                    "leg": step.leg - first,
                    "stages": [[t.queue_us, t.compute_us, t.codec_us] for t in step.timings],
                }
                for step, phase in steps
                if step.leg >= first
            ],
        }


class Traces:
    """The traces of the requests that run, and of the last KEPT_REQUESTS that ended."""

    def __init__(self) -> None:
        self._running: dict[str, Trace] = {}
        self._ended: OrderedDict[str, Trace] = OrderedDict()

    def begin(self, id: str, prompt_tokens: int, max_tokens: int, *, now: float, unix_s: float) -> None:
        self._running[id] = Trace(id, now, unix_s, prompt_tokens, max_tokens)

    def step(self, out: FrameOut, sessions: Iterable[str], *, at: float, wall_s: float, timings: tuple[StageTiming, ...]) -> None:
        """The frame `out` of these sessions came back."""
        step = _Step(at, wall_s, len(out.rows[0].tokens) if out.kind == "prefill" else len(out.rows), timings)
        for session in sessions:
            trace = self._running.get(session)
            if trace is not None:
                trace.add(out, step)

    def end(self, ended: Ended) -> None:
        trace = self._running.pop(ended.session, None)
        if trace is None:
            return
        trace.ended = ended
        self._ended.pop(trace.id, None)
        self._ended[trace.id] = trace
        while len(self._ended) > KEPT_REQUESTS:
            self._ended.popitem(last=False)

    def session_of(self, id: str) -> str | None:
        """The session of the public id, of a request that is known here."""
        return next((trace.id for trace in (*self._running.values(), *self._ended.values()) if trace.public_id == id), None)

    def document(self, id: str, session: SessionView | None) -> dict[str, Any] | None:
        """The whole trace of a request, None for one that is not known. `session`: where it still runs."""
        trace = self._running.get(id)
        if trace is not None and session is not None:
            return {**_running(trace, session).document(), **trace.as_dict()}
        trace = self._ended.get(id)
        return None if trace is None else {**_over(trace).document(), **trace.as_dict()}

    def summary(self, sessions: Iterable[SessionView]) -> tuple[tuple[SessionReport, ...], tuple[SessionReport, ...]]:
        """A report on each of `sessions`, which run, and on the last SHOWN_SESSIONS that ended, the latest first."""
        running = []
        for session in sessions:
            trace = self._running.get(session.id)
            if trace is not None:
                running.append(_running(trace, session))
        latest = list(self._ended.values())[: -SHOWN_SESSIONS - 1 : -1]
        return tuple(running), tuple(_over(trace) for trace in latest)

    def check(self) -> None:
        assert len(self._ended) <= KEPT_REQUESTS
        for trace in (*self._running.values(), *self._ended.values()):
            trace.check()


def _running(trace: Trace, session: SessionView) -> SessionReport:
    return SessionReport(
        request=trace.public_id,
        state=session.state,
        route=session.route,
        prompt_tokens=trace.prompt_tokens,
        max_tokens=trace.max_tokens,
        tokens=session.generated,
        prefilled=session.prefilled,
        queue_s=session.queue_s,
        first_token_s=session.first_token_s,
        total_s=session.total_s,
        restarts=session.restarts,
    )


def _over(trace: Trace) -> SessionReport:
    ended = trace.ended
    assert ended is not None
    return SessionReport(
        request=trace.public_id,
        state=ended.reason,
        route=tuple(hop.shard for hop in trace.legs[-1].route) if trace.legs else (),
        prompt_tokens=trace.prompt_tokens,
        max_tokens=trace.max_tokens,
        tokens=ended.tokens,
        queue_s=ended.queue_s,
        first_token_s=ended.first_token_s,
        total_s=ended.total_s,
        restarts=ended.restarts,
        began_unix_s=trace.began_unix_s,
        error=None if ended.error is None else short(str(ended.error), MAX_LINE),
    )
