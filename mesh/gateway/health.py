"""Whether the mesh can generate a token now. That its processes answer is not enough.

A model is ready when its coordinators know a ready replica for every layer range, and a step came back from the last stage within
`fresh_s`. If the last step is older, because there was no request, two tokens are generated as a check. A report is reused for half a
second, and requests that come at the same time share one check.

The gateway is ready while its own model is, or, where it has none, while any model is: a load balancer that left it out for one model's
sake would take the others along.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from mesh.client import AsyncMeshClient, CoordinatorStatus, MeshStatus
from mesh.errors import Busy, DeadlineExceeded, MeshError
from mesh.gateway.known import KnownModels
from mesh.protocol.status import ShardLease

__all__ = ["HealthMonitor", "HealthReport", "ModelReport", "RangeReport"]

_CACHED_S = 0.5
_STATUS_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class RangeReport:
    """A layer range as `A-B`, the shards that are ready for it, and its other shards."""

    layers: str
    ready: tuple[str, ...]
    others: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelReport:
    """last_step_s: how long ago a step came back; None: none has. probed: two tokens were generated as a check."""

    model: str
    ready: bool
    reason: str
    last_step_s: float | None
    probed: bool
    ranges: tuple[RangeReport, ...]


@dataclass(frozen=True, slots=True)
class HealthReport:
    """`reason`: what is not ready, also where the gateway is ready all the same."""

    ready: bool
    reason: str
    models: tuple[ModelReport, ...]

    def of(self, model: str) -> HealthReport:
        """The part about one model."""
        chosen = tuple(health for health in self.models if health.model == model)
        if not chosen:
            return HealthReport(False, self.reason or f"no coordinator serves {model}", ())
        return HealthReport(chosen[0].ready, chosen[0].reason, chosen)


class HealthMonitor:
    """See the module's docstring. `default`: the model that must be served."""

    def __init__(
        self, client: AsyncMeshClient, models: KnownModels, *, default: str | None, fresh_s: float = 2.0, probe_timeout_s: float = 5.0
    ) -> None:
        self._client = client
        self._models = models
        self._default = default
        self._fresh_s = fresh_s
        self._probe_timeout_s = probe_timeout_s
        self._report: HealthReport | None = None
        self._looked_at = float("-inf")
        self._looking: asyncio.Task[HealthReport] | None = None

    async def check(self) -> HealthReport:
        """The report. It never raises because of the mesh: what is wrong with the mesh stands in the report."""
        if self._report is not None and time.monotonic() - self._looked_at < _CACHED_S:
            return self._report
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
            self._looking.add_done_callback(self._looked)
        return await asyncio.shield(self._looking)

    def _looked(self, task: asyncio.Task[HealthReport]) -> None:
        self._looking = None
        if not task.cancelled() and task.exception() is None:
            self._report, self._looked_at = task.result(), time.monotonic()

    async def _look(self) -> HealthReport:
        try:
            async with asyncio.timeout(_STATUS_TIMEOUT_S):
                status = await self._client.status()
        except MeshError as error:
            return HealthReport(False, str(error), ())
        except TimeoutError:
            return HealthReport(False, f"the mesh did not say who is there within {_STATUS_TIMEOUT_S:g} s", ())
        self._models.take(status.coordinators)
        names = sorted({c.model for c in status.coordinators} | ({self._default} if self._default else set()))
        if not names:
            return HealthReport(False, "no coordinator answers: start one, or see `mesh status`", ())
        models = tuple(await asyncio.gather(*(self._look_at(name, status) for name in names)))
        bad = [health for health in models if not health.ready]
        needed = [health for health in models if self._default in (None, health.model)]
        reason = bad[0].reason if len(models) == 1 and bad else "; ".join(f"{health.model}: {health.reason}" for health in bad)
        return HealthReport(any(health.ready for health in needed), reason, models)

    async def _look_at(self, model: str, status: MeshStatus) -> ModelReport:
        coordinators = [c for c in status.coordinators if c.model == model]
        leases = [lease for lease in status.shards if lease.model == model]
        ranges = _ranges(leases)
        last_step_s = _last_step_s(coordinators)
        if not coordinators:
            return ModelReport(model, False, f"no coordinator serves {model}", None, False, ranges)
        if not any(c.serving for c in coordinators):
            return ModelReport(model, False, _what_lacks(leases), last_step_s, False, ranges)
        if last_step_s is not None and last_step_s <= self._fresh_s:
            return ModelReport(model, True, "", last_step_s, False, ranges)
        reason = await self._probe(model)
        return ModelReport(model, not reason, reason, last_step_s if reason else 0.0, True, ranges)

    async def _probe(self, model: str) -> str:
        """Generate two tokens. Returns why that failed, or an empty text."""
        try:
            await self._client.generate(
                tokens=[0], max_tokens=2, ignore_eos=True, temperature=0.0, model=model, timeout_s=self._probe_timeout_s
            )
        except DeadlineExceeded:
            return f"{model} did not generate a token within {self._probe_timeout_s:g} s"
        except Busy as error:
            return f"{model} generates nothing at present, and its queue is full: {error}"
        except MeshError as error:
            return str(error)
        return ""


def _last_step_s(coordinators: Sequence[CoordinatorStatus]) -> float | None:
    ages = [age for c in coordinators if (age := c.stats.last_step_s) is not None]
    return min(ages, default=None)


def _ranges(leases: Sequence[ShardLease]) -> tuple[RangeReport, ...]:
    found: dict[tuple[int, int], list[ShardLease]] = {}
    for lease in leases:
        found.setdefault((lease.layers_start, lease.layers_end), []).append(lease)
    return tuple(
        RangeReport(
            f"{start}-{end}",
            tuple(lease.shard for lease in those if lease.state == "ready"),
            tuple(lease.shard for lease in those if lease.state != "ready"),
        )
        for (start, end), those in sorted(found.items())
    )


def _what_lacks(leases: Sequence[ShardLease]) -> str:
    """A sentence that names the first layers without a ready shard."""
    if not leases:
        return "there is no shard"
    total = leases[0].total_layers
    reached = 0
    while reached < total:
        ends = [lease.layers_end for lease in leases if lease.state == "ready" and lease.layers_start == reached]
        if not ends:
            others = [f"{lease.shard} is {lease.state}" for lease in leases if lease.layers_start == reached and lease.state != "ready"]
            return f"layers from {reached} on have no shard that is ready" + (f" ({', '.join(others)})" if others else "")
        reached = max(ends)
    return "the coordinators do not know a whole chain of shards yet"
