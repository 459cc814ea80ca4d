"""The shards, as this coordinator meets them: their leases, rows opened and closed there, and whether they live.

Whatever comes of a lease, an answer or a silence is an event for the core.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from mesh.bus import Bus, Received, Subscription, end_tasks
from mesh.coordinator.continuity import Announce
from mesh.coordinator.core.events import (
    CloseRow,
    OpenRefused,
    OpenRow,
    Probe,
    ProbeAnswered,
    ReplicaGone,
    ReplicaSeen,
    RowOpened,
    RowsAnswered,
)
from mesh.coordinator.core.expectations import ExpectedShards
from mesh.coordinator.core.leases import ANSWER_S, Leases
from mesh.coordinator.core.machine import Core
from mesh.coordinator.core.prefixes import Beginning
from mesh.coordinator.driver import CoreDriver
from mesh.coordinator.openings import Openings
from mesh.coordinator.outbox import Outbox
from mesh.coordinator.trace import OpenTry
from mesh.coordinator.translate import replica_of
from mesh.errors import Busy, DeadlineExceeded, MeshError, MessageRejected, NobodyListens, Unavailable
from mesh.protocol import control, frame_codec, topics
from mesh.protocol.generation import public_id
from mesh.protocol.status import ShardLease
from mesh.telemetry.log_context import log_context

__all__ = ["Shards"]

log = logging.getLogger("mesh.coordinator")

_SETTLING_S = 3.0
"""Seconds after this coordinator's reconnection in which a subject without a listener proves nothing: the shard may still be
reconnecting too."""
_LOOK_S = 0.5
"""How often it is looked for shards that have been silent for too long."""
_STALL_S = 1.5
"""After a pause of this loop that was longer, the silence of the shards does not count."""
_MOST_REFUSED = 256
_MOST_GONE = 256


class _Opening(NamedTuple):
    """A row that a shard was asked for, and when."""

    effect: OpenRow
    message: control.Open
    began: float


class Shards:
    """`coordinator` is this coordinator's process. `expected`: the shards that the configuration asks for. `open_timeout_s`: how long a
    shard may take to open a row. `opened(session, tried)` is called after each try. `context_of`: the (trace, span) of a session."""

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
        opened: Callable[[str, OpenTry], None],
        context_of: Callable[[str], tuple[str, str] | None],
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
        self._opened = opened
        self._context_of = context_of
        self._closing: dict[tuple[str, int], list[CloseRow]] = {}  # by shard and epoch
        self._openings = Openings(bus, self._on_answers, timeout_s=open_timeout_s)
        self._leases = Leases()
        self._subscription: Subscription | None = None
        self._watcher: asyncio.Task[Any] | None = None
        self._refused: dict[str, str] = {}  # shard -> its instance that cannot take part, and was reported
        self._lacking = ""
        self.gone: Counter[str] = Counter()
        """How often each shard was taken to be gone; of the last _MOST_GONE shards that were."""

    def lease_ages(self) -> dict[str, float]:
        """Seconds since each shard was heard."""
        return self._leases.ages(time.monotonic())

    async def start(self) -> None:
        """Hear the leases from now on, and ask every shard for its lease."""
        self._subscription = await self._bus.subscribe(topics.LEASE.every(self._model), self._on_lease)
        await self._ask_all()
        self._watcher = self._bus.spawn(self._watch(), "watching shards")
        self._bus.on_change(self._on_connection)

    async def stop(self) -> None:
        if self._watcher is not None:
            await end_tasks(self._watcher)
        if self._subscription is not None:
            await self._subscription.stop()

    # -- leases --------------------------------------------------------------------------------------------------------

    async def _ask_all(self) -> None:
        for answer in await self._bus.gather(topics.LEASES.at().subject):
            try:
                lease = ShardLease.parse(answer.data)
            except MessageRejected as error:
                log.warning("a lease that cannot be read: %s", error)
                continue
            if lease.model == self._model:
                await self._take(lease)

    async def _on_lease(self, received: Received) -> None:
        await self._take(topics.LEASE.parse(received.data))

    async def _take(self, lease: ShardLease) -> None:
        shard = lease.shard
        if not self._leases.heard(shard, lease.instance, time.monotonic()):
            return
        if lease.state in ("ready", "draining") and self._compatible(lease):
            await self._driver.handle(ReplicaSeen(replica_of(lease)))
            return
        if lease.state == "left":
            self._leases.gone(shard)
        if self._core.knows(shard):
            left = lease.state == "left"
            log.info("shard %s is %s", shard, "gone" if left else lease.state)
            await self._lose(shard, "" if left else "another process has taken its place")

    async def _watch(self) -> None:
        before = time.monotonic()
        while True:
            now = time.monotonic()
            if now - before > _STALL_S or not self._bus.connected:
                self._leases.excuse(now)
            before = now
            silent, gone = self._leases.check(now)
            for shard in gone:
                if self._core.knows(shard):
                    log.info("shard %s is gone: neither its lease nor an answer came", shard)
                    await self._lose(shard, "neither its lease nor an answer came")
            for shard in silent:
                self._bus.spawn(self.probe(Probe(shard, now)), "probing a shard")
            await asyncio.sleep(_LOOK_S)

    def _on_connection(self, connected: bool) -> None:
        self._leases.excuse(time.monotonic())
        if connected:
            self._bus.spawn(self._ask_all(), "asking for leases")

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

    def open(self, effect: OpenRow) -> None:
        """Ask a shard, or the queue group of a range, for a row. The answer, or its absence, is an event for the core."""
        request = effect.request
        context = self._context_of(request.id)
        message = control.Open(
            session=effect.key,
            epoch=effect.epoch,
            coordinator=self._coordinator,
            model_hash=self._model_hash,
            prompt_length=len(request.prompt),
            keep=effect.keep,
            sampling=request.sampling,
            instance=None if effect.shard is None else self._leases.instance(effect.shard),
            request=public_id(request.id),
            trace=None if context is None else context[0],
            reuse=_prefix(effect.reuse),
            prompt=_prefix(effect.prompt),
        )
        asked = _Opening(effect, message, time.perf_counter())
        if effect.shard is None:
            self._bus.spawn(self._open_any(asked), "opening a row")
        else:
            self._openings.ask(effect.shard, asked, message)

    async def _open_any(self, asked: _Opening) -> None:
        to = topics.OPEN_ANY.at(self._model, asked.effect.layers)
        try:
            answer: control.Opened | MeshError = await self._bus.request(to, asked.message, timeout_s=self._open_timeout_s)
        except MeshError as error:
            answer = error
        await self._driver.handle(self._row_answer(asked, answer))

    async def _on_answers(self, shard: str, answers: list[tuple[_Opening, control.Opened | MeshError]]) -> None:
        if any(isinstance(answer, NobodyListens) for _, answer in answers):
            await self._gone(shard)
        await self._driver.handle(RowsAnswered(tuple(self._row_answer(asked, answer) for asked, answer in answers)))

    def _row_answer(self, asked: _Opening, answer: control.Opened | MeshError) -> RowOpened | OpenRefused:
        effect, message = asked.effect, asked.message
        with log_context(request=message.request, trace=message.trace, shard=effect.shard):
            if isinstance(answer, control.Opened) and answer.instance != self._leases.instance(answer.shard):  # one that was replaced
                self.close(CloseRow(effect.key, effect.epoch, answer.shard))
                answer = Unavailable(f"shard {answer.shard} is another process now")
            shard, failure = (effect.shard, str(answer)) if isinstance(answer, MeshError) else (answer.shard, "")
            self._opened(effect.request.id, OpenTry(asked.began, time.perf_counter(), effect.epoch, effect.layers, shard, failure))
            if isinstance(answer, control.Opened):
                return RowOpened(effect.key, effect.epoch, effect.stage, answer.shard, answer.row, answer.filled, answer.begins)
            full = isinstance(answer, Busy)
            if not full:
                log.warning("opening a row of %s: %s", effect.shard or f"layers {effect.layers}", answer)
            return OpenRefused(effect.key, effect.epoch, effect.stage, effect.shard, full, answer, not answer.retryable)

    def close(self, effect: CloseRow) -> None:
        """Give a row back, with `send_closes`."""
        self._closing.setdefault((effect.shard, effect.epoch), []).append(effect)

    def send_closes(self) -> None:
        """Give the rows of `close` back: one message for each shard where several sessions have ended."""
        closing, self._closing = self._closing, {}
        for (shard, epoch), effects in closing.items():
            for at in range(0, len(effects), control.MOST_CLOSES):
                some = effects[at : at + control.MOST_CLOSES]
                message = control.Close(
                    coordinator=self._coordinator,
                    sessions=tuple(effect.key for effect in some),
                    epoch=epoch,
                    kept=tuple(
                        control.HeldPrefix(session=effect.key, digest=effect.kept.digest, positions=effect.kept.positions)
                        for effect in some
                        if effect.kept is not None
                    ),
                )
                self._outbox.message(topics.CLOSE.at(shard).subject, message.to_bytes())

    async def close_all(self, coordinator: str) -> None:
        """Free every row that `coordinator` holds at the shards."""
        message = control.Close(coordinator=coordinator, sessions=(), all=True)
        for shard in {replica.shard for replica in self._core.replicas()}:
            await self._bus.send(topics.CLOSE.at(shard), message)

    # -- whether they live ---------------------------------------------------------------------------------------------

    async def probe(self, effect: Probe) -> None:
        """Find out whether a shard lives, and which steps it has. Where nothing is answered the core asks again."""
        instance = self._leases.instance(effect.shard)
        ping = control.Ping(coordinator=self._coordinator, instance=instance)
        try:
            pong = await self._bus.request(topics.PING.at(effect.shard), ping, timeout_s=ANSWER_S)
        except NobodyListens:
            await self._gone(effect.shard)
        except (DeadlineExceeded, Unavailable) as error:
            log.debug("asking %s: %s", effect.shard, error)
        else:
            if pong.instance != self._leases.instance(effect.shard):
                return
            self._leases.answered(effect.shard, time.monotonic())
            await self._driver.handle(ProbeAnswered(effect.shard, effect.asked_at, frozenset(pong.pending)))

    async def _gone(self, shard: str) -> None:
        """No process listens on a shard's subject: the shard is gone, unless this coordinator has only just reconnected."""
        if not self._bus.connected or self._driver.connected_for_s() < _SETTLING_S:
            return
        self._leases.gone(shard)
        if not self._core.knows(shard):
            return
        log.info("no process listens on the subject of shard %s", shard)
        await self._lose(shard, "its process has ended")

    async def _lose(self, shard: str, why: str) -> None:
        """A shard that took part is gone. `why` empty: it has said so itself."""
        if why:
            self._announce("lost", shard, why)
        count = self.gone.pop(shard, 0) + 1
        while len(self.gone) >= _MOST_GONE:
            del self.gone[next(iter(self.gone))]
        self.gone[shard] = count
        await self._driver.handle(ReplicaGone(shard))


def _prefix(beginning: Beginning | None) -> control.Prefix | None:
    return None if beginning is None else control.Prefix(digest=beginning.digest, positions=beginning.positions)
