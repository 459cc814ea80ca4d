"""The coordinator's part in durable batches (mesh/bus/batches.py): it works through them while no client wants its rows.

A request is taken from the queue while no client waits and more than a quarter of the rows are free. It goes the way of any other request,
under a name of its own (BATCH-INDEX), so that a second request for the same result is the same generation. Its result is stored before
the request is acknowledged. If a coordinator dies in between, another one does the request again, and the result that was stored first
stays. An error that may pass (no shard, a full mesh) gives the request back to the queue. Any other error is its result.

No message ends the worker. A message that is no request of a batch is set aside: it leaves the queue, and the dead list
(mesh/bus/dead.py) keeps its subject and the reason. So does one whose handling fails in an unexpected way STARTS times.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Final, Literal

import orjson

from mesh.bus import Bus, Endpoint, Received, Subscription, end_tasks
from mesh.bus.batches import BatchQueue, BatchStore, Work, cancelled_item
from mesh.bus.connection import raise_error
from mesh.bus.dead import DeadList
from mesh.coordinator.core.machine import Core
from mesh.errors import BadRequest, Cancelled, DeadlineExceeded, MeshError, MessageRejected, ServiceError
from mesh.protocol import topics
from mesh.protocol.batches import BatchItem, BatchResults, BatchStatus
from mesh.protocol.failures import ErrorReply
from mesh.protocol.generation import Generate, public_id

__all__ = ["BatchWorker"]

log = logging.getLogger("mesh.coordinator")

IN_PROGRESS_S: Final = 4.0
"""How often the queue hears that a request is being worked on. The request to the coordinator is repeated as often."""
STARTS: Final = 5
"""A request is not tried again after so many processes have ended while they worked on it."""
_AGAIN_S: Final = 5.0
_TAKE_S: Final = 5.0
_NO_ROOM_S: Final = 0.2
_PACE_S: Final = 0.01
_FAILED_S: Final = 1.0


class BatchWorker:
    """`instance`: of the coordinator that generates, whose `core` says whether there is room. `cancel(session)` ends a generation."""

    def __init__(self, bus: Bus, core: Core, model: str, instance: str, cancel: Callable[[str], object]) -> None:
        self.bus = bus
        self.counters: Counter[str] = Counter()
        self._model = model
        self._instance = instance
        self._core = core
        self._cancel = cancel
        self._store = BatchStore(bus)
        self._queue = BatchQueue(bus, self.counters)
        self._dead = DeadList(bus)
        self._inbox = bus.new_inbox()
        self._answers: dict[str, asyncio.Future[Received]] = {}
        self._working: dict[asyncio.Task[Any], Work] = {}
        self._taker: asyncio.Task[Any] | None = None
        self._subscription: Subscription | None = None

    def endpoints(self) -> list[Endpoint[Any]]:
        return [
            Endpoint("batch", topics.BATCH_SUBMIT.at(self._model), self._on_submit, concurrent=True),
            Endpoint("batch-status", topics.BATCH_STATUS.at(self._model), self._on_status, concurrent=True),
            Endpoint("batch-cancel", topics.BATCH_CANCEL.at(self._model), self._on_cancel, concurrent=True),
            Endpoint("batch-result", topics.BATCH_RESULT.at(self._model), self._on_result, concurrent=True),
        ]

    async def start(self) -> None:
        self._subscription = await self.bus.subscribe(f"{self._inbox}.*", self._on_answer)
        self.bus.spawn(self._store.open(), "durable batches")  # only batches need it, so nothing waits for it
        self._taker = self.bus.keep(self._take, "taking requests of batches")

    async def stop(self) -> None:
        """Give back the requests that are being worked on. The next coordinator to take one finds its generation under its name."""
        if self._taker is not None:
            await end_tasks(self._taker)
        working = dict(self._working)
        await end_tasks(*working)
        if self.bus.connected:
            for work in working.values():
                try:
                    await work.give_back()
                except MeshError as error:
                    log.debug("%s", error)
        await self._queue.close()
        if self._subscription is not None:
            await self._subscription.stop()

    # -- endpoints -----------------------------------------------------------------------------------------------------

    async def _on_submit(self, received: Received) -> BatchStatus:
        message = topics.BATCH_SUBMIT.parse(received.data)
        return await self._store.submit(self._model, message.requests, id=message.id)

    async def _on_status(self, received: Received) -> BatchStatus:
        return await self._store.status(topics.BATCH_STATUS.parse(received.data).id)

    async def _on_cancel(self, received: Received) -> BatchStatus:
        return await self._store.cancel(topics.BATCH_CANCEL.parse(received.data).id)

    async def _on_result(self, received: Received) -> BatchResults:
        """As many results as fit in one message."""
        query = topics.BATCH_RESULT.parse(received.data)
        total = (await self._store.status(query.id)).total
        taken_back = await self._store.is_cancelled(query.id)
        items: list[BatchItem] = []
        room, at = self.bus.max_payload * 3 // 4, query.offset
        for at in range(query.offset, min(query.offset + query.limit, total)):
            item = await self._store.result(query.id, at) or (cancelled_item(at) if taken_back else None)
            if item is not None:
                room -= len(item.to_bytes())
                if room < 0 and items:
                    break
                items.append(item)
        else:
            at = min(query.offset + query.limit, total)
        return BatchResults(id=query.id, items=tuple(items), next=at if at < total else None)

    @property
    def remade(self) -> int:
        """How often the queue or the store was lost and made again."""
        return self._queue.remade + self._store.remade

    # -- the work ------------------------------------------------------------------------------------------------------

    def has_room(self, working: int) -> bool:
        """Whether one more request may be begun while `working` are: no client waits, and a quarter of the rows stays free for clients
        that may come."""
        load = self._core.load(time.monotonic())
        return working < load.capacity and not load.queued and load.free > load.capacity // 4

    async def _take(self) -> None:
        failing = False
        while True:
            try:
                if not self.bus.connected or not self.has_room(len(self._working)):
                    await asyncio.sleep(_NO_ROOM_S)
                    continue
                work = await self._queue.take(self._model, wait_s=_TAKE_S)
            except ServiceError as error:
                self.counters["failed_takes"] += 1
                if not failing:
                    failing = True
                    log.warning("batches wait until this can be done again: %s", error)
                await asyncio.sleep(_FAILED_S)
                continue
            except Exception:
                self.counters["errors"] += 1
                log.exception("taking requests of batches; trying again")
                await asyncio.sleep(_FAILED_S)
                continue
            failing = False
            if work is not None:
                task = self.bus.spawn(self._work(work), f"request {work.index} of batch {public_id(work.id)}")
                self._working[task] = work
                task.add_done_callback(lambda done: self._working.pop(done, None))
                await asyncio.wait([task], timeout=_PACE_S)  # until the request has asked for its rows

    async def _work(self, work: Work) -> None:
        """Do a request. An error that is not the request's own leaves it to the queue, which delivers it again; at the last try it is set
        aside."""
        try:
            await self._do(work)
        except Exception as error:
            if isinstance(error, MeshError) and error.retryable:  # the server is away
                raise
            self.counters["errors"] += 1
            log.exception("request %d of batch %s", work.index, public_id(work.id))
            if work.deliveries >= STARTS:
                failed = MeshError(f"{work.deliveries} tries failed: see the logs of the coordinators")
                await self._store.end(work.id, BatchItem(index=work.index, state="failed", error=ErrorReply.of(failed)))
                await self._set_aside(work, f"{work.deliveries} tries failed, the last one with {error!r}")

    async def _set_aside(self, work: Work, reason: str) -> None:
        self.counters["dead"] += 1
        await work.set_aside(self._model, self._dead, reason)

    async def _do(self, work: Work) -> None:
        try:
            await self._store.require(work.id, work.index, self._model)
        except BadRequest as error:
            await self._set_aside(work, str(error))
            return
        stored = await self._store.result(work.id, work.index)
        if stored is not None:  # by a coordinator that ended before it could acknowledge the request
            await self._store.note(work.id, stored)
            await work.done()
            return
        starts = await self._store.begin(work.id, work.index)
        try:
            await self._require_wanted(work)  # after `begin`: who takes a batch back looks for what was begun
            if starts >= STARTS:
                raise MeshError(f"{starts} coordinators that generated this ended without an answer: see their logs")
            answer = await self._generate(work)
        except MeshError as error:
            if error.retryable:
                self.counters["given_back"] += 1
                log.info("request %d of batch %s: %s; again later", work.index, public_id(work.id), error)
                await self._store.give_back(work.id, work.index, starts)
                await work.give_back(_AGAIN_S)
                return
            state: Literal["failed", "cancelled"] = "cancelled" if isinstance(error, Cancelled) else "failed"
            self.counters[state] += 1
            item = BatchItem(index=work.index, state=state, error=ErrorReply.of(error))
        else:
            self.counters["done"] += 1
            item = BatchItem(index=work.index, state="done", answer=answer)
        await self._store.end(work.id, item)
        if item.error is not None and item.error.code == MessageRejected.code:
            await self._set_aside(work, item.error.message)
        else:
            await work.done()

    async def _require_wanted(self, work: Work) -> None:
        """Cancelled: the batch was taken back. A store that does not answer now takes nothing back."""
        try:
            cancelled = await self._store.is_cancelled(work.id)
        except ServiceError as error:
            log.debug("%s", error)
            return
        if cancelled:
            raise Cancelled("the batch was taken back")

    async def _generate(self, work: Work) -> dict[str, Any]:
        """The document of the answer, however long it takes. The request is idempotent, and is sent again while no answer comes."""
        name = f"{work.id}-{work.index}"
        message = Generate.parse(work.data).model_copy(update={"session": name, "stream": False})
        future = self._answers[name] = asyncio.get_running_loop().create_future()
        try:
            while True:
                await self.bus.send(topics.GENERATE_AT.at(self._model, self._instance), message, reply=f"{self._inbox}.{name}")
                await asyncio.wait([future], timeout=IN_PROGRESS_S)
                if future.done():
                    break
                await work.alive()
                await self._require_wanted(work)
        except Cancelled:
            self._cancel(name)
            raise
        finally:
            self._answers.pop(name, None)
        received: Received = future.result()
        if received.headers.get("Status") == "503":
            raise DeadlineExceeded(f"the coordinator that had request {work.index} of batch {public_id(work.id)} is gone")
        raise_error(received)
        document: dict[str, Any] = orjson.loads(received.data)
        return {name: value for name, value in document.items() if name not in ("done", "id", "epoch", "rest")}

    async def _on_answer(self, received: Received) -> None:
        future = self._answers.get(received.subject.rpartition(".")[2])
        if future is not None and not future.done():
            future.set_result(received)
