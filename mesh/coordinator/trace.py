"""What the coordinator keeps of each request, so that it can be looked at afterwards: as spans (trace_spans.py), and in sums.

While a request runs its record grows by an entry a step, and no span is made. At its end it is decided whether its trace is kept for
those to whom spans are sent: its sender or the ratio wanted it, or it failed, lost a route, or was slow. The records of the last requests
are kept here in any case, and those of the last that failed or were slow for longer. A record is bounded whatever a request does.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from mesh.coordinator.core.events import Ended, FrameOut, FrameRow
from mesh.coordinator.core.routing import Route
from mesh.coordinator.core.session import SessionView
from mesh.coordinator.trace_steps import Step, Steps, StepSum
from mesh.errors import short
from mesh.protocol.generation import public_id
from mesh.protocol.message import MAX_LINE
from mesh.protocol.spans import Value
from mesh.protocol.status import SessionReport
from mesh.telemetry.context import TraceContext, TraceSampling
from mesh.types import LayerRange

__all__ = ["SHOWN_SESSIONS", "Leg", "OpenTry", "ServerHop", "Trace", "Traces"]

KEPT_REQUESTS = 64
KEPT_ODD = 32
"""Of those that failed, and of those that were slow."""
KEPT_LEGS = 16
KEPT_OPENS = 64
KEPT_TEXTS = 32
KEPT_SERVER_HOPS = 256
SHOWN_SESSIONS = 32

Because = Literal["parent", "ratio", "error", "failover", "slow"]


class OpenTry(NamedTuple):
    """A shard was asked for a row. at, end: time.perf_counter."""

    at: float
    end: float
    epoch: int
    layers: LayerRange
    shard: str | None
    error: str


class ServerHop(NamedTuple):
    """A frame inside a nats-server, by the server's clock."""

    server: str
    in_ns: int
    out_ns: int


@dataclass(slots=True)
class Leg:
    """A route, from its first frame on."""

    route: Route
    epoch: int
    at: float
    prefill: StepSum = field(default_factory=StepSum)
    decode: StepSum = field(default_factory=StepSum)


@dataclass(slots=True)
class Trace:
    """The record of one request. `id` is its session, which no report shows. Times are those of time.perf_counter, except `*_unix_s`.

    context: the trace that it belongs to; span: its own span in it. kept: why its spans are sent on; None where they are not.
    """

    id: str
    context: TraceContext
    span: str
    began: float
    began_unix_s: float
    prepared: float
    prompt_tokens: int
    max_tokens: int
    attributes: dict[str, Value] = field(default_factory=dict)
    steps: Steps = field(default_factory=Steps)
    legs: list[Leg] = field(default_factory=list)
    moves: int = 0  # legs that are no longer kept
    opens: deque[OpenTry] = field(default_factory=lambda: deque(maxlen=KEPT_OPENS))
    texts: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=KEPT_TEXTS))  # (at, seconds)
    text_s: float = 0.0
    server_hops: OrderedDict[tuple[int, int], ServerHop] = field(default_factory=OrderedDict)  # (frame, way)
    ended: Ended | None = None
    ended_at: float = 0.0
    kept: Because | None = None

    @property
    def public_id(self) -> str:
        return public_id(self.id)

    def add(self, out: FrameOut, row: FrameRow, step: Step) -> None:
        epoch = row.epoch
        leg = self.legs[-1] if self.legs else None
        if leg is None or leg.epoch != epoch:
            if len(self.legs) == KEPT_LEGS:
                del self.legs[0]
                self.moves += 1
            leg = Leg(out.route, epoch, step.at)
            self.legs.append(leg)
        number = self.moves + len(self.legs) - 1
        if out.kind == "decode" or (out.kind == "packed" and row.decodes):
            leg.decode.add(step)
            self.steps.decode(number, step)
        else:
            leg.prefill.add(step)
            self.steps.prefill(number, step)

    def text(self, at: float, seconds: float) -> None:
        """The text of a token was made."""
        self.texts.append((at, seconds))
        self.text_s += seconds

    def check(self) -> None:
        assert len(self.legs) <= KEPT_LEGS and len(self.opens) <= KEPT_OPENS and len(self.server_hops) <= KEPT_SERVER_HOPS
        self.steps.check()

    def as_dict(self) -> dict[str, Any]:
        """In seconds; `at_s` counts from the request's arrival."""
        return {
            "request": self.public_id,
            "trace": self.context.trace,
            "began_unix_s": self.began_unix_s,
            "prompt_tokens": self.prompt_tokens,
            "max_tokens": self.max_tokens,
            "text_s": self.text_s,
            "legs": [
                {
                    "at_s": leg.at - self.began,
                    "stages": [{"shard": hop.shard, "layers": str(hop.layers)} for hop in leg.route],
                    "prefill": leg.prefill.as_dict(),
                    "decode": leg.decode.as_dict(),
                }
                for leg in self.legs
            ],
        }


class Traces:
    """The records of the requests that run, of the last KEPT_REQUESTS that ended, and of the last KEPT_ODD that failed or were slow.

    `send(trace)` is called at the end of each request whose trace is kept for others; see TraceSampling.
    """

    def __init__(self, sampling: TraceSampling | None = None, send: Callable[[Trace], None] | None = None) -> None:
        self.sampling = sampling or TraceSampling()
        self._send = send
        self.sampled = 0
        """The requests that run whose traces are kept in any case."""
        self._running: dict[str, Trace] = {}
        self._ended: OrderedDict[str, Trace] = OrderedDict()
        self._failed: OrderedDict[str, Trace] = OrderedDict()
        self._slow: OrderedDict[str, Trace] = OrderedDict()

    def begin(self, trace: Trace) -> None:
        """A request is accepted."""
        if trace.id not in self._running:
            self.sampled += bool(trace.context.sampled)
            self._running[trace.id] = trace

    def running(self, session: str) -> Trace | None:
        return self._running.get(session)

    def step(self, out: FrameOut, step: Step) -> None:
        """The frame `out` of the sessions of `step` came back."""
        running = self._running
        for session, row in zip(step.sessions, out.rows, strict=False):
            trace = running.get(session)
            if trace is not None:
                trace.add(out, row, step)

    def opened(self, session: str, tried: OpenTry) -> None:
        trace = self._running.get(session)
        if trace is not None:
            trace.opens.append(tried)

    def server_hop(self, sessions: Iterable[str], frame: int, way: int, hop: ServerHop) -> None:
        """A nats-server has reported a frame of these sessions; it may come after a request's end."""
        for session in sessions:
            trace = self._running.get(session) or self._ended.get(session)
            if trace is not None:
                trace.server_hops[frame, way] = hop
                while len(trace.server_hops) > KEPT_SERVER_HOPS:
                    trace.server_hops.popitem(last=False)

    def forget(self, session: str) -> None:
        """A request that was accepted is refused after all, over a defect."""
        trace = self._running.pop(session, None)
        if trace is not None:
            self.sampled -= bool(trace.context.sampled)

    def end(self, ended: Ended, now: float) -> None:
        """A request has ended, at `now` (time.perf_counter)."""
        trace = self._running.pop(ended.session, None)
        if trace is None:
            return
        self.sampled -= bool(trace.context.sampled)
        trace.ended, trace.ended_at = ended, now
        trace.kept = self._because(trace, ended)
        _keep(self._ended, trace, KEPT_REQUESTS)
        if ended.reason == "error":
            _keep(self._failed, trace, KEPT_ODD)
        elif self._is_slow(ended):
            _keep(self._slow, trace, KEPT_ODD)
        if trace.kept is not None and self._send is not None:
            self._send(trace)

    def find(self, name: str) -> Trace | None:
        """The record of the public id or of the trace `name`."""
        return next((trace for trace in self._all() if name in (trace.public_id, trace.context.trace)), None)

    def of(self, session: str) -> Trace | None:
        """The record of a session."""
        return next((kept[session] for kept in (self._running, self._ended, self._failed, self._slow) if session in kept), None)

    def context_of(self, session: str) -> tuple[str, str] | None:
        """(trace, span) of a session."""
        trace = self._running.get(session) or self._ended.get(session)
        return None if trace is None else (trace.context.trace, trace.span)

    def report(self, trace: Trace, session: SessionView | None) -> SessionReport | None:
        """A report on a request. `session`: where it still runs; None: it has ended."""
        if trace.ended is not None:
            return _over(trace)
        return None if session is None else _running(trace, session)

    def latest(self, kind: Literal["last", "failed", "slow"], most: int) -> list[SessionReport]:
        """Reports on the last requests of this kind that ended, the latest first."""
        kept = {"last": self._ended, "failed": self._failed, "slow": self._slow}[kind]
        return [_over(trace) for trace in list(kept.values())[: -most - 1 : -1]]

    def summary(self, sessions: Iterable[SessionView]) -> tuple[tuple[SessionReport, ...], tuple[SessionReport, ...]]:
        """A report on each of `sessions`, which run, and on the last SHOWN_SESSIONS that ended, the latest first."""
        running = []
        for session in sessions:
            trace = self._running.get(session.id)
            if trace is not None:
                running.append(_running(trace, session))
        return tuple(running), tuple(self.latest("last", SHOWN_SESSIONS))

    def check(self) -> None:
        assert len(self._ended) <= KEPT_REQUESTS and len(self._failed) <= KEPT_ODD and len(self._slow) <= KEPT_ODD
        for trace in self._all():
            trace.check()

    def _all(self) -> Iterator[Trace]:
        for kept in (self._running, self._ended, self._failed, self._slow):
            yield from kept.values()

    def _because(self, trace: Trace, ended: Ended) -> Because | None:
        if trace.context.sampled:
            return "parent" if trace.context.span is not None else "ratio"
        if ended.reason == "error":
            return "error"
        if ended.restarts:
            return "failover"
        return "slow" if self._is_slow(ended) else None

    def _is_slow(self, ended: Ended) -> bool:
        first_s = ended.first_token_s
        return ended.total_s > self.sampling.slow_s or (first_s is not None and first_s > self.sampling.slow_first_token_s)


def _keep(kept: OrderedDict[str, Trace], trace: Trace, most: int) -> None:
    kept.pop(trace.id, None)
    kept[trace.id] = trace
    while len(kept) > most:
        kept.popitem(last=False)


def _running(trace: Trace, session: SessionView) -> SessionReport:
    return SessionReport(
        request=trace.public_id,
        trace=trace.context.trace,
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
        trace=trace.context.trace,
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
