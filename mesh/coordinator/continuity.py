"""What makes a coordinator replaceable: its sessions are written down, the others are watched, and what they leave is taken over.

a request that may have been asked before   -> find: another has it (passed on to that one), it has ended (its answer), it is an
                                               orphan (taken over), or it is new
a peer died, is silent, or left             -> its rows are closed, its sessions taken over, those that other peers do not get first
a record turns out to be another's          -> the session is dropped here, without a word to the client
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from random import Random
from typing import Any, Final, Protocol

from mesh.bus import Bus, Received, Subscription, end_tasks
from mesh.coordinator.core.peers import Peer, Peers
from mesh.coordinator.records import Recorder, SessionRecord, sessions_bucket
from mesh.coordinator.replies import Job
from mesh.errors import BadRequest, DeadlineExceeded, MeshError, Unavailable
from mesh.protocol import topics
from mesh.protocol.events import EventKind
from mesh.protocol.generation import Generate
from mesh.protocol.status import Alive, Beat

__all__ = ["Continuity", "Host"]

log = logging.getLogger("mesh.coordinator")

PROBE_S: Final = 0.2
SCAN_S: Final = 30.0
"""How often all records are looked through, besides at the start and when a coordinator goes."""
STALL_S: Final = 1.0
"""A pause of this loop after which the others are not blamed for having been silent."""
SETTLE_S: Final = 2.0
"""After a reconnection: the others reconnect as well, each at its own time."""
_ASK_S: Final = 1.0
_RELEASE_S: Final = 5.0


Announce = Callable[[EventKind, str, str], object]
"""(kind, who, detail)"""


class Host(Protocol):
    """The coordinator."""

    def has(self, session: str) -> bool: ...

    async def resume(self, record: SessionRecord, revision: int, asked: Generate | None, reply: str) -> None:
        """Go on with a session that is ours now; `asked` and `reply`: the client has asked for it again, with these."""

    async def lose(self, session: str, record: SessionRecord) -> None:
        """Another one has it: drop it."""

    async def close_rows(self, coordinator: str) -> None:
        """Free what `coordinator` holds at the shards."""


class Continuity:
    """See the module's docstring. `instance` is another one for each process, `name` may be the same after a restart;
    `beat_ttl_s`: after which a coordinator that was not heard of does not live."""

    def __init__(
        self,
        bus: Bus,
        host: Host,
        *,
        model: str,
        model_hash: str,
        name: str,
        instance: str,
        beat_ttl_s: float,
        random: Random,
        announce: Announce,
    ) -> None:
        self.bus = bus
        self.name = name
        self.instance = instance
        self.resumed = 0
        self.recorder = Recorder(sessions_bucket(bus), model, instance, self._on_lost)
        self.peers = Peers(instance)
        self._host = host
        self._model = model
        self._model_hash = model_hash
        self._beat_ttl_s = beat_ttl_s
        self._random = random
        self._inbox = bus.new_inbox()
        self._connected_at = float("-inf")
        self._subscriptions: list[Subscription] = []
        self._watcher: asyncio.Task[Any] | None = None
        self._announce = announce
        bus.on_change(self._on_connection)

    async def start(self) -> None:
        self._subscriptions = [
            await self.bus.subscribe(topics.ALIVE.at(self._model, self.instance), self._on_alive),
            await self.bus.subscribe(topics.BEATS.at(self._model), self._on_beat),
            await self.bus.subscribe(f"{self._inbox}.*", self._on_probed),
        ]
        self.recorder.start()
        self._watcher = self.bus.spawn(self._watch(), "watching coordinators")

    async def hand_over(self) -> set[str]:
        """Give every session to whoever takes it; those of which that is written down."""
        if self._watcher is not None:
            await end_tasks(self._watcher)
        released = await self.recorder.release(_RELEASE_S) if self.bus.connected else set()
        for subscription in self._subscriptions:
            await subscription.stop()
        return released

    def beat(self, *, leaving: bool = False) -> Beat:
        return Beat(coordinator=self.name, ttl_s=self._beat_ttl_s, instance=self.instance, leaving=leaving)

    # -- records -------------------------------------------------------------------------------------------------------

    def keep(self, job: Job) -> None:
        """Write the session down from now on."""
        update = {"prompt": None, "messages": None, "tokens": job.request.prompt, "seed": job.request.sampling.seed, "given": ()}
        message = job.message.model_copy(update=update)

        def snapshot() -> SessionRecord:
            return SessionRecord(
                session=job.request.id,
                model_hash=self._model_hash,
                owner=self.instance,
                epoch=job.epoch,
                digest=job.digest,
                message=message.model_copy(update={"stream": job.message.stream}),
                reply=job.reply,
                # with log probabilities everything is computed again: they are not written down
                given=() if message.logprobs is not None else tuple(token.id for token in job.tokens),
                told=job.told,
            )

        self.recorder.keep(job.request.id, snapshot, revision=job.revision)

    def end(self, job: Job, answer: bytes | None) -> None:
        """The session has ended. Its answer is kept for a while where somebody may ask for it by a name of his own."""
        last = None
        if answer is not None and job.message.session is not None and job.message.attempt != 0:
            last = SessionRecord(
                session=job.request.id,
                model_hash=self._model_hash,
                owner=self.instance,
                epoch=job.epoch,
                digest=job.digest,
                message=Generate(tokens=(0,)),
                reply=job.reply,
                answer=answer.decode(),
            )
        self.recorder.end(job.request.id, last)

    async def find(self, session: str, digest: str, asked: Generate, reply: str, *, direct: bool) -> bool:
        """Whether a request of this name is somebody's: then it is being answered. `direct`: it was sent to this coordinator by
        another one, which believes that it has it. BadRequest: the name is another request's."""
        for _ in range(3):  # until nobody comes in between
            try:
                found = await self.recorder.read(session)
            except MeshError as error:
                log.warning("looking for session %s: %s", session, error)
                return False
            if found is None:
                return False
            record, revision = found
            if record.digest != digest or record.model_hash != self._model_hash:
                raise BadRequest(f"session {session} was another request: give this one its own name", field="session")
            if record.answer is not None:
                await self.bus.publish(reply, record.answer.encode())
                return True
            if record.owner not in (None, self.instance) and not direct and await self._lives(str(record.owner)):
                await self.bus.send(topics.GENERATE_AT.at(self._model, str(record.owner)), asked, reply=reply)
                return True
            if self._host.has(session):
                return False
            taken = await self.recorder.take_over(record, revision, epoch=(asked.attempt or 0) + 1)
            if taken is not None:
                await self._resume(*taken, asked, reply)
                self._announce("resumed", self.name, "1 session of another coordinator, whose client asked again")
                return True
        return False

    # -- peers ---------------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        before = time.monotonic()
        scan_at = before + PROBE_S
        while True:
            now = time.monotonic()
            stalled = now - before > STALL_S
            if stalled:  # perhaps this process was suspended, and others have taken what was its own
                self.recorder.touch_all()
            if stalled or not self.bus.connected or now - self._connected_at < SETTLE_S:
                self.peers.excuse(now)
            before = now
            for peer in self.peers.gone(now):
                self.bus.spawn(self._give_up(peer), f"taking over from {peer.instance}")
            if self.bus.connected:
                await self._probe()
                if now >= scan_at:
                    scan_at = now + SCAN_S
                    self.bus.spawn(self._scan(), "looking for orphans")
            await asyncio.sleep(PROBE_S)

    async def _probe(self) -> None:
        try:
            for instance in self.peers.watched():
                await self.bus.send(topics.ALIVE.at(self._model, instance), Alive(), reply=f"{self._inbox}.{instance}")
        except MeshError as error:
            log.debug("asking coordinators: %s", error)

    async def _scan(self) -> None:
        """Sessions whose owner nobody has heard of: left over from before this process, or by all of them."""
        now = time.monotonic()
        for record, _ in await self.recorder.all():
            if record.answer is None and record.owner is not None and not self.peers.known(record.owner):
                self.peers.heard(record.owner, "", now)  # from now on it is asked, and given up where it does not answer
        await self._adopt(lambda owner: owner is None or self.peers.given_up(owner))

    async def _give_up(self, peer: Peer) -> None:
        log.warning("coordinator %s (%s) is gone: taking over what it was generating", peer.name or "?", peer.instance)
        if peer.name:
            self._announce("suspected", peer.name, "the coordinator does not answer")
            if peer.name != self.name and not self.peers.named(peer.name):
                await self._host.close_rows(peer.name)
        await self._adopt(lambda owner: owner == peer.instance)

    async def _adopt(self, whose: Callable[[str | None], bool]) -> None:
        """Take over the sessions of these owners, as far as no other coordinator is faster."""
        found = await self.recorder.all()
        count = 0
        self._random.shuffle(found)  # several do this at once, and do not get in each other's way
        for record, revision in found:
            if (
                record.answer is not None
                or record.model_hash != self._model_hash
                or not whose(record.owner)
                or self._host.has(record.session)
            ):
                continue
            taken = await self.recorder.take_over(record, revision)
            if taken is not None:
                count += 1
                await self._resume(*taken, None, record.reply)
        if count:
            self._announce("resumed", self.name, f"{count} session{'s' if count > 1 else ''} of another coordinator")

    async def _resume(self, record: SessionRecord, revision: int, asked: Generate | None, reply: str) -> None:
        self.resumed += 1
        await self._host.resume(record, revision, asked, reply)

    async def _lives(self, instance: str) -> bool:
        """As far as is known, or as it answers."""
        if self.peers.lives(instance) and not self.peers.missing_now(instance):
            return True
        try:
            beat = await self.bus.request(topics.ALIVE.at(self._model, instance), Alive(), timeout_s=_ASK_S)
        except (Unavailable, DeadlineExceeded):
            return False
        self._heard(beat)
        return True

    def _heard(self, beat: Beat) -> bool:
        """Whether it was not known to live."""
        if beat.instance is None or not self.peers.heard(beat.instance, beat.coordinator, time.monotonic()):
            return False
        log.info("coordinator %s (%s) is there", beat.coordinator, beat.instance)
        return True

    # -- what arrives --------------------------------------------------------------------------------------------------

    async def _on_alive(self, received: Received) -> None:
        Alive.parse(received.data)
        await self.bus.respond(received, self.beat())

    async def _on_beat(self, received: Received) -> None:
        beat = Beat.parse(received.data)
        if beat.instance is None or beat.instance == self.instance:
            return
        if beat.leaving:
            self.peers.left(beat.instance)
            await self._adopt(lambda owner: owner is None)
        elif self._heard(beat):  # it came after this one's last beat: without this it would not know whom to take over from
            await self.bus.send(topics.BEATS.at(self._model), self.beat())

    async def _on_probed(self, received: Received) -> None:
        if received.headers.get("Status") == "503":
            self.peers.missing(received.subject.rpartition(".")[2], time.monotonic())
        else:
            self._heard(Beat.parse(received.data))

    def _on_connection(self, connected: bool) -> None:
        if connected:
            self._connected_at = time.monotonic()
            self.recorder.touch_all()

    def _on_lost(self, session: str, record: SessionRecord) -> None:
        log.warning("session %s is another coordinator's now", session)
        self.bus.spawn(self._host.lose(session, record), "dropping a session")
