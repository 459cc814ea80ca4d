"""What makes a coordinator replaceable: its sessions are written down, other coordinators are watched, and what they leave is taken over.

a request that may have been asked before   its session may be another coordinator's (the request is passed on), have ended (its
                                            answer is sent), have no owner (it is taken over), or be new: see `find`
a peer died, is silent, or left             its rows are closed, and its sessions are taken over, except those that other peers took
                                            first
a record turns out to be another's          the session is dropped here, and its client hears nothing of that
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from random import Random
from typing import Any, Final, Protocol

from mesh.bus import Bus, Received, Subscription, end_tasks
from mesh.coordinator.core.peers import Peer, Peers
from mesh.coordinator.records import Recorder, SessionRecord, sessions_bucket
from mesh.coordinator.replies import Job
from mesh.errors import BadRequest, DeadlineExceeded, MeshError, Unavailable
from mesh.protocol import topics
from mesh.protocol.events import EventKind
from mesh.protocol.generation import Generate, public_id
from mesh.protocol.headers import SESSION_HEADER
from mesh.protocol.status import Alive, Heartbeat
from mesh.protocol.stream import with_epoch

__all__ = ["Announce", "Continuity", "Host"]

log = logging.getLogger("mesh.coordinator")

PROBE_S: Final = 0.2
SCAN_S: Final = 30.0
"""How often all records are looked through. They also are at the start, and when a coordinator goes."""
STALL_S: Final = 1.0
"""After a pause of this loop that was longer, the silence of the others does not count."""
SETTLE_S: Final = 2.0
"""After a reconnection, silence does not count for so long: the others reconnect too, each at its own time."""
_ASK_S: Final = 1.0
_RELEASE_S: Final = 5.0


Announce = Callable[[EventKind, str, str], object]
"""(kind, who, detail)"""


class Host(Protocol):
    """Where sessions live while they are generated here (jobs.py)."""

    def has(self, session: str) -> bool: ...

    async def resume(self, record: SessionRecord, revision: int, asked: Generate | None, reply: str) -> None:
        """Go on with a session that is this coordinator's now. `asked`: the request with which the client has asked for it again; `reply`:
        where the answer goes."""

    async def lose(self, session: str, record: SessionRecord) -> None:
        """Drop a session that another coordinator has."""


class Continuity:
    """See the module's docstring. `close_rows(instance)` frees what a coordinator holds at the shards. `instance` is different for each
    process, while `name` may be the same after a restart. `heartbeat_ttl_s`: a coordinator that was not heard for so long is gone.
    `waited_s(session)`: how long a session of this coordinator has waited for shards."""

    def __init__(
        self,
        bus: Bus,
        host: Host,
        close_rows: Callable[[str], Awaitable[None]],
        *,
        model: str,
        model_hash: str,
        name: str,
        instance: str,
        heartbeat_ttl_s: float,
        random: Random,
        announce: Announce,
        waited_s: Callable[[str], float],
    ) -> None:
        self.bus = bus
        self.name = name
        self.instance = instance
        self.resumed = 0
        self.recorder = Recorder(sessions_bucket(bus), model, instance, self._on_lost)
        self.peers = Peers(instance)
        self._host = host
        self._close_rows = close_rows
        self._model = model
        self._model_hash = model_hash
        self._heartbeat_ttl_s = heartbeat_ttl_s
        self._random = random
        self._inbox = bus.new_inbox()
        self._connected_at = float("-inf")
        self._subscriptions: list[Subscription] = []
        self._watcher: asyncio.Task[Any] | None = None
        self._announce = announce
        self._waited_s = waited_s
        bus.on_change(self._on_connection)

    async def start(self) -> None:
        self._subscriptions = [
            await self.bus.subscribe(topics.ALIVE.at(self._model, self.instance), self._on_liveness_question),
            await self.bus.subscribe(topics.HEARTBEATS.at(self._model), self._on_heartbeat),
            await self.bus.subscribe(f"{self._inbox}.*", self._on_probed),
        ]
        self.recorder.start()
        self._watcher = self.bus.keep(self._watch, "watching coordinators")

    async def hand_over(self) -> set[str]:
        """Leave every session to any coordinator that takes it. Returns the sessions whose records say so."""
        if self._watcher is not None:
            await end_tasks(self._watcher)
        released = await self.recorder.release(_RELEASE_S) if self.bus.connected else set()
        for subscription in self._subscriptions:
            await subscription.stop()
        return released

    def heartbeat(self, *, leaving: bool = False) -> Heartbeat:
        return Heartbeat(coordinator=self.name, ttl_s=self._heartbeat_ttl_s, instance=self.instance, leaving=leaving)

    # -- records -------------------------------------------------------------------------------------------------------

    def keep(self, job: Job, on_first: Callable[[bool], None] | None = None) -> None:
        """Write the session down from now on. `on_first` is called after the first write: is the record there?"""
        self.recorder.keep(job.request.id, lambda: self._record(job), revision=job.revision, on_first=on_first)

    def park(self, job: Job) -> None:
        """The client has left. What was generated is kept for a while if the client gave the session a name, by which it may ask again."""
        named = job.message.session is not None
        self.recorder.end(job.request.id, self._record(job).model_copy(update={"parked": True}) if named else None)

    def _record(self, job: Job) -> SessionRecord:
        """The session as it is now."""
        message = job.message.model_copy(
            update={
                "prompt": None,
                "messages": None,
                "tokens": job.request.prompt,
                "continue_final_message": False,  # this and the next one say how messages become a prompt
                "chat_template_kwargs": {},
                "seed": job.request.sampling.seed,
                "given": (),
                "waited_s": self._waited_s(job.request.id),
            }
        )
        return SessionRecord(
            session=job.request.id,
            model_hash=self._model_hash,
            owner=self.instance,
            epoch=job.epoch,
            digest=job.digest,
            message=message,
            reply=job.reply,
            # with log probabilities everything is computed again: they are not written down
            given=() if message.logprobs is not None else tuple(token.id for token in job.tokens),
            told=job.delivered,
        )

    def end(self, job: Job, answer: bytes | None) -> None:
        """The session has ended. Its answer is kept for a while if the client gave the session a name, by which it may ask again."""
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
        """Whether the session exists somewhere; if so, its answer comes from there. `direct`: another coordinator passed the request on to
        this one, as the owner. Raises BadRequest where the name belongs to another request."""
        for _ in range(3):  # again where another coordinator was faster to take it over
            try:
                found = await self.recorder.read(session)
            except MeshError as error:
                log.warning("looking for the session of request %s: %s", public_id(session), error)
                return False
            if found is None:
                return False
            record, revision = found
            if record.digest != digest or record.model_hash != self._model_hash:
                raise BadRequest("this session was another request: give this one its own name", field="session")
            if record.answer is not None:
                await self.bus.publish(reply, with_epoch(record.answer.encode(), asked.epoch))
                return True
            if record.owner not in (None, self.instance) and not direct and await self._lives(str(record.owner)):
                headers = {SESSION_HEADER: session}
                await self.bus.send(topics.GENERATE_AT.at(self._model, str(record.owner)), asked, reply=reply, headers=headers)
                return True
            if self._host.has(session):
                return False
            taken = await self.recorder.take_over(record, revision, seen=asked.epoch)
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
            if stalled:  # this process may have been suspended, and others may have taken its sessions
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
            log.debug("probing coordinators: %s", error)

    async def _scan(self) -> None:
        """Take over sessions whose owner is unknown: it ended before this process began, or all coordinators ended."""
        now = time.monotonic()
        for record, _ in await self.recorder.all():
            if record.answer is None and record.owner is not None and not self.peers.known(record.owner):
                self.peers.heard(record.owner, "", now)  # from now on it is probed, and given up if it does not answer
        await self._adopt(lambda owner: owner is None or self.peers.given_up(owner))

    async def _give_up(self, peer: Peer) -> None:
        log.warning("coordinator %s (%s) is gone: taking over what it was generating", peer.name or "?", peer.instance)
        if peer.name:
            self._announce("suspected", peer.name, "the coordinator does not answer")
        await self._close_rows(peer.instance)
        await self._adopt(lambda owner: owner == peer.instance)

    async def _adopt(self, whose: Callable[[str | None], bool]) -> None:
        """Take over the sessions of these owners, except where another coordinator is faster."""
        found = await self.recorder.all()
        count = 0
        self._random.shuffle(found)  # several coordinators may do this at once, and should begin with different sessions
        for record, revision in found:
            if (
                record.answer is not None
                or record.parked
                or record.model_hash != self._model_hash
                or not whose(record.owner)
                or self._host.has(record.session)
            ):
                continue
            try:
                taken = await self.recorder.take_over(record, revision)
                if taken is not None:
                    count += 1
                    await self._resume(*taken, None, record.reply)
            except Exception as error:  # of this record: the others are taken over all the same
                self.recorder.counters["not_resumed"] += 1
                log.warning("taking over a session failed: %r", error)
        if count:
            self._announce("resumed", self.name, f"{count} session{'s' if count > 1 else ''} of another coordinator")

    async def _resume(self, record: SessionRecord, revision: int, asked: Generate | None, reply: str) -> None:
        self.resumed += 1
        await self._host.resume(record, revision, asked, reply)

    async def _lives(self, instance: str) -> bool:
        """Whether a coordinator lives: it was heard of lately, or it answers now."""
        if self.peers.lives(instance) and not self.peers.missing_now(instance):
            return True
        try:
            heartbeat = await self.bus.request(topics.ALIVE.at(self._model, instance), Alive(), timeout_s=_ASK_S)
        except (Unavailable, DeadlineExceeded):
            return False
        self._answered(heartbeat)
        return True

    def _answered(self, heartbeat: Heartbeat) -> None:
        """A coordinator has answered a probe."""
        if heartbeat.instance is not None and self.peers.answered(heartbeat.instance, heartbeat.coordinator, time.monotonic()):
            log.info("coordinator %s (%s) is there", heartbeat.coordinator, heartbeat.instance)

    # -- what arrives --------------------------------------------------------------------------------------------------

    async def _on_liveness_question(self, received: Received) -> None:
        topics.ALIVE.parse(received.data)
        await self.bus.respond(received, self.heartbeat())

    async def _on_heartbeat(self, received: Received) -> None:
        heartbeat = topics.HEARTBEATS.parse(received.data)
        if heartbeat.instance is None or heartbeat.instance == self.instance:
            return
        if heartbeat.leaving:
            self.peers.left(heartbeat.instance)
            await self._adopt(lambda owner: owner is None)
        elif self.peers.heard(heartbeat.instance, heartbeat.coordinator, time.monotonic()):
            # it is new, and has not heard this coordinator's last heartbeat
            log.info("coordinator %s (%s) is there", heartbeat.coordinator, heartbeat.instance)
            await self.bus.send(topics.HEARTBEATS.at(self._model), self.heartbeat())

    async def _on_probed(self, received: Received) -> None:
        if received.headers.get("Status") == "503":
            self.peers.missing(received.subject.rpartition(".")[2], time.monotonic())
        else:
            self._answered(Heartbeat.parse(received.data))

    def _on_connection(self, connected: bool) -> None:
        if connected:
            self._connected_at = time.monotonic()
            self.recorder.touch_all()

    def _on_lost(self, session: str, record: SessionRecord) -> None:
        log.warning("request %s is another coordinator's now", public_id(session))
        self.bus.spawn(self._host.lose(session, record), "dropping a session")
