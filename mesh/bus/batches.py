"""Durable batches: many requests, each answered once, whichever processes end meanwhile.

    stream mesh_batch       a work queue; mesh.v1.batches.MODEL.BATCH.INDEX is one request, removed once its result is stored
    KV mesh_batches         BATCH.batch           the batch: its model and the number of requests
                            BATCH.running.INDEX   the request was begun; how often before by a coordinator that did not end it
                            BATCH.end.INDEX       its result (BatchItem), created once: a second one is not stored
                            BATCH.failed.INDEX    it failed
                            BATCH.cancelled.INDEX it was cancelled while it ran
                            BATCH.cancelled.batch the batch was taken back: what has not ended counts as cancelled

Progress is read from the names of the keys alone. Everything is kept for a week. A full queue or store refuses new requests. Submitting
needs no coordinator, and no right to read the queue or the store: those who may read them could list the batches of others. A
submission that was interrupted is repeated under the same id.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import nats.errors
import nats.js.api
import nats.js.client
import nats.js.errors
import orjson

from mesh.bus.connection import Bus
from mesh.bus.dead import DeadList
from mesh.bus.kv import WRONG_REVISION, Bucket
from mesh.bus.losses import LossWatch
from mesh.bus.mapping import mapped
from mesh.bus.replicas import replicated, spread
from mesh.errors import BadRequest, Busy, Cancelled, MessageRejected, PayloadTooLarge
from mesh.protocol import subjects, topics
from mesh.protocol.batches import MAX_BATCH, BatchItem, BatchState, BatchStatus
from mesh.protocol.failures import ErrorReply
from mesh.protocol.generation import Generate, require_answer_fits
from mesh.protocol.message import Label, Message, Natural
from mesh.protocol.stream import fitted
from mesh.settings.units import format_bytes

__all__ = ["BatchQueue", "BatchStore", "Work", "cancelled_item"]

KEPT_S: Final = 7 * 86400.0
QUEUE_BYTES: Final = 512 * 1024 * 1024
STORE_BYTES: Final = 1024 * 1024 * 1024
ACK_WAIT_S: Final = 15.0
"""A coordinator that works on a request says so more often than this; otherwise the request is given to another one."""
_DUPLICATES_S: Final = 600.0
_MAX_VALUE: Final = 8 * 1024 * 1024
_HEADERS_BYTES: Final = 1024
_AT_ONCE: Final = 32
_TIMEOUT_S: Final = 5.0
_FULL: Final = (10047, 10077)  # no room on the server, no room in the stream


Known = Callable[[str], Awaitable[BatchStatus]]


class _Batch(Message):
    """What is known of a batch. `complete`: all of its requests are in the queue."""

    limit_bytes: ClassVar[int] = 4096

    model: Label
    total: Natural
    digest: Label
    complete: bool
    submitted_unix_s: float


class _Running(Message):
    starts: Natural = 0


@dataclass
class _Progress:
    """The indexes of the keys of each kind, and whether the batch was taken back."""

    running: set[int] = field(default_factory=set)
    end: set[int] = field(default_factory=set)
    failed: set[int] = field(default_factory=set)
    cancelled: set[int] = field(default_factory=set)
    taken_back: bool = False


def cancelled_item(index: int) -> BatchItem:
    """What becomes of a request of a batch that was taken back before it ended."""
    return BatchItem(index=index, state="cancelled", error=ErrorReply.of(Cancelled("the batch was taken back")))


class BatchStore:
    """The batches, as those who submit them see them."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._bucket = Bucket(
            bus, subjects.KV_BATCHES, ttl_s=KEPT_S, durable=True, max_value_bytes=_MAX_VALUE, max_bytes=STORE_BYTES, secret_keys=True
        )

    @property
    def remade(self) -> int:
        """How often the bucket was lost and made again."""
        return self._bucket.remade

    async def open(self) -> None:
        """Create the queue and the store if they do not exist. Clients may lack the permission to."""
        await BatchQueue(self._bus).open()
        await self._bucket.open()

    async def submit(self, model: str, requests: Sequence[Generate], *, id: str | None = None, known: Known | None = None) -> BatchStatus:
        """Put every request into the queue; returns when the server has them. The same `id` with the same requests is the same batch.
        `known` says what is known of the batch where there is one of this id (None: `status`).

        Errors: BadRequest (a request is wrong, or the id is another batch's), PayloadTooLarge, Busy (the queue is full).
        """
        if not 1 <= len(requests) <= MAX_BATCH:
            raise BadRequest(f"a batch of {len(requests)} requests: give 1 to {MAX_BATCH:,}", field="requests")
        id = _check_id(id or f"b-{secrets.token_hex(16)}")
        bodies = [self._body(index, request) for index, request in enumerate(requests)]
        batch = _Batch(model=model, total=len(bodies), digest=_digest(bodies), complete=False, submitted_unix_s=time.time())
        if not await self._describe(id, batch, new=True):
            there = await (known or self.status)(id)
            if (there.model, there.digest) != (model, batch.digest):
                raise BadRequest(f"batch {id} is another one: give this one its own id", field="id")
            if there.complete:
                return there
        gate = asyncio.Semaphore(_AT_ONCE)

        async def put(index: int) -> None:
            async with gate:
                await self._enqueue(model, id, index, bodies[index])

        await asyncio.gather(*(put(index) for index in range(len(bodies))))
        await self._describe(id, batch.model_copy(update={"complete": True}), new=False)
        return BatchStatus(
            id=id,
            model=model,
            state="queued",
            total=batch.total,
            running=0,
            done=0,
            failed=0,
            submitted_unix_s=batch.submitted_unix_s,
            digest=batch.digest,
        )

    async def status(self, id: str) -> BatchStatus:
        """The progress of a batch. BadRequest: there is no such batch."""
        batch, progress = await self._batch(_check_id(id)), await self._progress(id)
        ended, failed, cancelled = len(progress.end), len(progress.failed), len(progress.cancelled)
        state: BatchState = "queued"
        if progress.taken_back:
            state, cancelled = "cancelled", batch.total - ended + cancelled
        elif ended >= batch.total:
            state = "failed" if failed >= batch.total else "done"
        elif progress.running:
            state = "running"
        return BatchStatus(
            id=id,
            model=batch.model,
            state=state,
            total=batch.total,
            running=0 if progress.taken_back else len(progress.running - progress.end),
            done=max(ended - failed - len(progress.cancelled), 0),
            failed=failed,
            cancelled=cancelled,
            submitted_unix_s=batch.submitted_unix_s,
            digest=batch.digest,
            complete=batch.complete,
        )

    async def results(self, id: str, *, offset: int = 0, limit: int | None = None) -> list[BatchItem]:
        """The results of up to `limit` requests from `offset` on, in order, as far as they have ended. BadRequest: there is no such
        batch."""
        batch = await self._batch(_check_id(id))
        stop = batch.total if limit is None else min(batch.total, offset + limit)
        taken_back = await self.is_cancelled(id)
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(index: int) -> BatchItem | None:
            async with gate:
                found = await self.result(id, index)
            return cancelled_item(index) if found is None and taken_back else found

        return [item for item in await asyncio.gather(*(one(index) for index in range(offset, stop))) if item is not None]

    async def cancel(self, id: str) -> BatchStatus:
        """Take a batch back. Its requests leave the queue; the coordinators end those that run; what has ended keeps its result. A batch of
        which all has ended stays as it is. BadRequest: there is no such batch."""
        batch = await self._batch(_check_id(id))
        if len((await self._progress(id)).end) >= batch.total:
            return await self.status(id)
        await self._bucket.put(f"{id}.cancelled.batch", b"{}")
        js = self._bus.client.jetstream(timeout=_TIMEOUT_S)
        with mapped(f"taking back batch {id}"):
            await js.purge_stream(subjects.STREAM_BATCH, subject=f"{topics.BATCH_ITEM.any(batch.model, id).subject}")
        # Whoever begins a request from now on sees that the batch was taken back; of what was begun before no second result is stored.
        progress = await self._progress(id)
        for index in progress.running - progress.end:
            await self.end(id, cancelled_item(index))
        return await self.status(id)

    async def is_cancelled(self, id: str) -> bool:
        """Whether the batch was taken back."""
        return await self._bucket.get(f"{id}.cancelled.batch") is not None

    async def result(self, id: str, index: int) -> BatchItem | None:
        """The result of one request; None if it has not ended."""
        entry = await self._bucket.get(f"{id}.end.{index}")
        if entry is None or entry.value is None:
            return None
        try:
            return BatchItem.parse(entry.value)
        except MessageRejected as error:  # no coordinator wrote this
            return BatchItem(index=index, state="failed", error=ErrorReply.of(error))

    async def all(self) -> list[BatchStatus]:
        """Every batch that is kept, the latest first. Whoever knows an id may read and cancel its batch, so operators alone list them."""
        ids = [subject.split(".")[2] for subject in await self._subjects("*.batch", "listing the batches")]
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(id: str) -> BatchStatus | None:
            async with gate:
                try:
                    return await self.status(id)
                except BadRequest:  # it has ended meanwhile
                    return None

        found = [status for status in await asyncio.gather(*map(one, ids)) if status is not None]
        return sorted(found, key=lambda status: status.submitted_unix_s, reverse=True)

    # -- for the coordinators ------------------------------------------------------------------------------------------

    async def require(self, id: str, index: int, model: str) -> None:
        """BadRequest: there is no such batch of this model, or it has no such request."""
        batch = await self._batch(id)
        if batch.model != model or index >= batch.total:
            raise BadRequest(f"batch {id} of {batch.model} has {batch.total} requests, and not request {index} for {model}", field="id")

    async def begin(self, id: str, index: int) -> int:
        """Note that a request is begun. Returns how often it was begun before by a coordinator that neither ended it nor gave it back."""
        key = f"{id}.running.{index}"
        entry = await self._bucket.get(key)
        try:
            starts = _Running.parse(entry.value).starts if entry is not None and entry.value else 0
        except MessageRejected:  # no coordinator wrote this
            starts = 0
        await self._bucket.put(key, _Running(starts=starts + 1).to_bytes())
        return starts

    async def give_back(self, id: str, index: int, starts: int) -> None:
        await self._bucket.put(f"{id}.running.{index}", _Running(starts=starts).to_bytes())

    async def end(self, id: str, item: BatchItem) -> bool:
        """Store a result. False: there is one already, and it stays."""
        most = min(_MAX_VALUE, self._bus.max_payload - _HEADERS_BYTES)
        if item.answer is not None:
            item = item.model_copy(update={"answer": fitted(item.answer, most - _HEADERS_BYTES)})
        data = item.to_bytes()
        stored = await self._bucket.update(f"{id}.end.{item.index}", data, revision=0) is not None
        if stored:
            await self.note(id, item)
        return stored

    async def note(self, id: str, item: BatchItem) -> None:
        """Count what is counted besides a stored result."""
        if item.state != "done":
            await self._bucket.put(f"{id}.{item.state}.{item.index}", b"{}")

    # -- inside --------------------------------------------------------------------------------------------------------

    def _body(self, index: int, request: Generate) -> bytes:
        for name in ("session", "attempt", "given", "epoch"):
            if getattr(request, name):
                raise BadRequest(f"requests.{index}.{name}: a request of a batch has none: leave it out", field=f"requests.{index}.{name}")
        request = request.model_copy(update={"stream": False})
        body = request.to_bytes()
        limit = self._bus.max_payload - _HEADERS_BYTES
        try:
            require_answer_fits(request, limit)
        except PayloadTooLarge as error:
            raise PayloadTooLarge(f"requests.{index}: {error}", size_bytes=error.size_bytes, limit_bytes=error.limit_bytes) from None
        if len(body) > limit:
            raise PayloadTooLarge(
                f"requests.{index} has {format_bytes(len(body))}, and the server takes {format_bytes(limit)} (max_payload): shorten it, "
                "or raise max_payload in the server's configuration",
                size_bytes=len(body),
                limit_bytes=limit,
            )
        return body

    async def _describe(self, id: str, batch: _Batch, *, new: bool) -> bool:
        """Write what is known of a batch. False: it should be `new`, and there is a batch of this id."""
        headers = {nats.js.api.Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: "0"} if new else {}
        with mapped(f"describing batch {id}"):
            try:
                await self._publish(f"$KV.{subjects.KV_BATCHES}.{id}.batch", batch.to_bytes(), f"KV_{subjects.KV_BATCHES}", headers)
            except nats.js.errors.APIError as error:
                if error.err_code in WRONG_REVISION:
                    return False
                if error.err_code in _FULL:
                    raise Busy(f"the batch store is full: submit it again later, under the same id ({id})", retry_after_s=60) from None
                raise
        return True

    async def _enqueue(self, model: str, id: str, index: int, body: bytes) -> None:
        headers = {nats.js.api.Header.MSG_ID.value: f"{id}.{index}"}
        with mapped(f"queueing request {index} of batch {id}"):
            try:
                await self._publish(topics.BATCH_ITEM.at(model, id, index).subject, body, subjects.STREAM_BATCH, headers)
            except nats.js.errors.APIError as error:
                if error.err_code in _FULL:
                    raise Busy(f"the batch queue is full: submit it again later, under the same id ({id})", retry_after_s=60) from None
                raise

    async def _publish(self, subject: str, data: bytes, stream: str, headers: dict[str, str]) -> None:
        """Put a message into a stream. Where nobody has created the streams yet, they are created."""
        js = self._bus.client.jetstream(timeout=_TIMEOUT_S)
        try:
            await js.publish(subject, data, stream=stream, headers=headers)
        except nats.js.errors.NoStreamResponseError:
            await self.open()
            await js.publish(subject, data, stream=stream, headers=headers)

    async def _batch(self, id: str) -> _Batch:
        entry = await self._bucket.get(f"{id}.batch")
        if entry is None or not entry.value:
            raise BadRequest(f"there is no batch {id}: it was never submitted, or more than a week ago", field="id")
        try:
            return _Batch.parse(entry.value)
        except MessageRejected as error:
            raise BadRequest(f"batch {id} cannot be read: {error}", field="id") from None

    async def _progress(self, id: str) -> _Progress:
        prefix = f"$KV.{subjects.KV_BATCHES}.{id}."
        found = _Progress()
        for subject in await self._subjects(f"{id}.*.*", f"looking at batch {id}"):
            kind, _, index = subject.removeprefix(prefix).partition(".")
            if (kind, index) == ("cancelled", "batch"):
                found.taken_back = True
            elif index.isascii() and index.isdigit():
                getattr(found, kind, set[int]()).add(int(index))
        return found

    async def _subjects(self, keys: str, doing: str) -> list[str]:
        """The subjects of the keys of the store that match."""
        js = self._bus.client.jetstream(timeout=_TIMEOUT_S)
        with mapped(doing):
            try:
                info = await js.stream_info(f"KV_{subjects.KV_BATCHES}", subjects_filter=f"$KV.{subjects.KV_BATCHES}.{keys}")
            except nats.js.errors.NotFoundError:  # nothing was ever submitted
                return []
        return list(info.state.subjects or ())


class Work:
    """A message taken from the queue: a request of a batch. Call `alive` every few seconds until it is acknowledged, given back or set
    aside. MessageRejected: its subject is not that of a request of a batch."""

    def __init__(self, message: Any) -> None:
        self._message = message
        self.subject: str = message.subject
        topics.BATCH_ITEM.read(self.subject)
        *_, self.id, index = self.subject.split(".")
        if not (index.isascii() and index.isdigit() and int(index) < MAX_BATCH):
            raise MessageRejected(f"the index of the request is {index!r}: it should be a number below {MAX_BATCH}")
        self.index = int(index)
        self.data: bytes = message.data

    @property
    def deliveries(self) -> int:
        """How often the queue has given this message to a coordinator."""
        return int(self._message.metadata.num_delivered)

    async def alive(self) -> None:
        with mapped("batch"):
            await self._message.in_progress()

    async def done(self) -> None:
        with mapped("batch"):
            await self._message.ack()

    async def give_back(self, delay_s: float = 0.0) -> None:
        """Put the request back; a coordinator gets it after a while."""
        with mapped("batch"):
            await self._message.nak(delay=delay_s or None)

    async def set_aside(self, model: str, dead: DeadList, reason: str) -> None:
        """Write the message to the dead list and remove it from the queue."""
        await _set_aside(self._message, model, dead, reason)


class BatchQueue:
    """The work queue, as coordinators see it."""

    def __init__(self, bus: Bus, counters: Counter[str] | None = None) -> None:
        self._bus = bus
        self._dead = DeadList(bus)
        self._pull: nats.js.client.JetStreamContext.PullSubscription | None = None
        self._losses = LossWatch(f"the stream {subjects.STREAM_BATCH}")
        self.counters: Counter[str] = Counter() if counters is None else counters

    @property
    def remade(self) -> int:
        """How often the stream was lost and made again."""
        return self._losses.remade

    async def open(self) -> None:
        """Create the queue if it does not exist."""
        js = self._bus.client.jetstream(timeout=_TIMEOUT_S)
        with mapped(f"opening {subjects.STREAM_BATCH}"):
            try:
                info = await js.stream_info(subjects.STREAM_BATCH)
            except nats.js.errors.NotFoundError:
                info = await replicated(
                    self._bus,
                    lambda replicas: js.add_stream(
                        name=subjects.STREAM_BATCH,
                        subjects=[topics.BATCH_ITEM.any("*").subject],
                        retention=nats.js.api.RetentionPolicy.WORK_QUEUE,
                        max_age=KEPT_S,
                        max_bytes=QUEUE_BYTES,
                        discard=nats.js.api.DiscardPolicy.NEW,
                        duplicate_window=_DUPLICATES_S,
                        storage=nats.js.api.StorageType.FILE,
                        num_replicas=replicas,
                    ),
                )
            else:
                await spread(self._bus, subjects.STREAM_BATCH)
            self._losses.found(info.created)

    async def take(self, model: str, *, wait_s: float) -> Work | None:
        """The next request for a model; None if none comes within `wait_s`. A message that is not the request of a batch is set aside,
        and counted in `counters`."""
        name = subjects.token(model)
        js = self._bus.client.jetstream(timeout=_TIMEOUT_S)
        with mapped("taking a request of a batch"):
            if self._pull is None:
                await self.open()
                await js.add_consumer(
                    subjects.STREAM_BATCH,
                    durable_name=name,
                    filter_subject=topics.BATCH_ITEM.any(model).subject,
                    ack_policy=nats.js.api.AckPolicy.EXPLICIT,
                    ack_wait=ACK_WAIT_S,
                    max_ack_pending=1000,
                )
                self._pull = await js.pull_subscribe_bind(name, subjects.STREAM_BATCH)
            try:
                (message,) = await self._pull.fetch(1, timeout=wait_s)
            except TimeoutError:
                return None
            except Exception:
                await self.close()  # the server may have been restarted: bind again
                raise
        try:
            return Work(message)
        except MessageRejected as error:
            self.counters["dead"] += 1
            await _set_aside(message, model, self._dead, str(error))
            return None

    async def close(self) -> None:
        pull, self._pull = self._pull, None
        if pull is not None:
            try:
                await pull.unsubscribe()
            except nats.errors.Error:
                return  # it has ended already


async def _set_aside(message: Any, model: str, dead: DeadList, reason: str) -> None:
    await dead.add(model, message.subject, reason, len(message.data))
    with mapped("setting a message aside"):
        await message.term()


def _check_id(id: str) -> str:
    subjects.check_token(id, "id")
    if len(id) > 48:
        raise BadRequest(f"id {id} has {len(id)} characters: give 48 at most", field="id")
    return id


def _digest(bodies: Sequence[bytes]) -> str:
    return hashlib.sha256(orjson.dumps([hashlib.sha256(body).hexdigest() for body in bodies])).hexdigest()[:32]
