"""The client for asyncio. See mesh.client for both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import orjson

from mesh.bus import Bucket, Bus, BusOptions, EventLog, Received, Subscription
from mesh.bus.batches import BatchStore
from mesh.client.results import BatchResult, Completion, CoordinatorStatus, Health, MeshStatus
from mesh.client.stream import Retry, Stream
from mesh.errors import BadRequest, DeadlineExceeded, MeshError, MessageRejected, Unavailable
from mesh.protocol import subjects, topics
from mesh.protocol.batches import BatchStatus
from mesh.protocol.events import Event
from mesh.protocol.generation import Generate, TraceRequest
from mesh.protocol.status import CoordinatorStats, ShardLease, ShardStats
from mesh.protocol.stream import Waiting

__all__ = ["AsyncMeshClient"]

COORDINATOR_SERVICE = "mesh-coordinator"
SHARD_SERVICE = "mesh-shard"
_GATHER_S = 1.0
_QUIET_S = 0.15
_TRACE_S = 2.0


class AsyncMeshClient:
    """A connection to a mesh.

        async with AsyncMeshClient("nats://127.0.0.1:4222") as mesh:
            answer = await mesh.generate("What is rain?", max_tokens=50)
            print(answer.text, answer.usage.completion_tokens, answer.timing.tokens_per_s)
            async with mesh.stream("Tell me a story.") as stream:
                async for chunk in stream:
                    print(chunk.text, end="", flush=True)

    model: whose; None: the only one there. timeout_s: for each request, None for no limit. retries: how often a request is asked
    again where that can help; retry_busy: also where the mesh was full. Errors are those of mesh.errors: BadRequest, PromptTooLong,
    Busy, Unavailable, DeadlineExceeded ...
    """

    def __init__(
        self,
        servers: str | Sequence[str] = "nats://127.0.0.1:4222",
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        retries: int = 5,
        stall_timeout_s: float = 60.0,
        retry_busy: bool = True,
        options: BusOptions | None = None,
    ) -> None:
        urls = tuple(servers.split(",")) if isinstance(servers, str) else tuple(servers)
        self._options = options or BusOptions(urls=urls)
        self._model = model
        self._timeout_s = timeout_s
        self._retry = Retry(retries, stall_timeout_s, busy=retry_busy)
        self._bus: Bus | None = None

    async def connect(self, *, timeout_s: float = 10.0) -> None:
        """Idempotent; Unavailable where no server answers, Denied where it refuses."""
        if self._bus is None:
            self._bus = await Bus.connect(self._options, name="mesh-client", timeout_s=timeout_s)

    async def close(self) -> None:
        bus, self._bus = self._bus, None
        if bus is not None:
            await bus.close()

    async def __aenter__(self) -> AsyncMeshClient:
        await self.connect()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    # -- generating ----------------------------------------------------------------------------------------------------

    async def open_stream(self, prompt: str | None = None, **request: Any) -> Stream:
        """As `stream`, where the model is still to be found out: the stream, nothing of it read yet."""
        model = request.pop("model", None) or self._model or await self._only_model()
        return self.stream(prompt, model=model, **request)

    def stream(
        self,
        prompt: str | None = None,
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        on_waiting: Callable[[Waiting], None] | None = None,
        **request: Any,
    ) -> Stream:
        """A generation token by token. `on_waiting` is called every few seconds while the request waits: for a slot, or for layers that no
        shard serves. `request`: fields of mesh.protocol.generation.Generate, such as messages or tokens instead of a
        prompt, max_tokens, stop, raw, session, and the sampling parameters of mesh.protocol.sampling."""
        name = model or self._model
        if name is None:
            raise BadRequest("say which model: AsyncMeshClient(..., model=NAME), or use open_stream, which finds it out", field="model")
        message = _message(prompt, request)
        return Stream(self._connected, name, message, timeout_s=timeout_s or self._timeout_s, retry=self._retry, on_waiting=on_waiting)

    async def generate(self, prompt: str | None = None, **request: Any) -> Completion:
        """A whole generation; the arguments of `stream`. Cancelling the task cancels the generation."""
        async with await self.open_stream(prompt, **request) as stream:
            async for _ in stream:
                pass
        assert stream.completion is not None
        return stream.completion

    async def chat(self, messages: Iterable[Mapping[str, str]], **request: Any) -> Completion:
        """The assistant's next message after `messages` ({"role", "content"})."""
        return await self.generate(messages=list(messages), **request)

    async def batch(
        self, requests: Iterable[str | Mapping[str, Any]], *, concurrency: int = 8, **common: Any
    ) -> list[Completion | MeshError]:
        """Many generations, `concurrency` at a time; for each request, in order, its completion or its error. A request is a prompt
        or a mapping of the arguments of `generate`; `common` are those of all."""
        if concurrency < 1:
            raise BadRequest(f"concurrency is {concurrency}: give at least 1", field="concurrency")
        gate = asyncio.Semaphore(concurrency)

        async def one(request: str | Mapping[str, Any]) -> Completion | MeshError:
            own = {"prompt": request} if isinstance(request, str) else dict(request)
            async with gate:
                try:
                    return await self.generate(**{**common, **own})
                except MeshError as error:
                    return error

        return list(await asyncio.gather(*(one(request) for request in requests)))

    # -- durable batches -----------------------------------------------------------------------------------------------

    async def submit_batch(
        self, requests: Iterable[str | Mapping[str, Any]], *, id: str | None = None, model: str | None = None, **common: Any
    ) -> BatchStatus:
        """Requests to be answered some time, each once, whatever dies meanwhile; `requests` and `common` as of `batch`. Returns when
        the server has them: no coordinator need be there. The same `id` with the same requests is the same batch, so that a submission
        that was interrupted is made again.

        Errors: BadRequest, PayloadTooLarge, Busy (the queue is full).
        """
        name = model or self._model or await self._only_model()
        made = []
        for index, request in enumerate(requests):
            own = {"prompt": request} if isinstance(request, str) else dict(request)
            own = {**common, **own}
            try:
                made.append(_message(own.pop("prompt", None), own))
            except BadRequest as error:
                raise BadRequest(f"requests.{index}.{error}", field=f"requests.{index}.{error.field}") from None
        return await BatchStore(self._connected).submit(name, made, id=id)

    async def batch_status(self, id: str) -> BatchStatus:
        """How far a batch is: state queued, running, done or failed, and counts. BadRequest: there is no such batch."""
        return await BatchStore(self._connected).status(id)

    async def batch_results(self, id: str, *, offset: int = 0, limit: int | None = None) -> list[BatchResult]:
        """Of its requests from `offset` on, `limit` of them, those that have ended, in order. BadRequest: there is no such batch."""
        items = await BatchStore(self._connected).results(id, offset=offset, limit=limit)
        return [BatchResult.of(item) for item in items]

    async def wait_batch(self, id: str, *, timeout_s: float | None = None, poll_s: float = 0.5) -> BatchStatus:
        """Until every request of it has ended. DeadlineExceeded: not within `timeout_s`, and it goes on."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            status = await self.batch_status(id)
            if status.state in ("done", "failed"):
                return status
            if deadline is not None and time.monotonic() + poll_s > deadline:
                ended = status.done + status.failed
                raise DeadlineExceeded(f"batch {id} has {ended} of {status.total} requests answered after {timeout_s:g} s, and goes on")
            await asyncio.sleep(poll_s)

    # -- looking -------------------------------------------------------------------------------------------------------

    async def models(self) -> list[str]:
        """Names of the models that a coordinator serves."""
        return sorted({coordinator.model for coordinator in await self.coordinators()})

    async def coordinators(self) -> tuple[CoordinatorStatus, ...]:
        """Those that answer, by model and name."""
        found = []
        for answer in await self._gather(f"$SRV.STATS.{COORDINATOR_SERVICE}"):
            try:
                data = next(endpoint["data"] for endpoint in orjson.loads(answer.data)["endpoints"] if endpoint["name"] == "generate")
                found.append(CoordinatorStatus(CoordinatorStats.parse(orjson.dumps(data))))
            except (MessageRejected, LookupError, TypeError, ValueError, StopIteration):
                continue  # of another version, or of another service
        return tuple(sorted(found, key=lambda c: (c.model, c.name)))

    async def status(self) -> MeshStatus:
        """Shards and coordinators, as they say themselves."""
        entries = await Bucket(self._connected, subjects.KV_SHARDS, ttl_s=subjects.LEASE_TTL_S).entries()
        shards = []
        for entry in entries:
            try:
                shards.append(ShardLease.parse(entry.value or b""))
            except MessageRejected:
                continue  # another version's
        shards.sort(key=lambda shard: (shard.model, shard.layers, shard.shard))
        return MeshStatus(tuple(shards), await self.coordinators())

    async def health(self, model: str | None = None) -> Health:
        """Whether a request would be generated now."""
        name = model or self._model
        try:
            coordinators = [c for c in await self.coordinators() if name is None or c.model == name]
        except MeshError as error:
            return Health(False, str(error), name)
        if not coordinators:
            return Health(False, f"no coordinator serves {name or 'any model'}", name)
        serving = next((c for c in coordinators if c.serving), None)
        if serving is None:
            return Health(False, "some layer range has no shard that is ready", coordinators[0].model)
        return Health(True, "", serving.model)

    async def shard_stats(self) -> list[ShardStats]:
        """Counts of every shard that answers."""
        found = []
        for answer in await self._gather(f"$SRV.STATS.{SHARD_SERVICE}"):
            try:
                found.append(ShardStats.parse(orjson.dumps(orjson.loads(answer.data)["endpoints"][0]["data"])))
            except (MessageRejected, LookupError, TypeError):
                continue  # another version's
        return found

    async def trace(self, request: str, *, model: str | None = None) -> dict[str, Any] | None:
        """Where the time of a generation went, running or among the last that ended (docs/client.md has the keys); None where no
        coordinator remembers it."""
        name = model or self._model
        question = TraceRequest(request=request)
        for coordinator in await self.coordinators():
            if name not in (None, coordinator.model):
                continue
            try:
                answer = await self._connected.request(topics.TRACE.at(coordinator.model, coordinator.name), question, timeout_s=_TRACE_S)
            except (Unavailable, DeadlineExceeded):
                continue  # it has gone since
            if answer.trace is not None:
                return answer.trace
        return None

    async def events(self, *, last: int | None = None, since_unix_s: float | None = None, follow: bool = False) -> AsyncIterator[Event]:
        """What has happened, oldest first: the `last` so many, or since a time, else all of a week. `follow`: and then what happens,
        for ever. Unavailable where nothing is kept."""
        async for event in EventLog(self._connected).events(last=last, since_unix_s=since_unix_s, follow=follow):
            yield event

    async def watch_events(self, call: Callable[[Event], None]) -> Subscription:
        """`call` with everything the mesh says has happened, from now until the subscription is stopped."""

        async def on_message(received: Received) -> None:
            call(Event.parse(received.data))

        return await self._connected.subscribe(topics.EVENTS.any(), on_message)

    @property
    def connected(self) -> bool:
        """Whether the NATS server is there now; it is looked for again for ever where it is not."""
        return self._bus is not None and self._bus.connected

    # -- inside --------------------------------------------------------------------------------------------------------

    @property
    def _connected(self) -> Bus:
        if self._bus is None:
            raise Unavailable("not connected: use `async with AsyncMeshClient(...)`, or `await client.connect()` first")
        return self._bus

    async def _only_model(self) -> str:
        models = await self.models()
        if len(models) == 1:
            self._model = models[0]
            return models[0]
        if models:
            raise BadRequest(f"there are several models, {', '.join(models)}: say which with model=", field="model")
        raise Unavailable("no coordinator answers: start one, or see `mesh status`")

    async def _gather(self, subject: str) -> list[Received]:
        """Every answer to a question to nobody in particular: until it has been quiet for a while."""
        bus = self._connected
        answers: asyncio.Queue[Received] = asyncio.Queue()
        inbox = bus.new_inbox()
        subscription = await bus.subscribe(inbox, answers.put)
        found: list[Received] = []
        try:
            await bus.publish(subject, b"", reply=inbox)
            while True:
                async with asyncio.timeout(_QUIET_S if found else _GATHER_S):
                    answer = await answers.get()
                if answer.headers.get("Status") == "503":
                    break
                found.append(answer)
        except TimeoutError:
            pass
        finally:
            await subscription.stop()
        return found


def _message(prompt: str | None, request: Mapping[str, Any]) -> Generate:
    """Through JSON, so that lists and tuples, numbers of either kind are taken as they would be from any other client."""
    values = {"prompt": prompt, **request}
    try:
        return Generate.parse(orjson.dumps({name: value for name, value in values.items() if value is not None}))
    except MessageRejected as error:
        raise BadRequest(str(error), field=error.field) from None
    except TypeError as error:
        raise BadRequest(f"the request cannot be written as JSON: {error}", field="request") from None
