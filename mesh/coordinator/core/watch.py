"""When a frame has been away for too long, and what is to be done about it. Pure.

How long a step takes is observed, for each route and kind. A frame that is away for twice the median is overdue. That proves
nothing, so its shards are asked (Ping), again and again while it stays away:

    nobody listens on a shard's subject          it is dead: the shell says so to the core at once
    a shard does not answer                      suspected after four times the route's p99, in [SUSPECT_FLOOR_S, ceiling]: its
                                                 sessions go another way. It may merely be slow, so its rows are fenced, not its life
    all answer, some shard still has the step    slow: nothing is done
    all answer twice, nobody has the step        the frame is lost (a server was restarted, a connection broke): sent again
    anything, for the ceiling                    the frame is given up, and its shards are suspected

Nothing is sent while all goes well. A mistake costs a replay, never a token.
While this side is not connected no time passes; for CALM_S after the connection is back nobody is suspected.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from mesh.coordinator.core.events import FrameKind
from mesh.coordinator.core.routing import Route

__all__ = ["CALM_S", "FrameWatch", "Latency", "Verdict"]

OVERDUE_MEDIANS: Final = 2.0
OVERDUE_FLOOR_S: Final = 0.004
OVERDUE_UNKNOWN_S: Final = 1.0
"""Before any step has been observed: the first ones may compile."""
SUSPECT_P99S: Final = 4.0
SUSPECT_FLOOR_S: Final = 1.0
LOST_GAP_S: Final = 0.1
"""Between the two answers of every shard that it has not got the step: longer than a frame is between two of them."""
CALM_S: Final = 3.0
_PROBE_AGAIN_S: Final = 0.02
_PROBE_AGAIN_MOST_S: Final = 0.25
_SERIES_S: Final = 1.0
"""Questions further apart than this are not one series: what was not answered long ago says nothing of now."""
_WINDOW: Final = 64
_SORT_EVERY: Final = 8
_ROUTES: Final = 256


class Latency:
    """The last steps of one kind on one route, in seconds."""

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=_WINDOW)
        self._fresh = 0
        self.median_s = 0.0
        self.p99_s = 0.0

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, seconds: float) -> None:
        self._seen.append(seconds)
        self._fresh += 1
        if self._fresh >= _SORT_EVERY or len(self._seen) < _SORT_EVERY:
            self._fresh = 0
            ordered = sorted(self._seen)
            self.median_s = ordered[len(ordered) // 2]
            self.p99_s = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


@dataclass(slots=True)
class _Away:
    """A frame that is out. clear: shard -> the first and the last time it was asked and had not got the step."""

    route: Route
    kind: FrameKind
    sent_at: float
    check_at: float
    wait_s: float
    clear: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(slots=True)
class _Probed:
    """A shard that is being asked. since: the first question that is not answered yet."""

    last: float
    since: float | None

    def unanswered_s(self, now: float) -> float:
        return 0.0 if self.since is None or now - self.last > _SERIES_S else now - self.since


@dataclass(frozen=True, slots=True)
class Verdict:
    """Shards to ask now; shards that do not answer; frames that are lost (`sent`: send them again) or given up."""

    probe: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    lost: tuple[int, ...] = ()
    given_up: tuple[int, ...] = ()


class FrameWatch:
    """`ceiling_s`: the longest a frame may be away, whatever is answered."""

    def __init__(self, ceiling_s: float) -> None:
        self._ceiling_s = ceiling_s
        self._away: dict[int, _Away] = {}
        self._probed: dict[str, _Probed] = {}
        self._routes: OrderedDict[tuple[Route, FrameKind], Latency] = OrderedDict()
        self._all: dict[FrameKind, Latency] = {"prefill": Latency(), "decode": Latency()}
        self._calm_until = float("-inf")
        self._online = True

    # -- what happens --------------------------------------------------------------------------------------------------

    def sent(self, frame: int, route: Route, kind: FrameKind, now: float) -> None:
        wait_s = self._overdue_s(route, kind)
        self._away[frame] = _Away(route, kind, now, now + wait_s, wait_s)

    def landed(self, frame: int, now: float) -> float:
        """It came back: the seconds it was away."""
        away = self._away.pop(frame, None)
        if away is None:
            return 0.0
        seconds = now - away.sent_at
        self._all[away.kind].add(seconds)
        known = self._routes.get((away.route, away.kind))
        if known is None:
            known = self._routes[away.route, away.kind] = Latency()
            if len(self._routes) > _ROUTES:
                self._routes.popitem(last=False)
        known.add(seconds)
        for hop in away.route:  # whoever passed it on lives
            probed = self._probed.get(hop.shard)
            if probed is not None:
                probed.since = None
        return seconds

    def dropped(self, frame: int) -> None:
        """It is waited for no more."""
        self._away.pop(frame, None)

    def answered(self, shard: str, asked_at: float, pending: frozenset[int]) -> None:
        """A shard's answer to the question of `asked_at`."""
        probed = self._probed.get(shard)
        if probed is not None:
            probed.since = None if probed.last <= asked_at else probed.last
        for number, away in self._away.items():
            if not any(hop.shard == shard for hop in away.route):
                continue
            if number in pending:
                away.clear.clear()
            elif asked_at > away.sent_at:
                first, _ = away.clear.get(shard, (asked_at, asked_at))
                away.clear[shard] = (first, asked_at)

    def hurry(self, now: float) -> None:
        """Something was heard of (a connection has ended): ask at once."""
        for away in self._away.values():
            away.check_at = min(away.check_at, now)

    def connection(self, online: bool, now: float) -> None:
        """This side's connection was lost, or is back."""
        self._online = online
        self._probed.clear()
        if online:
            self._calm_until = now + CALM_S
            for away in self._away.values():
                away.sent_at, away.check_at, away.wait_s = now, now + LOST_GAP_S, LOST_GAP_S
                away.clear.clear()

    # -- what follows --------------------------------------------------------------------------------------------------

    def deadline(self) -> float | None:
        """When `check` is due."""
        return min((away.check_at for away in self._away.values()), default=None) if self._online else None

    def check(self, now: float) -> Verdict:
        if not self._online or not any(away.check_at <= now for away in self._away.values()):
            return Verdict()
        probe: dict[str, None] = {}
        silent: dict[str, None] = {}
        lost, given_up = [], []
        for number, away in self._away.items():
            if away.check_at > now:
                continue
            away.wait_s = min(max(away.wait_s * 1.5, _PROBE_AGAIN_S), _PROBE_AGAIN_MOST_S)
            away.check_at = now + away.wait_s
            shards = [hop.shard for hop in away.route]
            probe.update(dict.fromkeys(shards))
            if now - away.sent_at >= self._ceiling_s:
                given_up.append(number)
                continue
            patience_s = self._suspect_s(away.route, away.kind)
            quiet = [
                shard for shard in shards if (probed := self._probed.get(shard)) is not None and probed.unanswered_s(now) >= patience_s
            ]
            if quiet and now >= self._calm_until:
                silent.update(dict.fromkeys(quiet))
            elif all(shard in away.clear and away.clear[shard][1] - away.clear[shard][0] >= LOST_GAP_S for shard in shards):
                lost.append(number)
        for shard in probe:
            probed = self._probed.get(shard)
            if probed is None:
                self._probed[shard] = _Probed(now, now)
            else:
                probed.since = now if probed.since is None or now - probed.last > _SERIES_S else probed.since
                probed.last = now
        if len(self._probed) > _ROUTES:
            there = {hop.shard for away in self._away.values() for hop in away.route}
            self._probed = {shard: probed for shard, probed in self._probed.items() if shard in there}
        return Verdict(tuple(probe), tuple(silent), tuple(lost), tuple(given_up))

    def forget(self, shard: str) -> None:
        """It is gone, or another process."""
        self._probed.pop(shard, None)

    def median_s(self, kind: FrameKind) -> float:
        """Of all routes; 0 before any step."""
        return self._all[kind].median_s

    def check_state(self, frames: Iterator[int]) -> None:
        assert set(frames) == self._away.keys(), "watched frames are not those that are out"

    # -- inside --------------------------------------------------------------------------------------------------------

    def _latency(self, route: Route, kind: FrameKind) -> Latency:
        known = self._routes.get((route, kind))
        return known if known is not None and len(known) >= _SORT_EVERY else self._all[kind]

    def _overdue_s(self, route: Route, kind: FrameKind) -> float:
        latency = self._latency(route, kind)
        if len(latency) < _SORT_EVERY:
            return min(OVERDUE_UNKNOWN_S, self._ceiling_s)
        return min(max(OVERDUE_MEDIANS * latency.median_s, OVERDUE_FLOOR_S), self._ceiling_s)

    def _suspect_s(self, route: Route, kind: FrameKind) -> float:
        return min(max(SUSPECT_P99S * self._latency(route, kind).p99_s, SUSPECT_FLOOR_S), self._ceiling_s)
