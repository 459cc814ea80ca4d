"""When a frame has been away for too long, and what to do about it. Pure.

How long a step takes is observed, for each route and kind. A frame that is away for twice the median is overdue. That proves nothing,
so its shards are probed (Ping), again and again while the frame stays away:

    no process listens on a shard's subject      the shard is dead; the core learns that at once (ReplicaGone)
    a shard does not answer                      it is suspected after four times the route's p99, in [SUSPECT_FLOOR_S, ceiling]: its
                                                 sessions go another way. It may only be slow, so its rows are fenced; it is not ended
    all answer, some shard still has the step    the step is slow: nothing is done
    all answer twice, no shard has the step      the frame is lost (a server was restarted, a connection broke): it is sent again
    any of these, for the ceiling                the frame is given up, and its shards are suspected

While all goes well nothing is sent. A mistake costs a replay, never a token. Without a connection of this coordinator no time passes;
for CALM_S after the connection is back no shard is suspected.
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
"""While no step has been observed: the first steps may compile programs."""
SUSPECT_P99S: Final = 4.0
SUSPECT_FLOOR_S: Final = 1.0
LOST_GAP_S: Final = 0.1
"""Between two answers of a shard that it does not have the step: longer than a frame takes from one shard to the next."""
CALM_S: Final = 3.0
_PROBE_AGAIN_S: Final = 0.02
_PROBE_AGAIN_MOST_S: Final = 0.25
_SERIES_S: Final = 1.0
"""Probes further apart than this are not one series: a probe that was not answered long ago says nothing about now."""
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
    """A frame that is out. clear: shard -> the first and the last probe that found it without the step."""

    route: Route
    kind: FrameKind
    sent_at: float
    check_at: float
    wait_s: float
    clear: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(slots=True)
class _Probed:
    """A shard that is being probed. last: the last probe; since: the first one that is not answered yet."""

    last: float
    since: float | None

    def unanswered_s(self, now: float) -> float:
        return 0.0 if self.since is None or now - self.last > _SERIES_S else now - self.since


@dataclass(frozen=True, slots=True)
class Verdict:
    """probe: shards to probe now. silent: shards that do not answer. lost: frames that no shard has. given_up: frames that were away for
    the ceiling."""

    probe: tuple[str, ...] = ()
    silent: tuple[str, ...] = ()
    lost: tuple[int, ...] = ()
    given_up: tuple[int, ...] = ()


class FrameWatch:
    """`ceiling_s`: the longest that a frame may be away, whatever its shards answer."""

    def __init__(self, ceiling_s: float) -> None:
        self._ceiling_s = ceiling_s
        self._away: dict[int, _Away] = {}
        self._probed: dict[str, _Probed] = {}
        self._routes: OrderedDict[tuple[Route, FrameKind], Latency] = OrderedDict()
        self._all: dict[FrameKind, Latency] = {"prefill": Latency(), "decode": Latency(), "packed": Latency()}
        self._calm_until = float("-inf")
        self._online = True

    # -- what happens --------------------------------------------------------------------------------------------------

    def sent(self, frame: int, route: Route, kind: FrameKind, now: float) -> None:
        wait_s = self._overdue_s(route, kind)
        self._away[frame] = _Away(route, kind, now, now + wait_s, wait_s)

    def landed(self, frame: int, now: float) -> float:
        """A frame came back. Returns the seconds that it was away."""
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
        for hop in away.route:  # each of its shards passed it on, so it lives
            probed = self._probed.get(hop.shard)
            if probed is not None:
                probed.since = None
        return seconds

    def dropped(self, frame: int) -> None:
        """A frame is no longer waited for."""
        self._away.pop(frame, None)

    def answered(self, shard: str, asked_at: float, pending: frozenset[int]) -> None:
        """A shard has answered the probe of `asked_at`."""
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
        """Some connection has ended: probe the shards of every frame at once."""
        for away in self._away.values():
            away.check_at = min(away.check_at, now)

    def connection(self, online: bool, now: float) -> None:
        """This coordinator's connection was lost, or is back."""
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
        """A shard is gone, or is another process."""
        self._probed.pop(shard, None)

    def median_s(self, kind: FrameKind) -> float:
        """The median step of all routes, in seconds; 0 before any step."""
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
