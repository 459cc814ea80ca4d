"""The steps of one request, in bounded room: the first and the last decode steps and the slowest as they were, the others in sums.

A decode step is one tuple that all sessions of its decode batch share. So keeping it costs each of them an entry in a list.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from mesh.protocol.frame import StageTiming

__all__ = ["KeptStep", "Run", "Step", "StepSum", "Steps"]

FIRST: Final = 4
LAST: Final = 24
SLOWEST: Final = 4
RUNS: Final = 16
PREFILLS: Final = 16
_RUN: Final = 16
"""Steps of a run at first. Where there are more than RUNS runs, two become one."""


class Step(NamedTuple):
    """A step that came back. at: when it was sent (time.perf_counter). tokens: of a prefill, or the rows of a decode. ways_us: microseconds
    between the processes (clocks.py). sessions: those that took part. number: the frame's. start: the position of its first token, of the
    first session."""

    at: float
    wall_s: float
    tokens: int
    timings: tuple[StageTiming, ...]
    ways_us: tuple[float, ...] = ()
    sessions: tuple[str, ...] = ()
    number: int = 0
    start: int = 0

    @property
    def end(self) -> float:
        return self.at + self.wall_s


class KeptStep(NamedTuple):
    """A step of one request. leg: the number of the route that it took. place: its number among the request's steps of its kind."""

    leg: int
    place: int
    step: Step


@dataclass(slots=True)
class StepSum:
    """The steps of one kind over one route. stages: microseconds in (queue, compute, codec), for each stage; ways_us: for each way."""

    steps: int = 0
    wall_s: float = 0.0
    stages: list[list[int]] = field(default_factory=list)
    ways_us: list[float] = field(default_factory=list)

    def add(self, step: Step) -> None:
        if not self.steps:
            self.stages = [[0, 0, 0] for _ in step.timings]
            self.ways_us = [0.0] * len(step.ways_us)
        self.steps += 1
        self.wall_s += step.wall_s
        for total, timing in zip(self.stages, step.timings, strict=False):
            total[0] += timing[0]
            total[1] += timing[1]
            total[2] += timing[2]
        ways = self.ways_us
        for index, way_us in enumerate(step.ways_us[: len(ways)]):
            ways[index] += way_us

    def as_dict(self) -> dict[str, Any]:
        inside_s = sum(map(sum, self.stages)) / 1e6
        return {
            "steps": self.steps,
            "wall_s": self.wall_s,
            "stages": [{"queue_s": q / 1e6, "compute_s": c / 1e6, "codec_s": x / 1e6} for q, c, x in self.stages],
            "hops": [way_us / 1e6 for way_us in self.ways_us],
            "hops_s": max(self.wall_s - inside_s, 0.0),
        }


@dataclass(slots=True)
class Run:
    """Decode steps in a row over one route, in sums. first: the number of the first one."""

    leg: int
    first: int
    at: float
    end: float
    sum: StepSum = field(default_factory=StepSum)
    tokens: int = 0

    def add(self, step: Step) -> None:
        self.sum.add(step)
        self.end = step.end
        self.tokens += step.tokens

    def join(self, later: Run) -> None:
        mine, its = self.sum, later.sum
        mine.steps += its.steps
        mine.wall_s += its.wall_s
        mine.stages = [[a + b for a, b in zip(one, two, strict=True)] for one, two in zip(mine.stages, its.stages, strict=True)]
        mine.ways_us = [a + b for a, b in zip(mine.ways_us, its.ways_us, strict=True)]
        self.end, self.tokens = later.end, self.tokens + later.tokens


@dataclass(slots=True)
class Steps:
    """runs: the decode steps that are not kept as they were; `slowest` are the slowest of these. forgotten: the steps of runs that are not
    kept any more, because the request took too many routes."""

    prefills: deque[KeptStep] = field(default_factory=lambda: deque(maxlen=PREFILLS))
    first: list[KeptStep] = field(default_factory=list)
    last: deque[KeptStep] = field(default_factory=deque)
    runs: list[Run] = field(default_factory=list)
    slowest: list[KeptStep] = field(default_factory=list)
    prefilled: int = 0
    decoded: int = 0
    forgotten: int = 0
    _run: int = _RUN
    _floor_s: float = 0.0

    def prefill(self, leg: int, step: Step) -> None:
        self.prefills.append(KeptStep(leg, self.prefilled, step))
        self.prefilled += 1

    def decode(self, leg: int, step: Step) -> None:
        entry = KeptStep(leg, self.decoded, step)
        self.decoded += 1
        if len(self.first) < FIRST:
            self.first.append(entry)
            return
        self.last.append(entry)
        if len(self.last) > LAST:
            self._fold(self.last.popleft())

    def kept(self) -> Sequence[KeptStep]:
        """The decode steps that are kept as they were and are in no run, in order."""
        return [*self.first, *self.last]

    def check(self) -> None:
        assert len(self.first) <= FIRST and len(self.last) <= LAST and len(self.slowest) <= SLOWEST and len(self.prefills) <= PREFILLS
        assert len(self.runs) <= RUNS
        assert self.forgotten + sum(run.sum.steps for run in self.runs) + len(self.first) + len(self.last) == self.decoded

    def _fold(self, entry: KeptStep) -> None:
        leg, place, step = entry
        if step.wall_s > self._floor_s:
            self.slowest.append(entry)
            if len(self.slowest) > SLOWEST:
                self.slowest.remove(min(self.slowest, key=lambda kept: kept.step.wall_s))
                self._floor_s = min(kept.step.wall_s for kept in self.slowest)
        run = self.runs[-1] if self.runs else None
        if run is None or run.leg != leg or run.sum.steps >= self._run or len(run.sum.stages) != len(step.timings):
            run = Run(leg, place, step.at, step.end)
            self.runs.append(run)
            if len(self.runs) > RUNS:
                self._shorten()
        run.add(step)

    def _shorten(self) -> None:
        """Make one run of two, where they took the same route."""
        self._run *= 2
        newest = self.runs.pop()
        shorter: list[Run] = []
        for run in self.runs:
            before = shorter[-1] if shorter else None
            if before is not None and before.leg == run.leg and before.sum.steps + run.sum.steps <= self._run:
                before.join(run)
            else:
                shorter.append(run)
        for run in shorter[: -RUNS + 1]:  # of too many routes
            self.forgotten += run.sum.steps
        self.runs = [*shorter[-RUNS + 1 :], newest]
