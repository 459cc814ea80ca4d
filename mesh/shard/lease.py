"""A shard's lease: said to everyone over plain NATS, and kept in JetStream for those who look there.

What is said needs no JetStream. Coordinators live by it (mesh/coordinator/core/leases.py). The copy in the bucket is for people, for
`mesh join`, and for a process of the same name.

Two processes may come to have one name: the first was suspended or cut off, the second was started in its place, and then the first goes
on. The later instance counts (mesh/protocol/instance.py). The earlier one learns of it in three ways, and ends:

    it hears what the other one says on the subject of their name, at once when it goes on
    its next write to the bucket, by compare and set, finds the other one's lease
    a coordinator names the later instance in a request (Shard.on_open, Shard.on_ping)
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

from mesh.bus import Bucket, Bus, Received, Subscription, end_tasks
from mesh.errors import MeshError, MessageRejected
from mesh.protocol import subjects, topics
from mesh.protocol.status import ShardLease

__all__ = ["LeaseKeeper"]

log = logging.getLogger("mesh.shard")

_TRIES: Final = 3
_FORMER_S: Final = 1.0


class LeaseKeeper:
    """`make` gives the lease as it is now. `replaced(lease)` is called when a later instance of the same name turns out to serve, with
    that one's lease.

    counters: failed (writes to the bucket), remade (the bucket was lost and made again).
    """

    def __init__(
        self, bus: Bus, name: str, model: str, ttl_s: float, make: Callable[[], ShardLease], replaced: Callable[[ShardLease], None]
    ) -> None:
        self.bucket = Bucket(bus, subjects.KV_SHARDS, ttl_s=ttl_s)
        self.counters: Counter[str] = Counter()
        self._bus = bus
        self._name = name
        self._subject = topics.LEASE.at(model, name)
        self._every_s = min(subjects.RENEW_S, ttl_s / 3)
        self._make = make
        self._replaced = replaced
        self._revision = 0
        self._mine: set[str] = set()  # the instances that this process has been
        self._say_now = asyncio.Event()
        self._keep_now = asyncio.Event()
        self._failing = False
        self._tasks: list[asyncio.Task[Any]] = []
        self._subscription: Subscription | None = None
        bus.on_change(lambda connected: self.renew())

    async def start(self) -> None:
        self._subscription = await self._bus.subscribe(self._subject, self._on_lease)
        self._tasks = [self._bus.spawn(self._say(), "saying the lease"), self._bus.spawn(self._keep(), "lease")]

    def renew(self) -> None:
        """Something in the lease has changed: say it now."""
        self._say_now.set()
        self._keep_now.set()

    async def stop(self) -> None:
        """End the lease: say so, and delete the copy. Never raises."""
        await end_tasks(*self._tasks)
        if self._subscription is not None:
            await self._subscription.stop()
        if not self._bus.connected:
            return
        try:
            await self._bus.send(self._subject, self._make().model_copy(update={"state": "left"}))
            if self._revision:
                await self.bucket.delete(self._name, revision=self._revision)
        except MeshError as error:
            log.warning("leaving: %s", error)

    async def former(self) -> str:
        """The instance of the process that had this name before, as far as the bucket knows; empty if there is none."""
        try:
            async with asyncio.timeout(_FORMER_S):
                entry = await self.bucket.get(self._name)
            return ShardLease.parse(entry.value).instance if entry is not None and entry.value else ""
        except (MeshError, TimeoutError):
            return ""

    # -- inside --------------------------------------------------------------------------------------------------------

    async def _say(self) -> None:
        while True:
            self._say_now.clear()
            try:
                if self._bus.connected:  # otherwise it is said at once when the connection is back
                    await self._bus.send(self._subject, self._current())
            except MeshError as error:
                log.warning("saying the lease: %s", error)
            await _set_within(self._say_now, self._every_s)

    async def _on_lease(self, received: Received) -> None:
        """A lease of this name: its own, or another process's."""
        lease = topics.LEASE.parse(received.data)
        mine = self._make().instance
        if lease.instance in self._mine or lease.instance == mine or lease.state == "left":
            return
        if lease.instance > mine:
            self._replaced(lease)
        else:
            self._say_now.set()  # so that the other process hears of this one

    async def _keep(self) -> None:
        while True:
            self._keep_now.clear()
            try:
                if self._bus.connected:
                    await self._write()
                    if self._failing:
                        self._failing = False
                        log.info("the lease is written again")
            except MeshError as error:
                self.counters["failed"] += 1
                if not self._failing:
                    self._failing = True
                    log.warning("the lease cannot be written, and is only said until it can: %s", error)
            await _set_within(self._keep_now, self._every_s)

    async def _write(self) -> None:
        """Write the lease, if the one in the bucket is this process's last one, or an earlier instance's."""
        for _ in range(_TRIES):
            lease = self._current()
            revision = await self.bucket.update(self._name, lease.to_bytes(), revision=self._revision)
            if revision is not None:
                self._revision = revision
                return
            entry = await self.bucket.get(self._name)
            self._revision = 0 if entry is None else entry.revision
            if entry is None or not entry.value:
                continue
            try:
                other = ShardLease.parse(entry.value)
            except MessageRejected:  # another version's: it is overwritten
                continue
            if other.instance not in self._mine and other.instance > lease.instance:
                self._replaced(other)
                return

    def _current(self) -> ShardLease:
        lease = self._make()
        self._mine.add(lease.instance)
        return lease


async def _set_within(event: asyncio.Event, seconds: float) -> None:
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
