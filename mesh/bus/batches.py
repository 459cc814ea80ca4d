"""Durable batches: many requests, each answered once, whichever processes end meanwhile.

    stream mesh_batch       a work queue; mesh.v1.batches.MODEL.BATCH.INDEX is one request, removed once its result is stored
    KV mesh_batches         BATCH.batch           the batch: its model and the number of requests
                            BATCH.running.INDEX   the request was begun; how often before by a coordinator that did not end it
                            BATCH.end.INDEX       its result (BatchItem), created once: a second one is not stored
                            BATCH.failed.INDEX    it failed

Progress is read from the names of the keys alone. Everything is kept for a week. A full queue or store refuses new requests. Submitting
needs no coordinator. A submission that was interrupted is repeated under the same id, and only what is missing is added.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, Final

import nats.errors
import nats.js.api
import nats.js.client
import nats.js.errors
import orjson

from mesh.bus.connection import Bus
from mesh.bus.kv import Bucket
from mesh.bus.mapping import mapped
from mesh.bus.replicas import replicated, spread
from mesh.errors import BadRequest, Busy, PayloadTooLarge
from mesh.protocol import subjects, topics
from mesh.protocol.batches import MAX_BATCH, BatchItem, BatchState, BatchStatus
from mesh.protocol.generation import Generate, require_answer_fits
from mesh.protocol.message import Message
from mesh.protocol.stream import fitted
from mesh.settings.units import format_bytes

__all__ = ["BatchQueue", "BatchStore", "Work"]

KEPT_S: Final = 7 * 86400.0
QUEUE_BYTES: Final = 512 * 1024 * 1024
STORE_BYTES: Final = 1024 * 1024 * 1024
ACK_WAIT_S: Final = 15.0
"""Whoever works on a request says so more often than this, or it is given to another."""
_DUPLICATES_S: Final = 600.0
_MAX_VALUE: Final = 8 * 1024 * 1024
_HEADERS_BYTES: Final = 1024
_AT_ONCE: Final = 32
_TIMEOUT_S: Final = 5.0
_FULL: Final = (10047, 10077)  # no room on the server, no room in the stream


class _Batch(Message):
    """What is known of a batch. `complete`: all of its requests are in the queue."""

    limit_bytes: ClassVar[int] = 4096

    model: str
    total: int
    digest: str
    complete: bool
    submitted_unix_s: float


class _Running(Message):
    starts: int = 0


class BatchStore:
    """The batches, as those who submit them see them."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._bucket = Bucket(bus, subjects.KV_BATCHES, ttl_s=KEPT_S, durable=True, max_value_bytes=_MAX_VALUE, max_bytes=STORE_BYTES)

    async def open(self) -> None:
        """Create the queue and the store if they do not exist. Clients may lack the permission to."""
        await BatchQueue(self._bus).open()
        await self._bucket.open()

    async def submit(self, model: str, requests: Sequence[Generate], *, id: str | None = None) -> BatchStatus:
        """Put every request into the queue; returns when the server has them. The same `id` with the same requests is the same batch.

        Errors: BadRequest (a request is wrong, or the id is another batch's), PayloadTooLarge, Busy (the queue is full).
        """
        if not 1 <= len(requests) <= MAX_BATCH:
            raise BadRequest(f"a batch of {len(requests)} requests: give 1 to {MAX_BATCH:,}", field="requests")
        id = _check_id(id or f"b-{secrets.token_hex(8)}")
        bodies = [self._body(index, request) for index, request in enumerate(requests)]
        batch = _Batch(model=model, total=len(bodies), digest=_digest(bodies), complete=False, submitted_unix_s=time.time())
        await BatchQueue(self._bus).open()
        revision = await self._bucket.update(f"{id}.batch", batch.to_bytes(), revision=0)
        if revision is None:
            known = await self._batch(id)
            if (known.model, known.digest) != (model, batch.digest):
                raise BadRequest(f"batch {id} is another one: give this one its own id", field="id")
            if known.complete:
                return await self.status(id)
        ended = set((await self._progress(id))["end"])
        gate = asyncio.Semaphore(_AT_ONCE)

        async def put(index: int) -> None:
            async with gate:
                await self._enqueue(model, id, index, bodies[index])

        await asyncio.gather(*(put(index) for index in range(len(bodies)) if index not in ended))
        await self._bucket.put(f"{id}.batch", batch.model_copy(update={"complete": True}).to_bytes())
        return await self.status(id)

    async def status(self, id: str) -> BatchStatus:
        """The progress of a batch. BadRequest: there is no such batch."""
        batch, progress = await self._batch(_check_id(id)), await self._progress(id)
        ended, failed = len(progress["end"]), len(progress["failed"])
        state: BatchState = "queued"
        if ended >= batch.total:
            state = "failed" if failed >= batch.total else "done"
        elif progress["running"]:
            state = "running"
        return BatchStatus(
            id=id,
            model=batch.model,
            state=state,
            total=batch.total,
            running=len(set(progress["running"]) - set(progress["end"])),
            done=max(ended - failed, 0),
            failed=failed,
            submitted_unix_s=batch.submitted_unix_s,
        )

    async def results(self, id: str, *, offset: int = 0, limit: int | None = None) -> list[BatchItem]:
        """The results of up to `limit` requests from `offset` on, in order, as far as they have ended. BadRequest: there is no such
        batch."""
        batch = await self._batch(_check_id(id))
        stop = batch.total if limit is None else min(batch.total, offset + limit)
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(index: int) -> BatchItem | None:
            async with gate:
                return await self.result(id, index)

        return [item for item in await asyncio.gather(*(one(index) for index in range(offset, stop))) if item is not None]

    async def result(self, id: str, index: int) -> BatchItem | None:
        """The result of one request; None if it has not ended."""
        entry = await self._bucket.get(f"{id}.end.{index}")
        return None if entry is None or entry.value is None else BatchItem.parse(entry.value)

    # -- for the coordinators ------------------------------------------------------------------------------------------

    async def begin(self, id: str, index: int) -> int:
        """Note that a request is begun. Returns how often it was begun before by a coordinator that neither ended it nor gave it back."""
        key = f"{id}.running.{index}"
        entry = await self._bucket.get(key)
        starts = _Running.parse(entry.value).starts if entry is not None and entry.value else 0
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
        if item.state == "failed":
            await self._bucket.put(f"{id}.failed.{item.index}", b"{}")

    # -- inside --------------------------------------------------------------------------------------------------------

    def _body(self, index: int, request: Generate) -> bytes:
        for field in ("session", "attempt", "given"):
            if getattr(request, field):
                raise BadRequest(
                    f"requests.{index}.{field}: a request of a batch has none: leave it out", field=f"requests.{index}.{field}"
                )
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

    async def _enqueue(self, model: str, id: str, index: int, body: bytes) -> None:
        js = self._bus.client.jetstream(timeout=_TIMEOUT_S)
        headers = {nats.js.api.Header.MSG_ID.value: f"{id}.{index}"}
        try:
            with mapped(f"queueing request {index} of batch {id}"):
                try:
                    await js.publish(topics.BATCH_ITEM.at(model, id, index).subject, body, stream=subjects.STREAM_BATCH, headers=headers)
                except nats.js.errors.APIError as error:
                    if error.err_code in _FULL:
                        raise Busy("the batch queue is full: submit it again later, under the same id", retry_after_s=60) from None
                    raise
        except Busy as error:
            raise Busy(f"{error} ({id})", retry_after_s=error.retry_after_s) from None

    async def _batch(self, id: str) -> _Batch:
        entry = await self._bucket.get(f"{id}.batch")
        if entry is None or not entry.value:
            raise BadRequest(f"there is no batch {id}: it was never submitted, or more than a week ago", field="id")
        return _Batch.parse(entry.value)

    async def _progress(self, id: str) -> dict[str, list[int]]:
        """The indexes of the keys of each kind."""
        js = self._bus.client.jetstream(timeout=_TIMEOUT_S)
        prefix = f"$KV.{subjects.KV_BATCHES}.{id}."
        with mapped(f"looking at batch {id}"):
            state = (await js.stream_info(f"KV_{subjects.KV_BATCHES}", subjects_filter=f"{prefix}*.*")).state
        found: dict[str, list[int]] = {"running": [], "end": [], "failed": []}
        for subject in state.subjects or ():
            kind, _, index = subject.removeprefix(prefix).partition(".")
            if kind in found and index.isdigit():
                found[kind].append(int(index))
        return found


class Work:
    """A request of a batch, taken from the queue. Call `alive` every few seconds until it is acknowledged or given back."""

    def __init__(self, message: Any) -> None:
        self._message = message
        *_, self.id, index = message.subject.split(".")
        self.index = int(index)
        self.data: bytes = message.data

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


class BatchQueue:
    """The work queue, as coordinators see it."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._pull: nats.js.client.JetStreamContext.PullSubscription | None = None
        self.counters: Counter[str] = Counter()

    async def open(self) -> None:
        """Create the queue if it does not exist."""
        js = self._bus.client.jetstream(timeout=_TIMEOUT_S)
        with mapped(f"opening {subjects.STREAM_BATCH}"):
            try:
                await js.stream_info(subjects.STREAM_BATCH)
            except nats.js.errors.NotFoundError:
                await replicated(
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
                return
        await spread(self._bus, subjects.STREAM_BATCH)

    async def take(self, model: str, *, wait_s: float) -> Work | None:
        """The next request for a model; None if none comes within `wait_s`."""
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
        return Work(message)

    async def close(self) -> None:
        pull, self._pull = self._pull, None
        if pull is not None:
            try:
                await pull.unsubscribe()
            except nats.errors.Error:
                return  # it has ended already


def _check_id(id: str) -> str:
    subjects.check_token(id, "id")
    if len(id) > 48:
        raise BadRequest(f"id {id} has {len(id)} characters: give 48 at most", field="id")
    return id


def _digest(bodies: Sequence[bytes]) -> str:
    return hashlib.sha256(orjson.dumps([hashlib.sha256(body).hexdigest() for body in bodies])).hexdigest()[:32]
