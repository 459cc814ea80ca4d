"""The read model: the picture of a mesh that the dashboard, `mesh top` and `mesh status` show. It does no I/O; times are passed in.

    look(status, stats)    called once a second while there is a viewer: leases, and the counts of coordinators and shards
    failed(reason)         called when a look failed: the last picture stays, with the reason and its age
    happened(event)        called at once when an event of the mesh arrives
    snapshot()             the picture as a JSON document: seconds, bytes, and rates between the last two looks

A shard whose lease is gone stays in the picture for GHOST_S, so that a viewer sees what was lost and what took its place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from mesh.client.results import CoordinatorStatus, MeshStatus
from mesh.protocol.events import Event
from mesh.protocol.status import SessionReport, ShardLease, ShardStats

__all__ = ["MeshReadModel", "Point"]

GHOST_S = 30.0
SUSPECTED_S = 6.0
"""After this time a suspicion is dropped: a lease that still exists then has been renewed since."""
FRESH_S = 120.0
"""The latency that is shown covers the requests that ended within this time."""
POINTS = 180
EVENTS = 100

Point = list[float | None]
"""[unix time, tokens/s, median first token s, mean step s, sessions, waiting]"""


@dataclass(frozen=True, slots=True)
class _Counts:
    """The counts of one process at one look. `owner` is the instance: a new instance counts from zero."""

    at: float
    owner: str
    values: dict[str, float]


@dataclass(slots=True)
class _Ghost:
    lease: ShardLease
    gone_at: float
    orderly: bool


class MeshReadModel:
    """See the module's docstring. `now` is any clock of seconds that never goes back."""

    def __init__(self) -> None:
        self.events: deque[tuple[int, dict[str, Any]]] = deque(maxlen=EVENTS)  # numbered, so that a viewer gets only what it has not seen
        self.event_number = 0
        self._leases: dict[str, ShardLease] = {}
        self._ghosts: dict[str, _Ghost] = {}
        self._left: set[str] = set()  # shards that ended in order since the last look
        self._suspected: dict[str, float] = {}  # shard -> unix time of the event; known before its lease ends
        self._counts: dict[str, _Counts] = {}
        self._rates: dict[str, dict[str, float]] = {}
        self._series: dict[str, deque[Point]] = {}
        self._points: dict[str, Point] = {}
        self._status = MeshStatus((), ())
        self._stats: dict[str, ShardStats] = {}
        self._error: str | None = "nothing has been seen yet"
        self._looked_at: float | None = None
        self._now = 0.0
        self._unix_s = 0.0

    # -- what comes in -------------------------------------------------------------------------------------------------

    def look(self, status: MeshStatus, stats: Iterable[ShardStats], *, now: float, unix_s: float) -> None:
        self._now, self._unix_s, self._looked_at, self._error = now, unix_s, now, None
        self._status = status
        self._stats = {each.shard: each for each in stats}
        leases = {lease.shard: lease for lease in status.shards}
        for name, lease in self._leases.items():
            if name not in leases:
                self._ghosts[name] = _Ghost(lease, now, name in self._left or lease.state == "draining")
        self._left &= leases.keys()
        self._suspected = {who: at for who, at in self._suspected.items() if unix_s - at < SUSPECTED_S}
        for name in [n for n, ghost in self._ghosts.items() if n in leases or now - ghost.gone_at > GHOST_S]:
            del self._ghosts[name]
        self._leases = leases
        rates: dict[str, dict[str, float]] = {}
        counts: dict[str, _Counts] = {}
        for key, owner, values in (*map(_coordinator_counts, status.coordinators), *map(_shard_counts, self._stats.values())):
            before, counts[key] = self._counts.get(key), _Counts(now, owner, values)
            rates[key] = _rate(before, counts[key])
        self._counts, self._rates = counts, rates
        self._points = {}
        for model in status.models:
            point = self._point(model)
            self._points[model] = point
            self._series.setdefault(model, deque(maxlen=POINTS)).append(point)
        for model in self._series.keys() - set(status.models):
            if not any(ghost.lease.model == model for ghost in self._ghosts.values()):
                del self._series[model]

    def failed(self, reason: str, *, now: float, unix_s: float) -> None:
        self._now, self._unix_s, self._error = now, unix_s, reason

    def happened(self, event: Event) -> None:
        """Take one event. An event that is known already is ignored, because a stored event can also arrive live."""
        said = event.model_dump(mode="json")
        if any(said.items() <= known.items() for _, known in self.events):
            return
        if event.kind == "left":
            self._left.add(event.who)
        elif event.kind in ("lost", "suspected", "failed_over"):
            self._suspected[event.who] = event.at_unix_s
        elif event.kind in ("joined", "ready"):
            self._suspected.pop(event.who, None)
        self.event_number += 1
        self.events.append((self.event_number, {**said, "number": self.event_number}))

    # -- what goes out -------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        models = sorted(set(self._status.models) | {ghost.lease.model for ghost in self._ghosts.values()})
        return {
            "at_unix_s": self._unix_s,
            "error": self._error,
            "seen_s": None if self._looked_at is None else self._now - self._looked_at,
            "models": [self._model(model) for model in models],
        }

    def history(self) -> dict[str, Any]:
        """What a new viewer gets beside the snapshot: the points so far, and the last events, oldest first."""
        return {
            "series": {model: list(points) for model, points in self._series.items()},
            "events": [event for _, event in self.events],
        }

    # -- inside --------------------------------------------------------------------------------------------------------

    def _model(self, model: str) -> dict[str, Any]:
        shards = [lease for lease in self._leases.values() if lease.model == model]
        ghosts = [ghost for ghost in self._ghosts.values() if ghost.lease.model == model]
        coordinators = [c for c in self._status.coordinators if c.model == model]
        layers = max((lease.total_layers for lease in (*shards, *(ghost.lease for ghost in ghosts))), default=0)
        missing = _uncovered(layers, [lease for lease in shards if lease.state in ("ready", "draining")])
        state, reason = _state(shards, ghosts, coordinators, missing, [lease.shard for lease in shards if lease.shard in self._suspected])
        point = self._points.get(model)
        return {
            "name": model,
            "layers": layers,
            "state": state,
            "reason": reason,
            "missing": [{"start": start, "stop": stop} for start, stop in missing],
            "context": max((c.stats.context or 0 for c in coordinators), default=0),
            "live": sum(c.live for c in coordinators),
            "queued": sum(c.queued for c in coordinators),
            "capacity": max((c.capacity for c in coordinators), default=0),
            "point": point,
            "latency": _latency(coordinators, self._unix_s),
            "reused": _reused(coordinators),
            "step": self._step(coordinators),
            "shards": [self._shard(lease) for lease in shards]
            + [self._shard(ghost.lease) | self._gone(ghost) for ghost in sorted(ghosts, key=lambda ghost: ghost.lease.shard)],
            "coordinators": [self._coordinator(c) for c in coordinators],
            "sessions": [_line(session, c) for c in coordinators for session in c.stats.sessions],
            "recent": [_line(session, c) for session, c in _recent(coordinators)],
        }

    def _gone(self, ghost: _Ghost) -> dict[str, Any]:
        return {"state": "left" if ghost.orderly else "lost", "gone_s": self._now - ghost.gone_at, "used": 0, "load": 0.0}

    def _shard(self, lease: ShardLease) -> dict[str, Any]:
        stats, rates = self._stats.get(lease.shard), self._rates.get(f"shard {lease.shard}", {})
        return {
            "name": lease.shard,
            "start": lease.layers_start,
            "stop": lease.layers_end,
            "state": "suspected" if lease.state == "ready" and lease.shard in self._suspected else lease.state,
            "rows": lease.rows,
            "used": stats.rows - stats.free_rows if stats is not None else lease.rows - lease.free_rows,
            "load": lease.load,
            "step_s": lease.step_s,
            "memory_bytes": stats.memory_bytes if stats is not None else lease.memory_bytes,
            "queue_frames": stats.queue_frames if stats is not None else lease.queue_frames,
            "host": lease.host,
            "pid": lease.pid,
            "uptime_s": stats.uptime_s if stats is not None else None,
            "in_bytes_per_s": rates.get("bytes_in", 0.0),
            "out_bytes_per_s": rates.get("bytes_out", 0.0),
            "tokens_per_s": rates.get("decode_tokens", 0.0),
            "rejected": sum(stats.rejected.values()) if stats is not None else 0,
            "gaps": sum(stats.gaps.values()) if stats is not None else 0,
        }

    def _coordinator(self, status: CoordinatorStatus) -> dict[str, Any]:
        names = ("submitted", "finished", "failed", "cancelled", "rejected", "restarts", "tokens", "prompt_tokens", "reused_tokens")
        rate = self._rates.get(f"coordinator {status.name}", {}).get("tokens", 0.0)
        return {
            "name": status.name,
            "live": status.live,
            "queued": status.queued,
            "serving": status.serving,
            "tokens_per_s": rate,
            **{name: getattr(status.stats, name) for name in names},
        }

    def _step(self, coordinators: Sequence[CoordinatorStatus]) -> dict[str, float] | None:
        """The mean decode step since the previous look, and its parts. None: there was no step."""
        total = dict.fromkeys(("steps", "step_s", "compute_s", "queue_s", "codec_s"), 0.0)
        for coordinator in coordinators:
            rates = self._rates.get(f"coordinator {coordinator.name}", {})
            for name in total:
                total[name] += rates.get(name, 0.0)
        steps = total.pop("steps")
        if steps <= 0:
            return None
        means = {name: value / steps for name, value in total.items()}
        means["hops_s"] = max(means["step_s"] - means["compute_s"] - means["queue_s"] - means["codec_s"], 0.0)
        return means

    def _point(self, model: str) -> Point:
        coordinators = [c for c in self._status.coordinators if c.model == model]
        step, latency = self._step(coordinators), _latency(coordinators, self._unix_s)
        return [
            self._unix_s,
            sum(self._rates.get(f"coordinator {c.name}", {}).get("tokens", 0.0) for c in coordinators),
            None if latency is None else latency["first_token_s"],
            None if step is None else step["step_s"],
            float(sum(c.live - c.queued for c in coordinators)),
            float(sum(c.queued for c in coordinators)),
        ]


def _coordinator_counts(status: CoordinatorStatus) -> tuple[str, str, dict[str, float]]:
    hops = status.stats.hops
    steps = float(hops.steps)
    sums = {name: steps * getattr(hops, name) for name in ("step_s", "compute_s", "queue_s", "codec_s")}
    return f"coordinator {status.name}", status.name, {"tokens": float(status.stats.tokens), "steps": steps, **sums}


def _shard_counts(stats: ShardStats) -> tuple[str, str, dict[str, float]]:
    names = ("bytes_in", "bytes_out", "decode_tokens")
    return f"shard {stats.shard}", stats.instance, {name: float(getattr(stats, name)) for name in names}


def _rate(before: _Counts | None, after: _Counts) -> dict[str, float]:
    """The counts per second between two looks. Empty if the process was restarted between them."""
    if before is None or before.owner != after.owner or after.at <= before.at:
        return {}
    if any(after.values[name] < before.values.get(name, 0.0) - 1e-9 for name in ("tokens", "bytes_in") if name in after.values):
        return {}
    return {name: max(value - before.values.get(name, 0.0), 0.0) / (after.at - before.at) for name, value in after.values.items()}


def _uncovered(layers: int, shards: Sequence[ShardLease]) -> list[tuple[int, int]]:
    """The layers that no shard holds, as ranges."""
    held = {layer for lease in shards for layer in range(lease.layers_start, lease.layers_end)}
    found: list[tuple[int, int]] = []
    for layer in range(layers):
        if layer in held:
            continue
        if found and found[-1][1] == layer:
            found[-1] = (found[-1][0], layer + 1)
        else:
            found.append((layer, layer + 1))
    return found


def _state(
    shards: Sequence[ShardLease],
    ghosts: Sequence[_Ghost],
    coordinators: Sequence[CoordinatorStatus],
    missing: Sequence[tuple[int, int]],
    suspected: Sequence[str],
) -> tuple[str, str]:
    """One of down, starting, degraded, ready; and a sentence for people."""
    where = " and ".join(f"{start}-{stop}" for start, stop in missing)
    if not coordinators:
        return "down", "No coordinator answers. Start one with `mesh coordinator`; shards wait for it."
    if missing:
        if any(lease.state in ("loading", "warming") for lease in shards):
            return "starting", f"Layers {where} are being loaded."
        return "down", f"No shard holds layers {where}. `mesh join` starts one; requests wait for it."
    if not any(c.serving for c in coordinators):
        return "starting", "The shards are there; the coordinator has not seen a complete chain yet."
    lost = [ghost.lease for ghost in ghosts if not ghost.orderly]
    if lost:
        names = ", ".join(sorted(lease.shard for lease in lost))
        return "degraded", f"{names} {'is' if len(lost) == 1 else 'are'} lost; the other replicas carry on."
    if suspected:
        return "degraded", f"{', '.join(suspected)} {'does' if len(suspected) == 1 else 'do'} not answer; sessions go another way."
    if any(lease.state == "draining" for lease in shards):
        return "degraded", "A shard is draining: its sessions end or move before it stops."
    if any(lease.state in ("loading", "warming") for lease in shards):
        return "ready", "Another shard is getting ready."
    return "ready", ""


def _reused(coordinators: Sequence[CoordinatorStatus]) -> float | None:
    """The share of the tokens of prompts that was not computed, because rows held them. None: there was no prompt."""
    prompts = sum(c.stats.prompt_tokens for c in coordinators)
    return sum(c.stats.reused_tokens for c in coordinators) / prompts if prompts else None


def _line(session: SessionReport, coordinator: CoordinatorStatus) -> dict[str, Any]:
    return session.document() | {"coordinator": coordinator.name}


def _recent(coordinators: Sequence[CoordinatorStatus]) -> list[tuple[SessionReport, CoordinatorStatus]]:
    """The sessions that ended last, with their coordinators, the latest first."""
    found = [(session, c) for c in coordinators for session in c.stats.recent]
    return sorted(found, key=lambda one: one[0].began_unix_s + one[0].total_s, reverse=True)[:32]


def _latency(coordinators: Sequence[CoordinatorStatus], unix_s: float) -> dict[str, float] | None:
    """Latency of the requests that run or ended lately: median and worst time to the first token, median seconds for each later one. A
    request that still waits for its first token counts with the time that it has waited, once that is longer than the median."""
    running = [session for c in coordinators for session in c.stats.sessions]
    ended = [session for session, _ in _recent(coordinators) if session.began_unix_s + session.total_s > unix_s - FRESH_S]
    timed = [(session, session.first_token_s) for session in running + ended if session.first_token_s is not None]
    first = [first_s for _, first_s in timed]
    usual = median(first) if first else 0.0
    first += [session.total_s for session in running if session.first_token_s is None and session.total_s > usual]
    if not first:
        return None
    paces = [(session.total_s - first_s) / (session.tokens - 1) for session, first_s in timed if session.tokens > 1]
    return {"requests": len(first), "first_token_s": median(first), "worst_s": max(first), "token_s": median(paces) if paces else 0.0}
