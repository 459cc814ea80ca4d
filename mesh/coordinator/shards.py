"""The shards, as this coordinator meets them: their leases, rows opened and closed there, and whether they live.

Whatever comes of a lease, an answer or a silence is an event for the core.
"""

from __future__ import annotations

import logging

from mesh.bus import Bucket, Bus, LeaseTable
from mesh.coordinator.continuity import Announce
from mesh.coordinator.core.events import CloseRow, Event, OpenRefused, OpenRow, Probe, ProbeAnswered, ReplicaGone, ReplicaSeen, RowOpened
from mesh.coordinator.core.expectations import ExpectedShards
from mesh.coordinator.core.machine import Core
from mesh.coordinator.driver import CoreDriver
from mesh.coordinator.outbox import Outbox
from mesh.coordinator.translate import replica_of
from mesh.errors import Busy, DeadlineExceeded, MeshError, NobodyListens, Unavailable
from mesh.protocol import control, frame_codec, subjects, topics
from mesh.protocol.status import ShardLease

__all__ = ["Shards"]

log = logging.getLogger("mesh.coordinator")

_SETTLING_S = 3.0
"""Seconds after this coordinator's reconnection in which a subject without a listener proves nothing: the shard may still be
reconnecting too."""
_ANSWER_S = 1.0
_MOST_REFUSED = 256


class Shards:
    """`coordinator` is this coordinator's name. `expected`: the shards that the configuration asks for. `open_timeout_s`: how long a
    shard may take to open a row."""

    def __init__(
        self,
        bus: Bus,
        core: Core,
        driver: CoreDriver,
        outbox: Outbox,
        announce: Announce,
        *,
        model: str,
        model_hash: str,
        coordinator: str,
        expected: ExpectedShards | None,
        open_timeout_s: float,
    ) -> None:
        self._bus = bus
        self._core = core
        self._driver = driver
        self._outbox = outbox
        self._announce = announce
        self._model = model
        self._model_hash = model_hash
        self._coordinator = coordinator
        self._expected = expected
        self._open_timeout_s = open_timeout_s
        self._leases = LeaseTable(Bucket(bus, subjects.KV_SHARDS, ttl_s=subjects.LEASE_TTL_S), ShardLease, self._on_lease)
        self._refused: dict[str, str] = {}  # shard -> its instance that cannot take part, and was reported
        self._lacking = ""

    async def start(self) -> None:
        await self._leases.start()

    async def stop(self) -> None:
        await self._leases.stop()

    # -- leases --------------------------------------------------------------------------------------------------------

    def _on_lease(self, shard: str, lease: ShardLease | None) -> None:
        if lease is not None and lease.state in ("ready", "draining") and self._compatible(lease):
            self._driver.handle_soon(ReplicaSeen(replica_of(lease)), "lease")
        elif self._core.knows(shard):
            log.info("shard %s is gone", shard)
            self._driver.handle_soon(ReplicaGone(shard), "lease")

    def _compatible(self, lease: ShardLease) -> bool:
        """Whether the shard can take part. A shard of another model is ignored; one of this model with another cut or another frame
        version is reported once."""
        if lease.model_hash == self._model_hash and lease.frame_version == frame_codec.VERSION:
            self._refused.pop(lease.shard, None)
            return True
        if lease.model == self._model and self._refused.get(lease.shard) != lease.instance:
            if len(self._refused) >= _MOST_REFUSED:
                self._refused.clear()
            self._refused[lease.shard] = lease.instance
            why = f"model hash {lease.model_hash}, and {self._model_hash} is served here"
            if lease.frame_version != frame_codec.VERSION:
                why = f"it speaks frame version {lease.frame_version}, and this coordinator {frame_codec.VERSION}"
            log.warning("shard %s takes no part: %s", lease.shard, why)
            self._announce("rejected", lease.shard, why)
        return False

    def report_lacking(self) -> None:
        """Log a change in what is lacking of the shards that the configuration asks for."""
        lacking = self._expected.lacking(self._core.replicas()) if self._expected is not None else ""
        if lacking != self._lacking:
            log.log(logging.WARNING if lacking else logging.INFO, "shards: %s", lacking or "all that were expected are there")
        self._lacking = lacking

    # -- rows ----------------------------------------------------------------------------------------------------------

    async def open(self, effect: OpenRow) -> None:
        """Ask a shard, or the queue group of a range, for a row. The answer, or its absence, is an event for the core."""
        request, key = effect.request, effect.key
        message = control.Open(
            session=key,
            epoch=effect.epoch,
            coordinator=self._coordinator,
            model_hash=self._model_hash,
            prompt_length=len(request.prompt),
            keep=effect.keep,
            sampling=request.sampling,
        )
        if effect.shard is None:
            to = topics.OPEN_ANY.at(self._model, effect.layers)
        else:
            to = topics.OPEN.at(effect.shard)
        event: Event
        try:
            opened = await self._bus.request(to, message, timeout_s=self._open_timeout_s)
            event = RowOpened(key, effect.epoch, effect.stage, opened.shard, opened.row, opened.filled)
        except MeshError as error:
            if isinstance(error, NobodyListens) and effect.shard is not None:
                await self._gone(effect.shard)
            full = isinstance(error, Busy)
            if not full:
                log.warning("opening a row of %s: %s", effect.shard or f"layers {effect.layers}", error)
            permanent = not error.retryable
            event = OpenRefused(key, effect.epoch, effect.stage, effect.shard, full, error, permanent)
        await self._driver.handle(event)

    def close(self, effect: CloseRow) -> None:
        """Give a row back."""
        message = control.Close(coordinator=self._coordinator, sessions=(effect.key,), epoch=effect.epoch)
        self._outbox.message(topics.CLOSE.at(effect.shard).subject, message.to_bytes())

    async def close_all(self, coordinator: str) -> None:
        """Free every row that `coordinator` holds at the shards."""
        message = control.Close(coordinator=coordinator, sessions=(), all=True)
        for shard in {replica.shard for replica in self._core.replicas()}:
            await self._bus.send(topics.CLOSE.at(shard), message)

    # -- whether they live ---------------------------------------------------------------------------------------------

    async def probe(self, effect: Probe) -> None:
        """Find out whether a shard lives, and which steps it has. Where nothing is answered the core asks again."""
        ping = control.Ping(coordinator=self._coordinator)
        try:
            pong = await self._bus.request(topics.PING.at(effect.shard), ping, timeout_s=_ANSWER_S)
        except NobodyListens:
            await self._gone(effect.shard)
        except (DeadlineExceeded, Unavailable) as error:
            log.debug("asking %s: %s", effect.shard, error)
        else:
            await self._driver.handle(ProbeAnswered(effect.shard, effect.asked_at, frozenset(pong.pending)))

    async def _gone(self, shard: str) -> None:
        """No process listens on a shard's subject: the shard is gone, unless this coordinator has only just reconnected."""
        if not self._bus.connected or self._driver.connected_for_s() < _SETTLING_S or not self._core.knows(shard):
            return
        log.info("no process listens on the subject of shard %s", shard)
        self._leases.forget(shard)
        await self._driver.handle(ReplicaGone(shard))
