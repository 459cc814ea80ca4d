"""What the checks of a mesh look at: gathered once, from the answers of its processes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import orjson

from mesh.bus import Bus, EventLog
from mesh.bus.service import endpoint_data
from mesh.errors import MeshError, MessageRejected, NobodyListens
from mesh.protocol import subjects, topics
from mesh.protocol.control import Ping
from mesh.protocol.status import CoordinatorStats, LeaseQuery, ShardLease, ShardStats, StatsRequest

__all__ = ["Clock", "CoordinatorSeen", "ShardSeen", "Site", "look"]

_SERVICE: Final = subjects.SERVICE_COORDINATOR
_ANSWER_S: Final = 2.0
_EVENTS_S: Final = 3.0
_LATELY_S: Final = 3600.0
_MOST: Final = 100
_CAME: Final = ("joined", "ready")
_WENT: Final = ("left", "forgotten", "rejected")
_ME: Final = "doctor"


@dataclass(frozen=True, slots=True)
class Clock:
    """How far a clock is ahead of this machine's, and by how much that may be wrong: half of the round trip."""

    ahead_s: float
    error_s: float


@dataclass(frozen=True, slots=True)
class ShardSeen:
    """`answers`: whether its event loop answered. `stats`, `clock`: None where it gave none."""

    lease: ShardLease
    answers: bool
    stats: ShardStats | None
    clock: Clock | None

    @property
    def name(self) -> str:
        return self.lease.shard


@dataclass(frozen=True, slots=True)
class CoordinatorSeen:
    name: str
    version: str
    model: str
    model_hash: str
    stats: CoordinatorStats | None
    clock: Clock | None


@dataclass(frozen=True, slots=True)
class Site:
    """The shards (by model, layers and name) and the coordinators that were found. Shards that were there lately, by the events of the
    mesh, and have not left in order: `still` are connected and do not answer, `lost` are gone. `unreadable`: processes of another
    version."""

    shards: tuple[ShardSeen, ...] = ()
    coordinators: tuple[CoordinatorSeen, ...] = ()
    still: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(sorted({shard.lease.model for shard in self.shards} | {one.model for one in self.coordinators}))

    def shards_of(self, model: str) -> list[ShardSeen]:
        return [shard for shard in self.shards if shard.lease.model == model]

    def coordinators_of(self, model: str) -> list[CoordinatorSeen]:
        return [one for one in self.coordinators if one.model == model]


async def look(bus: Bus, kept: Sequence[ShardLease] = ()) -> Site:
    """Ask every process of the mesh. `kept`: leases that are still in JetStream; a shard that is among them and does not answer is
    there, and does not answer."""
    answers, (coordinators, unreadable) = await asyncio.gather(
        bus.gather(topics.LEASES.at().subject, LeaseQuery().to_bytes()), _coordinators(bus)
    )
    found = {lease.shard: lease for lease in kept}
    for answer in answers:
        try:
            lease = ShardLease.parse(answer.data)
        except MessageRejected:
            unreadable = (*unreadable, "a shard")
            continue
        before = found.get(lease.shard)
        if before is None or lease.instance >= before.instance:
            found[lease.shard] = lease
    leases = sorted(found.values(), key=lambda lease: (lease.model, lease.layers, lease.shard))
    shards, (still, lost) = await asyncio.gather(
        asyncio.gather(*(_shard(bus, lease) for lease in leases if lease.state != "left")),
        _missed(bus, {lease.shard for lease in leases}),
    )
    return Site(tuple(shards), coordinators, still, lost, unreadable)


async def _missed(bus: Bus, found: Collection[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(still, lost) of a Site. The lease of a process that stands still ends within seconds; its subscriptions stay."""
    there: set[str] = set()
    try:
        async with asyncio.timeout(_EVENTS_S):
            async for event in EventLog(bus).events(since_unix_s=time.time() - _LATELY_S):
                if event.kind in _CAME:
                    there.add(event.who)
                elif event.kind in _WENT:
                    there.discard(event.who)
    except (MeshError, TimeoutError):  # this user may not read them, or nothing keeps them
        pass
    still: list[str] = []
    lost: list[str] = []
    names = sorted(there - set(found))[:_MOST]
    for name, listens in zip(names, await asyncio.gather(*(_listens(bus, name) for name in names)), strict=True):
        (still if listens else lost).append(name)
    return tuple(still), tuple(lost)


async def _listens(bus: Bus, shard: str) -> bool:
    """Whether a process has subscribed to a shard's subject, also where it does not answer."""
    try:
        await bus.request(topics.PING.at(shard), Ping(coordinator=_ME), timeout_s=_ANSWER_S)
    except NobodyListens:
        return False
    except MeshError:
        return True
    return True


async def _shard(bus: Bus, lease: ShardLease) -> ShardSeen:
    try:
        await bus.request(topics.PING.at(lease.shard), Ping(coordinator=_ME), timeout_s=_ANSWER_S)
    except MeshError:  # perhaps this user may not ask it; its statistics are asked for all the same
        answers = False
    else:
        answers = True
    stats, clock = None, None
    began, began_unix_s = time.perf_counter(), time.time()
    try:
        stats = await bus.request(topics.STATS.at(lease.shard), StatsRequest(), timeout_s=_ANSWER_S if answers else _ANSWER_S / 4)
        clock = _clock(began_unix_s, time.perf_counter() - began, stats.unix_s)
    except MeshError:
        pass
    return ShardSeen(lease, answers or stats is not None, stats, clock)


async def _coordinators(bus: Bus) -> tuple[tuple[CoordinatorSeen, ...], tuple[str, ...]]:
    found, unreadable = [], []
    for answer in await bus.gather(f"$SRV.PING.{_SERVICE}"):
        try:
            said = orjson.loads(answer.data)
            id, version, metadata = str(said["id"]), str(said["version"]), dict(said["metadata"])
            name, model, model_hash = str(metadata["coordinator"]), str(metadata["model"]), str(metadata["model_hash"])
        except (orjson.JSONDecodeError, LookupError, TypeError, ValueError):
            unreadable.append("a coordinator")
            continue
        stats, clock = None, None
        began, began_unix_s = time.perf_counter(), time.time()
        try:
            reply = await bus.ask(f"$SRV.STATS.{_SERVICE}.{id}", b"", timeout_s=_ANSWER_S)
            took_s = time.perf_counter() - began
            stats = CoordinatorStats.parse(endpoint_data(reply.data, "generate"))
            clock = _clock(began_unix_s, took_s, stats.unix_s)
        except MeshError:
            pass
        found.append(CoordinatorSeen(name, version, model, model_hash, stats, clock))
    return tuple(sorted(found, key=lambda one: (one.model, one.name))), tuple(unreadable)


def _clock(began_unix_s: float, took_s: float, unix_s: float) -> Clock | None:
    """None: the other side did not say its time."""
    return Clock(unix_s - (began_unix_s + took_s / 2), took_s / 2) if unix_s else None
