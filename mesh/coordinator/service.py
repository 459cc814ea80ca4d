"""The coordinator on the mesh: NATS, timers and tokenization around the core, and nothing else.

    request -> Generate -> tokens -> Submit -> core -> effects, in order:
      OpenRow, CloseRow   requests to shards
      FrameOut            a frame to the first stage; its answer comes back on this coordinator's own subject
      Emit, Ended         documents to the client

Its sessions are written down, so that another coordinator can go on with them, and it goes on with those of others: see
continuity.py.

A client that has gone is noticed at the next token: each token document names a reply subject nobody is meant to use, and the
server answers there when the client's own subject has no subscriber any more. Who wants to stop earlier says so on the cancel
subject that the first document names. A request without a stream has no documents on the way, so it can only be cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import orjson

from mesh.bus import Bucket, Bus, Endpoint, LeaseTable, Received, Service, Subscription, announce, end_tasks, keep_events
from mesh.bus.connection import reply_error
from mesh.coordinator.batch import BatchWorker
from mesh.coordinator.continuity import Continuity
from mesh.coordinator.core.events import (
    Admitted,
    Answered,
    Ask,
    Cancel,
    CloseRow,
    Connection,
    Effect,
    Emit,
    Ended,
    Event,
    Finish,
    FrameLost,
    FrameOut,
    Happened,
    Hint,
    Opened,
    OpenRefused,
    OpenRow,
    Rejected,
    ReplicaGone,
    ReplicaSeen,
    Result,
    Submit,
    Tick,
)
from mesh.coordinator.core.expectations import Expected
from mesh.coordinator.core.machine import Core, CoreConfig
from mesh.coordinator.core.routing import Strategy
from mesh.coordinator.core.scheduler import Flight
from mesh.coordinator.core.session import Request
from mesh.coordinator.records import SessionRecord, digest_of
from mesh.coordinator.replies import EPOCH_HEADER, HopMeter, Job
from mesh.coordinator.requests import prepare
from mesh.coordinator.trace import Traces
from mesh.coordinator.translate import event_of, frame_of, replica_of
from mesh.errors import BadRequest, Busy, DeadlineExceeded, FrameRejected, MeshError, NobodyListens, Unavailable
from mesh.model.manifest import Manifest
from mesh.model.tokenizer import Tokenizer
from mesh.protocol import control, events, frame_codec, generation, status, subjects, topics
from mesh.protocol.frame_codec import Flags
from mesh.protocol.status import ShardLease
from mesh.settings.units import format_bytes
from mesh.telemetry import logs

__all__ = ["SERVICE_NAME", "Coordinator", "CoordinatorOptions"]

log = logging.getLogger("mesh.coordinator")

SERVICE_NAME = "mesh-coordinator"

EXACT = Flags(0)
"""Hidden states travel as they were computed."""
_SETTLING_S = 3.0
"""After this side's connection is back: that nobody listens on a subject may mean that its listener is still coming back too."""
_ANSWER_S = 1.0
SHARD_CLIENT = b'"mesh-shard"'
"""The name of every shard's connection, as an advisory has it."""
_BEAT_SESSIONS = 2000
_TOKEN_BYTES = 256
"""What a held request may take a token: its id, its text, its time, and the documents of a client that asks again."""
_BEAT_TTL_S = 12.0
_LONGEST_TTL_S = 3600.0
_RECONNECTED_S = 5.0
"""So long after a reconnection a client that is not there is not gone: it reconnects too."""
_REMEMBERED = 256
"""Answers kept for clients that ask again because the first one was lost on the way."""


@dataclass(frozen=True)
class CoordinatorOptions:
    """model: a model directory, of which only the manifest and the tokenizer are read. queue_limit: requests that may wait.
    flags: how hidden states travel (Flags.BF16, Flags.ZSTD). health_check_interval_s: between beats to the shards, and looks whether
    all that are expected are there. pool_bytes: what the requests that are held may take together."""

    model: Path
    name: str = ""
    strategy: Strategy = "least_loaded"
    queue_limit: int = 256
    failover_timeout_s: float = 30.0
    step_timeout_s: float = 15.0
    open_timeout_s: float = 2.0
    flags: Flags = EXACT
    health_check_interval_s: float = 3.0
    expected: Expected | None = None
    pool_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class _Mail:
    subject: str
    data: bytes
    reply: str = ""
    headers: dict[str, str] | None = None
    told: tuple[Job, int] | None = None  # the document of this token


class Coordinator:
    """See the module's docstring. `run` is its whole life; `ready` is set while it serves."""

    def __init__(self, bus: Bus, options: CoordinatorOptions) -> None:
        self.bus = bus
        self.options = options
        self.name = subjects.check_token(options.name or f"c-{secrets.token_hex(4)}", "name")
        self.manifest = Manifest.load(options.model)
        self.tokenizer = Tokenizer.load(options.model) if self.manifest.tokenizer is not None else None
        config = CoreConfig(
            self.manifest.layers,
            options.strategy,
            options.queue_limit,
            options.failover_timeout_s,
            options.step_timeout_s,
        )
        self.core = Core(config, Random(secrets.randbits(64)))
        self.ready = asyncio.Event()
        self.hops = HopMeter()
        self.traces = Traces()
        self.rejected: Counter[str] = Counter()
        self.http_url: str | None = None  # where this process serves HTTP, for those who ask who is there
        self._last_step_at: float | None = None
        self._jobs: dict[str, Job] = {}
        self._answers: OrderedDict[str, tuple[str, bytes]] = OrderedDict()
        self._preparing = 0
        self._outbox: deque[_Mail | FrameOut] = deque()
        self._sending = False
        self._sent_at: dict[int, float] = {}
        self._timer: asyncio.Handle | None = None
        self._timer_at = 0.0
        self._stop = asyncio.Event()
        self._leases = LeaseTable(Bucket(bus, subjects.KV_SHARDS, ttl_s=subjects.LEASE_TTL_S), ShardLease, self._on_lease)
        self._service: Service | None = None
        self._subscriptions: list[Subscription] = []
        self._probe = bus.new_inbox()
        self._refused_shards: dict[str, str] = {}  # shard -> instance that cannot take part, and was said to be
        self._lacking = ""
        # two beats may be lost
        self._frozen = False  # it leaves: what happens now happens to whoever goes on with its sessions
        self._connected_at = float("-inf")
        bus.on_change(self._on_connection)
        self.continuity = Continuity(
            bus,
            self,
            model=self.manifest.name,
            model_hash=self.manifest.model_hash,
            name=self.name,
            instance=secrets.token_hex(6),
            beat_ttl_s=min(max(_BEAT_TTL_S, 2.4 * options.health_check_interval_s), _LONGEST_TTL_S),
            random=Random(secrets.randbits(64)),
            announce=lambda kind, who, detail: bus.spawn(self._announce(kind, who, detail), "event"),
        )
        self.batches = BatchWorker(bus, self.manifest.name, self.continuity.instance, self._has_room)

    # -- life ----------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve until `stop`."""
        model = self.manifest.name
        beat: asyncio.Task[Any] | None = None
        try:
            self._subscriptions = [
                await self.bus.subscribe(topics.GENERATE_AT.at(model, self.continuity.instance), self._on_passed_on),
                await self.bus.subscribe_direct(subjects.tokens(model, self.name), self._on_answer),
                await self.bus.subscribe_direct(topics.CANCEL.at(model, self.name), self._on_cancel),
                await self.bus.subscribe(topics.TRACE.at(model, self.name), self._on_trace),
                await self.bus.subscribe_unheard(f"{self._probe}.*", self._on_unheard),
                await self.bus.subscribe(subjects.DISCONNECTS, self._on_disconnect),
            ]
            await self._leases.start()
            await keep_events(self.bus)
            await self.continuity.start()
            beat = self.bus.spawn(self._beat(), "beat")  # not before the others' answers to it are heard
            self._service = await Service.start(
                self.bus,
                name=SERVICE_NAME,
                version=logs.version(),
                description=f"generation with {model}",
                metadata={"coordinator": self.name, "model": model, "model_hash": self.manifest.model_hash},
                stats=self.stats,
                endpoints=[
                    Endpoint("generate", topics.GENERATE.at(model), self._on_generate, concurrent=True),
                    *self.batches.endpoints(),
                ],
            )
            await self.batches.start()
            await self.bus.flush()
            self.ready.set()
            await self._announce("coordinator_joined", self.name, f"serves {model}")
            log.info("ready: %s serves %s as %s", self.name, model, topics.GENERATE.at(model))
            await self._stop.wait()
        finally:
            self.ready.clear()
            if beat is not None:
                await end_tasks(beat)
            await self._leave()

    def stop(self) -> None:
        """End; what is being generated is left to the other coordinators, or to the next one."""
        self._stop.set()

    def stats(self) -> dict[str, Any]:
        """For $SRV.STATS: counts since start, means of decode steps."""
        return {
            "coordinator": self.name,
            "instance": self.continuity.instance,
            "pid": os.getpid(),
            "model": self.manifest.name,
            "vocab_size": self.manifest.vocab_size,
            "context": self.core.replicas.longest(),
            "live": self.core.live,
            "queued": len(self.core.admission),
            "capacity": self.core.replicas.capacity(),
            "serving": self.core.replicas.longest() is not None,
            "last_step_s": None if self._last_step_at is None else time.monotonic() - self._last_step_at,
            "http": self.http_url,
            "rejected_frames": dict(self.rejected),
            "resumed": self.continuity.resumed,
            "records": dict(self.continuity.recorder.counters),
            "batches": dict(self.batches.counters),
            **({"expected": self.options.expected.as_dict(self.core.replicas)} if self.options.expected is not None else {}),
            "hops": self.hops.as_dict(),
            **self.traces.summary(self.core.sessions, time.monotonic()),
            **self.core.counters.as_dict(),
        }

    async def _leave(self) -> None:
        if self._service is not None:
            await self._service.stop()
        await self.batches.stop()
        await self._send()
        self._frozen = True
        released = await self.continuity.hand_over()
        gone = Unavailable("the coordinator is going away: send the request again")
        for job in [job for id, job in self._jobs.items() if id not in released]:
            self._answer_error(job.reply, gone, job.epoch)
        await self._send()
        if self.bus.connected:
            await self.close_rows(self.name)
            await self.bus.send(topics.BEATS.at(self.manifest.name), self.continuity.beat(leaving=True))
            await self._announce("coordinator_left", self.name, f"{len(released)} sessions were left to others" if released else "")
        if self._timer is not None:
            self._timer.cancel()
        await self._leases.stop()
        for subscription in self._subscriptions:
            await subscription.stop()

    async def _beat(self) -> None:
        """Shards free what a silent coordinator held; a client that waits hears that it does, or is found to have gone."""
        while True:
            try:
                for place, session in enumerate(self.core.admission):
                    job = self._jobs.get(session.id)
                    if job is not None and job.message.stream:
                        self._say(job, job.waiting(place))
                await self._send()
                await self.bus.send(topics.BEATS.at(self.manifest.name), self._living())
            except MeshError as error:
                log.warning("%s", error)
            self._look_for_shards()
            await asyncio.sleep(self.options.health_check_interval_s)

    def _look_for_shards(self) -> None:
        lacking = self.options.expected.lacking(self.core.replicas) if self.options.expected is not None else ""
        if lacking != self._lacking:
            log.log(logging.WARNING if lacking else logging.INFO, "shards: %s", lacking or "all that were expected are there")
        self._lacking = lacking

    def _living(self) -> status.Beat:
        held = self.core.keys
        return self.continuity.beat().model_copy(update={"sessions": held if len(held) <= _BEAT_SESSIONS else None})

    # -- what arrives --------------------------------------------------------------------------------------------------

    async def _on_generate(self, received: Received, *, direct: bool = False) -> None:
        """Answers itself, on the way and at the end; what it raises is the answer."""
        message = generation.Generate.parse(received.data)
        if not received.reply:
            raise BadRequest("a request needs a reply subject: publish it as a request", field="reply")
        id, digest = message.session or secrets.token_hex(12), digest_of(message)
        if await self._again(id, digest, message, received.reply):
            return
        if self._preparing >= self.options.queue_limit:
            raise Busy("too many requests arrive at once: try again in 1 s", retry_after_s=1.0)
        self._preparing += 1
        try:
            may_be_known = message.session is not None and message.attempt != 0
            if may_be_known and await self.continuity.find(id, digest, message, received.reply, direct=direct):
                return
            request = await prepare(message, id, self.manifest, self.tokenizer)
        finally:
            self._preparing -= 1
        if await self._again(id, digest, message, received.reply):  # it came twice while the first was prepared
            return
        self._require_room(request)
        job = Job.of(message, request, received.reply, self.tokenizer, digest=digest, epoch=(message.attempt or 0) + 1)
        job.start = job.told = len(message.given)
        await self._begin(job)

    def _require_room(self, request: Request) -> None:
        """Busy where this request and those that are held would take more than the pool."""
        pool = self.options.pool_bytes
        if pool is None:
            return
        tokens = sum(len(each.prompt) + each.max_tokens for each in (request, *(job.request for job in self._jobs.values())))
        if tokens * _TOKEN_BYTES > pool:
            raise Busy(
                f"the requests that are held take all of {format_bytes(pool)} (memory.max_pool_size_gb): try again in 1 s",
                retry_after_s=1.0,
            )

    async def _on_passed_on(self, received: Received) -> None:
        """A request that another coordinator has, believing that it is for a session of ours."""
        try:
            await self._on_generate(received, direct=True)
        except MeshError as error:
            await self.bus.respond_error(received, error)

    async def _begin(self, job: Job) -> None:
        self._jobs[job.request.id] = job
        await self._handle(Submit(job.request))
        if job.stopped:  # by what it was given already
            await self._handle(Finish(job.request.id))

    async def _again(self, id: str, digest: str, message: generation.Generate, reply: str) -> bool:
        """A request of a name that is known here: the same one goes on to this reply subject, after the tokens its client has."""
        known = self._answers.get(id)
        job = self._jobs.get(id)
        if known is None and job is None:
            return False
        if digest != (known[0] if known is not None else job.digest if job is not None else ""):
            raise BadRequest(f"session {id} was another request: give this one its own name", field="session")
        if known is not None:
            await self.bus.publish(reply, known[1])
        elif job is not None:
            has = len(message.given)
            if message.logprobs is None and tuple(token.id for token in job.tokens[:has]) != message.given:
                await self._drop(id)  # it has more than was written down of it: what the client has is what counts
                return False
            job.message = job.message.model_copy(update={"stream": message.stream})
            job.reply, job.start, job.told = reply, has, has
            job.epoch = max(job.epoch, (message.attempt or 0) + 1)
            self.continuity.recorder.touch(id)
            if message.stream:
                self._accept(job)
                await self._send()
        return True

    # -- sessions that come and go ------------------------------------------------------------------------------------------

    def has(self, session: str) -> bool:
        return session in self._jobs

    async def resume(self, record: SessionRecord, revision: int, asked: generation.Generate | None, reply: str) -> None:
        """Go on with a session that another coordinator began and that is ours now (Continuity's Host)."""
        if record.session in self._jobs:
            return
        message, given, start = record.message, record.given, record.told
        if asked is not None:
            message, start = message.model_copy(update={"stream": asked.stream}), len(asked.given)
            if given[:start] != asked.given:
                given = asked.given
        message = message.model_copy(update={"given": given, "session": record.session})
        try:
            request = await prepare(message, record.session, self.manifest, self.tokenizer)
        except MeshError as error:
            self._answer_error(reply, error, record.epoch)
            await self._send()
            return
        job = Job.of(message, replace(request, resumed=True), reply, self.tokenizer, digest=record.digest, epoch=record.epoch)
        job.start, job.told, job.revision = start, start, revision
        await self._begin(job)

    async def lose(self, session: str, record: SessionRecord) -> None:
        """Another coordinator has it: not a word more to the client, who is told by that one (Continuity's Host)."""
        job = self._jobs.get(session)
        if job is None:
            return
        await self._drop(session)
        if record.answer is not None:
            await self.bus.publish(job.reply, record.answer.encode())
        elif record.owner is not None and record.reply != job.reply:
            asked = job.message.model_copy(update={"session": session, "given": tuple(token.id for token in job.tokens[: job.told])})
            await self.bus.send(topics.GENERATE_AT.at(self.manifest.name, record.owner), asked, reply=job.reply)

    async def close_rows(self, coordinator: str) -> None:
        """Free what `coordinator` holds at the shards (Continuity's Host)."""
        close = control.Close(coordinator=coordinator, sessions=(), all=True)
        for shard in {replica.shard for replica in self.core.replicas}:
            await self.bus.send(topics.CLOSE.at(shard), close)

    def _has_room(self, working: int) -> bool:
        """Whether a request of a batch may be begun: nobody waits, and a quarter of the rows stays free for who may come."""
        capacity = self.core.replicas.capacity()
        return working < capacity and not len(self.core.admission) and self.core.replicas.free(time.monotonic()) > capacity // 4

    async def _drop(self, id: str) -> None:
        """End it here without a word."""
        self._jobs.pop(id, None)
        await self._handle(Cancel(id))

    def _on_answer(self, data: bytes) -> None:
        try:
            frame = frame_codec.decode(data, model_hash=self.manifest.model_hash)
            event = event_of(frame)
            if event is None:
                raise FrameRejected("frame rejected: only answers are sent here", reason="kind")
        except FrameRejected as error:
            self.rejected[error.reason] += 1
            log.debug("%s", error)
            return
        arrived, flight = time.perf_counter(), self.core.scheduler.flights.get(frame.step)

        def sent() -> None:
            if isinstance(event, Result):
                self._last_step_at = time.monotonic()
                self._measure(frame, flight, arrived)

        self._handle_now(event, sent)

    # As directly as answers, or those of several steps would come before them.

    def _on_cancel(self, data: bytes) -> None:
        self._handle_now(Cancel(generation.Cancel.parse(data).request))

    def _on_unheard(self, subject: str) -> None:
        """Nobody listens to what a client is told."""
        if time.monotonic() - self._connected_at > _RECONNECTED_S:
            self._handle_now(Cancel(subject.rpartition(".")[2], gone=True))

    async def _on_trace(self, received: Received) -> None:
        """Whoever asks for a trace that is not here is not answered with an error: another coordinator may have it."""
        if not received.reply:
            return
        try:
            id = generation.TraceRequest.parse(received.data).request
        except MeshError as error:
            await self.bus.respond_error(received, error)
            return
        trace = self.traces.document(id, self.core.session(id), time.monotonic())
        if trace is not None:
            trace |= {"coordinator": self.name, "model": self.manifest.name}
        await self.bus.publish(received.reply, orjson.dumps({"trace": trace}))

    def _on_lease(self, shard: str, lease: ShardLease | None) -> None:
        there = lease is not None and lease.state in ("ready", "draining") and self._compatible(lease)
        if there and lease is not None:
            self.bus.spawn(self._handle(ReplicaSeen(replica_of(lease))), "lease")
        elif shard in self.core.replicas:
            log.info("shard %s is gone", shard)
            self.bus.spawn(self._handle(ReplicaGone(shard)), "lease")

    def _compatible(self, lease: ShardLease) -> bool:
        """Whether the shard can take part. Another model's is none of our business; another cut or version of ours is said once."""
        if lease.model_hash == self.manifest.model_hash and lease.frame_version == frame_codec.VERSION:
            self._refused_shards.pop(lease.shard, None)
            return True
        if lease.model == self.manifest.name and self._refused_shards.get(lease.shard) != lease.instance:
            if len(self._refused_shards) >= _REMEMBERED:
                self._refused_shards.clear()
            self._refused_shards[lease.shard] = lease.instance
            why = f"model hash {lease.model_hash}, and {self.manifest.model_hash} is served here"
            if lease.frame_version != frame_codec.VERSION:
                why = f"it speaks frame version {lease.frame_version}, and this coordinator {frame_codec.VERSION}"
            log.warning("shard %s takes no part: %s", lease.shard, why)
            self.bus.spawn(self._announce("rejected", lease.shard, why), "event")
        return False

    async def _on_disconnect(self, received: Received) -> None:
        """Only a hint: of whose connection it was the core makes sure."""
        if SHARD_CLIENT in received.data:
            await self._handle(Hint())

    def _on_connection(self, connected: bool) -> None:
        if connected:
            self._connected_at = time.monotonic()
            self.bus.spawn(keep_events(self.bus), "events")  # the server may have lost them
        self.bus.spawn(self._handle(Connection(connected)), "connection")

    async def _announce(self, kind: events.EventKind, who: str, detail: str) -> None:
        await announce(self.bus, kind, who, model=self.manifest.name, detail=detail, coordinator=self.name)

    # -- the core ------------------------------------------------------------------------------------------------------

    async def _handle(self, event: Event) -> None:
        self._apply(event)
        await self._send()

    def _handle_now(self, event: Event, sent: Callable[[], None] = lambda: None) -> None:
        """As `_handle`, where nothing can be waited for."""
        self._apply(event, sent)
        if self._outbox:
            self.bus.spawn(self._send(), "sending")

    def _apply(self, event: Event, sent: Callable[[], None] = lambda: None) -> None:
        """Let the core have it, and send what comes of it; what cannot go out at once stays in the outbox. The stages wait for the next
        step: its frames come first, then a call of `sent`, then all else."""
        if self._frozen:
            return
        now = time.monotonic()
        effects = self.core.handle(event, now)
        self._outbox.extend(effect for effect in effects if isinstance(effect, FrameOut))
        self._send_now()
        sent()
        finishes = [id for effect in effects if (id := self._carry_out(effect)) is not None]
        self._arm(now)
        self._send_now()
        for id in finishes:
            self._apply(Finish(id))

    def _carry_out(self, effect: Effect) -> str | None:
        """Put what is to be sent in the outbox; the session that a stop text has ended, if so."""
        match effect:
            case OpenRow():
                self.bus.spawn(self._open(effect), "opening a row")
            case Ask():
                self.bus.spawn(self._ask(effect), "asking a shard")
            case Happened(kind, who, detail):
                log.info("%s %s: %s", who, kind, detail)
                self.bus.spawn(self._announce(kind, who, detail), "event")
            case CloseRow(key, epoch, shard):
                close = control.Close(coordinator=self.name, sessions=(key,), epoch=epoch)
                self._outbox.append(_Mail(topics.CLOSE.at(shard).subject, close.to_bytes()))
            case Admitted(id):
                admitted = self._jobs[id]
                self.continuity.keep(admitted)
                request = admitted.request
                self.traces.begin(id, len(request.prompt), request.max_tokens, now=admitted.began, unix_s=time.time())
                if admitted.message.stream:
                    self._accept(admitted)
            case Emit(id, _, token):
                job = self._jobs.get(id)
                if job is None or job.stopped:
                    return None
                document, stopped = job.push(token)
                self.continuity.recorder.touch(id)
                if job.message.stream and document is not None:
                    self._say(job, document, len(job.tokens) - 1)
                if stopped:
                    return id
            case Rejected(id, error):
                rejected = self._jobs.pop(id)
                self._answer_error(rejected.reply, error, rejected.epoch)
            case Ended():
                self._ended(effect)
        return None

    def _ended(self, ended: Ended) -> None:
        self.traces.end(ended)
        job = self._jobs.pop(ended.session, None)
        if job is None:
            return
        if ended.error is not None:
            self._answer_error(job.reply, ended.error, job.epoch)
            self.continuity.end(job, None)
            return
        answer = orjson.dumps(job.finished(ended))
        self.continuity.end(job, answer)
        self._answers[ended.session] = (job.digest, answer)
        while len(self._answers) > _REMEMBERED:
            self._answers.popitem(last=False)
        self._outbox.append(_Mail(job.reply, answer))

    async def _open(self, effect: OpenRow) -> None:
        """Ask for a row; whatever comes of it is an event."""
        request, key = effect.request, effect.key
        message = control.Open(
            session=key,
            epoch=effect.epoch,
            coordinator=self.name,
            model_hash=self.manifest.model_hash,
            prompt_length=len(request.prompt),
            keep=effect.keep,
            sampling=request.sampling,
        )
        if effect.shard is None:
            subject = topics.OPEN_ANY.at(self.manifest.name, effect.layers)
        else:
            subject = topics.OPEN.at(effect.shard)
        event: Event
        try:
            opened = await self.bus.request(subject, message, timeout_s=self.options.open_timeout_s)
            event = Opened(key, effect.epoch, effect.stage, opened.shard, opened.row, opened.filled)
        except MeshError as error:
            if isinstance(error, NobodyListens) and effect.shard is not None:
                await self._gone(effect.shard)
            full = isinstance(error, Busy)
            if not full:
                log.warning("opening a row of %s: %s", effect.shard or f"layers {effect.layers}", error)
            permanent = not error.retryable
            event = OpenRefused(key, effect.epoch, effect.stage, effect.shard, full, error, permanent)
        await self._handle(event)

    async def _ask(self, effect: Ask) -> None:
        """Whether a shard lives. No answer is no event: the core asks again."""
        ping = control.Ping(coordinator=self.name)
        try:
            pong = await self.bus.request(topics.PING.at(effect.shard), ping, timeout_s=_ANSWER_S)
        except NobodyListens:
            await self._gone(effect.shard)
        except (DeadlineExceeded, Unavailable) as error:
            log.debug("asking %s: %s", effect.shard, error)
        else:
            await self._handle(Answered(effect.shard, effect.asked_at, frozenset(pong.pending)))

    async def _gone(self, shard: str) -> None:
        """Nobody listens on a shard's subject."""
        if not self.bus.connected or time.monotonic() - self._connected_at < _SETTLING_S or shard not in self.core.replicas:
            return
        log.info("nobody listens where shard %s was", shard)
        self._leases.forget(shard)
        await self._handle(ReplicaGone(shard))

    def _arm(self, now: float) -> None:
        """Have the core called at its deadline. A timer that is too early is left: it asks again."""
        due = self.core.deadline()
        if due is None or (self._timer is not None and self._timer_at <= due):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = due
        self._timer = asyncio.get_running_loop().call_later(max(due - now, 0), self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.bus.spawn(self._handle(Tick()), "tick")

    # -- sending -------------------------------------------------------------------------------------------------------

    def _accept(self, job: Job) -> None:
        """Say who has it, and what is known of it that the client has not."""
        self._say(job, job.accepted(self.manifest.name, topics.CANCEL.at(self.manifest.name, self.name).subject))
        for index, document in job.documents():
            self._say(job, document, index)

    def _say(self, job: Job, document: bytes, index: int | None = None) -> None:
        told = None if index is None else (job, index)
        self._outbox.append(_Mail(job.reply, document, f"{self._probe}.{job.request.id}", told=told))

    def _answer_error(self, reply: str, error: MeshError, epoch: int) -> None:
        data, headers = reply_error(error)
        self._outbox.append(_Mail(reply, data, headers={**headers, EPOCH_HEADER: str(epoch)}))

    def _send_now(self) -> None:
        """Send what is in the outbox, in order, as far as nothing is in the way."""
        while self._outbox and not self._sending:
            item = self._outbox.popleft()
            try:
                subject, data, reply, headers = self._mail(item)
                first = isinstance(item, FrameOut) and self.bus.post_now(subject, data)
                if not first and (headers is not None or not self.bus.post(subject, data, reply=reply)):
                    self._outbox.appendleft(item)
                    return
            except MeshError as error:
                self._unsent(item, error)
            else:
                self._sent(item)

    async def _send(self) -> None:
        """Send what is in the outbox, in order, whoever put it there."""
        if self._sending:
            return
        self._sending = True
        try:
            while self._outbox:
                item = self._outbox.popleft()
                try:
                    subject, data, reply, headers = self._mail(item)
                    await self.bus.publish(subject, data, reply=reply, headers=headers)
                except MeshError as error:
                    self._unsent(item, error)
                else:
                    self._sent(item)
        finally:
            self._sending = False

    def _mail(self, item: _Mail | FrameOut) -> tuple[str, bytes, str, dict[str, str] | None]:
        """(subject, data, reply, headers)"""
        if isinstance(item, _Mail):
            return item.subject, item.data, item.reply, item.headers
        frame = frame_of(item, model_hash=self.manifest.model_hash, coordinator=self.name, flags=self.options.flags)
        data = frame_codec.encode(frame)
        self._sent_at[item.frame] = time.perf_counter()
        while len(self._sent_at) > 4096:  # of frames that never came back
            del self._sent_at[next(iter(self._sent_at))]
        return frame.subject(self.manifest.name), data, "", None

    def _sent(self, item: _Mail | FrameOut) -> None:
        if isinstance(item, _Mail) and item.told is not None and item.told[1] == item.told[0].told:
            item.told[0].told += 1

    def _unsent(self, item: _Mail | FrameOut, error: MeshError) -> None:
        log.warning("%s", error)
        if isinstance(item, FrameOut):
            self.bus.spawn(self._handle(FrameLost(item.frame)), "frame lost")

    def _measure(self, frame: frame_codec.Frame, flight: Flight | None, arrived: float) -> None:
        """Where the time of a step went."""
        sent_at = self._sent_at.pop(frame.step, None)
        if sent_at is None or flight is None:
            return
        wall_s = arrived - sent_at
        self.traces.step(flight.out, flight.sessions, at=sent_at, wall_s=wall_s, timings=frame.timings)
        if not flight.decode:
            return
        compute_s, queue_s, codec_s = (
            sum(us) / 1e6 for us in zip(*((t.compute_us, t.queue_us, t.codec_us) for t in frame.timings), strict=True)
        )
        hops = len(frame.route) + 1
        self.hops.add(wall_s, compute_s, queue_s, codec_s, hops)
        for session in flight.sessions:
            job = self._jobs.get(session.id)
            if job is not None:
                job.hops.add(wall_s, compute_s, queue_s, codec_s, hops)
