"""What arrives, other than from shards' leases (shards.py) and other coordinators (continuity.py): each message becomes an event.

    a request            -> Submit, unless the session is known: then its answer goes to the new reply subject
    an answer frame      -> Result or FrameLost
    a cancel, or the server saying that a client no longer listens    -> CancelSession
    the server saying that some connection ended                      -> Suspicion
    a question for a trace   answered by tracing.py; no event

Answer frames, cancels and clients that are gone are handled where they arrive, before anything that waits in a queue. Otherwise the
answers of several steps would come before a cancel that was sent earlier.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter

from mesh.bus import Bus, Received, Subscription
from mesh.coordinator.continuity import Continuity
from mesh.coordinator.core.events import CancelSession, Result, Suspicion
from mesh.coordinator.core.machine import Core
from mesh.coordinator.driver import CoreDriver
from mesh.coordinator.jobs import EndedAnswer, Jobs
from mesh.coordinator.measure import StepMeter
from mesh.coordinator.outbox import Outbox
from mesh.coordinator.records import digest_of, new_epoch
from mesh.coordinator.replies import Job
from mesh.coordinator.requests import Requests
from mesh.coordinator.translate import event_of
from mesh.errors import BadRequest, FrameRejected, MeshError
from mesh.host.turns import Turns
from mesh.model.manifest import Manifest
from mesh.model.tokenizer import Tokenizer
from mesh.protocol import frame_codec, generation, subjects, topics
from mesh.protocol.headers import TRACE_HEADER
from mesh.protocol.stream import with_epoch
from mesh.telemetry.context import TraceContext
from mesh.telemetry.log_context import log_context

__all__ = ["Intake"]

log = logging.getLogger("mesh.coordinator")

_SHARD_CLIENT = b'"mesh-shard"'
"""The name of every shard's connection, as a disconnect advisory spells it."""
_RECONNECTED_S = 5.0
"""Seconds after this coordinator's reconnection in which a client that does not listen is not taken to be gone: it may still be
reconnecting too."""


class Intake:
    """`name` is this coordinator's. `rejected` counts the answer frames that were refused, by reason."""

    def __init__(
        self,
        bus: Bus,
        core: Core,
        driver: CoreDriver,
        jobs: Jobs,
        outbox: Outbox,
        continuity: Continuity,
        meter: StepMeter,
        *,
        name: str,
        manifest: Manifest,
        tokenizer: Tokenizer | None,
        requests: Requests,
    ) -> None:
        self.rejected: Counter[str] = Counter()
        self._bus = bus
        self._core = core
        self._driver = driver
        self._jobs = jobs
        self._outbox = outbox
        self._continuity = continuity
        self._meter = meter
        self._name = name
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._requests = requests
        self._reading = Turns()
        self._subscriptions: list[Subscription] = []

    async def start(self, requests: Bus) -> None:
        """Subscribe to everything but the shared request subject, which is the service's endpoint (`on_generate`). What clients write
        comes by the connection `requests`, in the order in which it was sent; answers of shards do not wait behind it."""
        model = self._manifest.name
        self._subscriptions = [
            await requests.subscribe(topics.GENERATE_AT.at(model, self._continuity.instance), self._on_passed_on),
            await requests.subscribe_direct(topics.CANCEL.at(model, self._name), self._on_cancel),
            await self._bus.subscribe_direct(subjects.tokens(model, self._continuity.instance), self._on_answer),
            await self._bus.subscribe_unheard(f"{self._outbox.unheard}.*", self._on_unheard),
            await self._bus.subscribe(subjects.DISCONNECTS, self._on_disconnect),
        ]

    async def stop(self) -> None:
        for subscription in self._subscriptions:
            await subscription.stop()

    # -- requests ------------------------------------------------------------------------------------------------------

    async def on_generate(self, received: Received, *, direct: bool = False) -> None:
        """Take a request. Its answer comes later, from outbox.py; an error that is raised here is the answer. `direct`: another
        coordinator passed it on, which believes that the session is here."""
        arrived = time.perf_counter()
        message = await self._reading.run(len(received.data), lambda: self._requests.parse(received.data))
        traceparent = received.headers.get(TRACE_HEADER)
        if traceparent is not None and message.traceparent is None:
            message = message.model_copy(update={"traceparent": traceparent[:128]})
        if not received.reply:
            raise BadRequest("a request needs a reply subject: publish it as a request", field="reply")
        id = message.session or secrets.token_hex(16)
        context = TraceContext.of(message.traceparent, id)
        with log_context(request=generation.public_id(id), trace=context.trace):
            job = await self._prepare(message, id, context, received, direct=direct)
        if job is not None:  # its turn of the core is about other requests too
            job.arrived = arrived
            await self._jobs.begin(job)

    async def _prepare(
        self, message: generation.Generate, id: str, context: TraceContext, received: Received, *, direct: bool
    ) -> Job | None:
        """The job of a new request; None: its session is known, here or elsewhere, and is answered from there."""
        digest = digest_of(message)
        if await self._known(id, digest, message, received.reply):
            return None
        generation.require_answer_fits(message, self._bus.max_payload, hidden_size=self._manifest.hidden.size)
        size = len(received.data)
        self._requests.enter(size)
        try:
            may_be_known = message.session is not None and message.attempt != 0
            if may_be_known and await self._continuity.find(id, digest, message, received.reply, direct=direct):
                return None
            request = await self._requests.prepare(message, id, received.reply)
        finally:
            self._requests.leave(size)
        if await self._known(id, digest, message, received.reply):  # the same request came twice, and the other one was faster
            return None
        self._jobs.require_room(request)
        job = Job.of(message, request, received.reply, self._tokenizer, digest=digest, epoch=new_epoch(message.epoch), context=context)
        job.start = job.delivered = len(message.given)
        return job

    async def _on_passed_on(self, received: Received) -> None:
        """A request that another coordinator received, and believes to be for a session of this one."""
        try:
            await self.on_generate(received, direct=True)
        except MeshError as error:
            await self._bus.respond_error(received, error)

    async def _known(self, id: str, digest: str, message: generation.Generate, reply: str) -> bool:
        """Whether a session of this name is held here, or ended here not long ago. If so its answer goes to this reply subject from now
        on, after the tokens that the client has. BadRequest: the name belongs to another request."""
        answer = self._jobs.answer(id)
        job = self._jobs.table.get(id)
        if answer is None and job is None:
            return False
        if digest != (answer.digest if answer is not None else job.digest if job is not None else ""):
            raise BadRequest("this session was another request: give this one its own name", field="session")
        if answer is not None:
            self._tell_again(answer, message, reply)
            await self._outbox.send()
        elif job is not None:
            has = len(message.given)
            if message.logprobs is None and tuple(token.id for token in job.tokens[:has]) != message.given:
                await self._jobs.drop(id)  # the client has more tokens than the record that was taken over: the client's tokens count
                return False
            job.message = job.message.model_copy(update={"stream": message.stream})
            job.reply, job.start, job.delivered = reply, has, has
            job.epoch = max(job.epoch, message.epoch or 0)
            self._continuity.recorder.touch(id)
            if message.stream:
                self._outbox.accepted(job)
                await self._outbox.send()
        return True

    def _tell_again(self, answer: EndedAnswer, message: generation.Generate, reply: str) -> None:
        """The documents of an answer that has ended, from where its client is."""
        start, whole = len(message.given), answer.job
        if whole is not None and message.stream:  # the last document lacks parts, which the others have
            whole.reply, whole.start = reply, start
            self._outbox.accepted(whole)
        elif message.stream:
            model = self._manifest.name
            for document in answer.documents(start, model=model, cancel=topics.CANCEL.at(model, self._name).subject):
                self._outbox.message(reply, with_epoch(document, message.epoch))
        self._outbox.message(reply, with_epoch(answer.last, message.epoch))

    # -- answers of the last stage -------------------------------------------------------------------------------------

    def _on_answer(self, data: bytes) -> None:
        try:
            frame = frame_codec.decode(data, model_hash=self._manifest.model_hash)
            event = event_of(frame)
            if event is None:
                raise FrameRejected("frame rejected: only answers are sent here", reason="kind")
        except FrameRejected as error:
            self.rejected[error.reason] += 1
            log.debug("%s", error)
            return
        if isinstance(event, Result):
            arrived, flight = time.perf_counter(), self._core.flight(frame.step)
            self._driver.handle_now(event, lambda: self._meter.landed(frame, flight, arrived))
        else:
            self._driver.handle_now(event)

    # -- ends and hints ------------------------------------------------------------------------------------------------

    def _on_cancel(self, data: bytes) -> None:
        cancel = generation.Cancel.parse(data)
        self._driver.handle_now(CancelSession(cancel.request, gone=cancel.gone))

    def _on_unheard(self, subject: str) -> None:
        """The client of a session no longer listens."""
        if self.settled():
            session = self._jobs.session_of(subject.rpartition(".")[2])
            if session is not None:
                self._driver.handle_now(CancelSession(session, gone=True))

    def settled(self) -> bool:
        """Whether clients are back where this coordinator was disconnected."""
        return self._driver.connected_for_s() > _RECONNECTED_S

    async def _on_disconnect(self, received: Received) -> None:
        """A shard's connection has ended. Only a hint: the core finds out whose it was."""
        if _SHARD_CLIENT in received.data:
            await self._driver.handle(Suspicion())
