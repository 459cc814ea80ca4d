"""The client for asyncio. See mesh.client for both."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, TypeVar, Unpack

from mesh.bus import Bucket, Bus, BusOptions, EventLog, Received, Subscription
from mesh.bus.batches import BatchStore
from mesh.bus.dead import DeadList
from mesh.bus.service import endpoint_data
from mesh.bus.spans import SpanPublisher
from mesh.client.embedding import each_input, together, vector_in
from mesh.client.parsing import Form, form_of, instance_of
from mesh.client.request import ChatArguments, EmbedArguments, GenerateArguments, RequestArguments, asked, message_of
from mesh.client.results import BatchResult, Completion, CoordinatorStatus, Embeddings, Health, MeshStatus, MeshUsage, Usage
from mesh.client.stream import Retry, Stream
from mesh.errors import BadRequest, DeadlineExceeded, MeshError, MessageRejected, NobodyListens, ServiceError, Unavailable
from mesh.protocol import subjects, topics
from mesh.protocol.batches import BatchItem, BatchQuery, BatchResults, BatchStatus, DeadMessage
from mesh.protocol.events import Event
from mesh.protocol.generation import TraceReply, TraceRequest
from mesh.protocol.message import Message
from mesh.protocol.spans import Span
from mesh.protocol.status import CoordinatorStats, SessionReport, ShardLease, ShardStats, TraceQuery
from mesh.protocol.stream import Waiting
from mesh.protocol.tokenizing import Detokenize, Tokenize, Tokenized
from mesh.protocol.usage import UsageQuery, UsageReport
from mesh.telemetry.context import current

__all__ = ["AsyncMeshClient"]

COORDINATOR_SERVICE = subjects.SERVICE_COORDINATOR
SHARD_SERVICE = subjects.SERVICE_SHARD
_KEPT_S = 1.0
"""How long the copies of the leases in JetStream are waited for; the shards themselves answer without it."""
_TRACE_S = 2.0
_BATCH_S = 30.0
_TOKENIZE_S = 60.0
_PAGE = 200
Reply = TypeVar("Reply", BatchStatus, BatchResults)
Asked = TypeVar("Asked", bound=Message)
Answered = TypeVar("Answered", bound=Message)


class AsyncMeshClient:
    """A connection to a mesh.

        async with AsyncMeshClient("nats://127.0.0.1:4222") as mesh:
            answer = await mesh.generate("What is rain?", max_tokens=50)
            print(answer.text, answer.usage.completion_tokens, answer.timing.tokens_per_s)
            async with mesh.stream("Tell me a story.") as stream:
                async for chunk in stream:
                    print(chunk.text, end="", flush=True)

    model: the model to ask; None: the only model that is served. timeout_s: the limit of each request; None: no limit. retries: how
    often a request is sent again after an error that a retry can help. retry_busy: whether it is also sent again when the mesh was
    full. Errors are those of mesh.errors: BadRequest, PromptTooLong, Busy, Unavailable, DeadlineExceeded ...
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
        self._spans: SpanPublisher | None = None

    async def connect(self, *, timeout_s: float = 10.0) -> None:
        """Connect to the NATS servers. Idempotent. Unavailable: no server answers. Denied: a server refuses the connection."""
        if self._bus is None:
            self._bus = await Bus.connect(self._options, name="mesh-client", timeout_s=timeout_s)

    async def close(self) -> None:
        bus, self._bus, self._spans = self._bus, None, None
        if bus is not None:
            await bus.close()

    @property
    def sent_again(self) -> int:
        """How often a request of this client was sent again."""
        return self._retry.sent_again

    def connection(self) -> Bus | None:
        """The connection, for its counters; None before `connect`."""
        return self._bus

    async def __aenter__(self) -> AsyncMeshClient:
        await self.connect()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    # -- generating ----------------------------------------------------------------------------------------------------

    async def open_stream(self, prompt: str | None = None, **request: Unpack[GenerateArguments]) -> Stream:
        """Like `stream`, but it also finds out the model. Returns the stream before anything of it is read."""
        request["model"] = request.get("model") or self._model or await self._only_model()
        return self.stream(prompt, **request)

    def stream(
        self,
        prompt: str | None = None,
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        on_waiting: Callable[[Waiting], None] | None = None,
        **request: Unpack[RequestArguments],
    ) -> Stream:
        """Generate token by token. `on_waiting` is called every few seconds while the request waits for a row, or for layers that no shard
        serves. `request`: fields of mesh.protocol.generation.Generate, such as messages or tokens instead of a
        prompt, max_tokens, stop, raw, session, and the sampling parameters of mesh.protocol.sampling. The generation joins the trace that
        is OpenTelemetry's current one."""
        name = model or self._model
        if name is None:
            raise BadRequest("say which model: AsyncMeshClient(..., model=NAME), or use open_stream, which finds it out", field="model")
        message = message_of(prompt, {"traceparent": current(), **request})
        return Stream(self._connected, name, message, timeout_s=timeout_s or self._timeout_s, retry=self._retry, on_waiting=on_waiting)

    async def generate(self, prompt: str | None = None, **request: Unpack[GenerateArguments]) -> Completion:
        """Generate, and return the whole answer. The arguments are those of `stream`. Cancelling the task cancels the generation."""
        async with await self.open_stream(prompt, **request) as stream:
            async for _ in stream:
                pass
        assert stream.completion is not None
        return stream.completion

    async def chat(self, messages: Iterable[Mapping[str, Any]], **request: Unpack[ChatArguments]) -> Completion:
        """Generate the assistant's next message after `messages` ({"role", "content"})."""
        return await self.generate(messages=list(messages), **request)

    async def parse(self, form: type[Form], prompt: str | None = None, **request: Unpack[GenerateArguments]) -> Form:
        """Generate an instance of a pydantic model: the answer is JSON that follows the model's schema. The arguments are those of
        `generate`; the model sees only these, so say in the prompt what is wanted. BadRequest: the schema is not supported, or max_tokens
        ended the answer before it was complete."""
        request["structured_outputs"] = form_of(form)
        return instance_of(form, await self.generate(prompt, **request))

    async def embed(
        self,
        inputs: str | Sequence[int] | Iterable[str | Sequence[int]],
        *,
        dimensions: int | None = None,
        normalize: bool = True,
        concurrency: int = 8,
        **common: Unpack[EmbedArguments],
    ) -> Embeddings:
        """A vector for each of `inputs`: texts as they are, or token ids. It is the hidden state of the last token, after the final norm.
        `dimensions`: only its first numbers. `normalize`: its length is 1. The first error ends the others."""
        embed = {"normalize": normalize} if dimensions is None else {"normalize": normalize, "dimensions": dimensions}
        common["model"] = common.get("model") or self._model or await self._only_model()
        gate = asyncio.Semaphore(concurrency)

        async def one(given: str | Sequence[int]) -> Completion:
            request: GenerateArguments = {"embed": embed}
            request.update(common)  # type: ignore[typeddict-item]  # some of its keys
            if not isinstance(given, str):
                request["tokens"] = given
            async with gate:
                return await self.generate(given if isinstance(given, str) else None, **request)

        completions = await together([one(given) for given in each_input(inputs)])
        return Embeddings(tuple([vector_in(each) for each in completions]), Usage.total(each.usage for each in completions))

    async def tokenize(self, prompt: str | None = None, *, model: str | None = None, **request: Any) -> Tokenized:
        """The tokens of a text as it is, or of `messages` in the model's template. `request`: fields of
        mesh.protocol.tokenizing.Tokenize."""
        name = model or self._model or await self._only_model()
        values = {name: value for name, value in {"prompt": prompt, **request}.items() if value is not None}
        return await self._connected.request(topics.TOKENIZE.at(name), asked(Tokenize, values), timeout_s=self._timeout_s or _TOKENIZE_S)

    async def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """The text of tokens, control tokens included."""
        name = model or self._model or await self._only_model()
        question = asked(Detokenize, {"tokens": list(tokens)})
        return (await self._connected.request(topics.DETOKENIZE.at(name), question, timeout_s=self._timeout_s or _TOKENIZE_S)).text

    async def batch(
        self, requests: Iterable[str | Mapping[str, Any]], *, concurrency: int = 8, **common: Unpack[GenerateArguments]
    ) -> list[Completion | MeshError]:
        """Generate for many requests, `concurrency` at a time. Returns the completion or the error of each request, in order. A request
        is a prompt, or a mapping of arguments of `generate`; `common` holds the arguments that all requests share."""
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
        self,
        requests: Iterable[str | Mapping[str, Any]],
        *,
        id: str | None = None,
        model: str | None = None,
        **common: Unpack[RequestArguments],
    ) -> BatchStatus:
        """Submit requests that are answered later, each once, whichever processes die meanwhile. `requests` and `common` are those of
        `batch`. Returns when the NATS server has stored them; no coordinator has to run. The same `id` with the same requests is the
        same batch, so an interrupted submission can be repeated.

        Errors: BadRequest, PayloadTooLarge, Busy (the queue is full).
        """
        name = model or self._model or await self._only_model()
        made = []
        for index, request in enumerate(requests):
            own = {**common, **({"prompt": request} if isinstance(request, str) else request)}
            try:
                made.append(message_of(own.pop("prompt", None), own))
            except BadRequest as error:
                raise BadRequest(f"requests.{index}.{error}", field=f"requests.{index}.{error.field}") from None
        return await BatchStore(self._connected).submit(name, made, id=id, known=self.batch_status)

    async def batch_status(self, id: str) -> BatchStatus:
        """How far a batch is: state queued, running, done, failed or cancelled, and counts. BadRequest: there is no such batch.
        Whoever knows the id may ask: one that you choose should be one that nobody guesses."""
        return await self._of_batch(topics.BATCH_STATUS, BatchQuery(id=_batch_id(id)), lambda store: store.status(id))

    async def batches(self) -> list[BatchStatus]:
        """Every batch of the last week, the latest first. Whoever knows an id may read its results, so operators alone list them."""
        return await BatchStore(self._connected).all()

    async def cancel_batch(self, id: str) -> BatchStatus:
        """Take a batch back: what has not begun is not begun, what runs is cancelled within seconds, what has ended keeps its result.
        BadRequest: there is no such batch."""
        return await self._of_batch(topics.BATCH_CANCEL, BatchQuery(id=_batch_id(id)), lambda store: store.cancel(id))

    async def batch_results(self, id: str, *, offset: int = 0, limit: int | None = None) -> list[BatchResult]:
        """Of its requests from `offset` on, `limit` of them, those that have ended, in order. BadRequest: there is no such batch."""
        status = await self.batch_status(id)
        stop = status.total if limit is None else min(status.total, offset + limit)
        items: list[BatchItem] = []
        at: int | None = offset
        while at is not None and at < stop:
            query = BatchQuery(id=id, offset=at, limit=min(stop - at, _PAGE))
            page = await self._of_batch(topics.BATCH_RESULT, query, partial(_page, query=query))
            items += page.items
            at = page.next
        return [BatchResult.of(item) for item in items]

    async def wait_batch(self, id: str, *, timeout_s: float | None = None, poll_s: float = 0.5) -> BatchStatus:
        """Wait until every request of a batch has ended. DeadlineExceeded: `timeout_s` is over; the batch goes on."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            status = await self.batch_status(id)
            if status.state in ("done", "failed", "cancelled"):
                return status
            if deadline is not None and time.monotonic() + poll_s > deadline:
                ended = status.done + status.failed
                raise DeadlineExceeded(f"batch {id} has {ended} of {status.total} requests answered after {timeout_s:g} s, and goes on")
            await asyncio.sleep(poll_s)

    async def dead_messages(self, *, last: int = 100) -> list[DeadMessage]:
        """The `last` messages of batches that no coordinator could handle, the oldest first. Operators alone may read them."""
        return await DeadList(self._connected).entries(last=last)

    # -- looking -------------------------------------------------------------------------------------------------------

    async def models(self) -> list[str]:
        """Names of the models that a coordinator serves."""
        return sorted({coordinator.model for coordinator in await self.coordinators()})

    async def coordinators(self) -> tuple[CoordinatorStatus, ...]:
        """The coordinators that answer, sorted by model and name."""
        found = []
        for answer in await self._connected.gather(f"$SRV.STATS.{COORDINATOR_SERVICE}"):
            try:
                found.append(CoordinatorStatus(CoordinatorStats.parse(endpoint_data(answer.data, "generate"))))
            except MessageRejected:
                continue  # of another version, or of another service
        return tuple(sorted(found, key=lambda c: (c.model, c.name)))

    async def status(self) -> MeshStatus:
        """Shards and coordinators, as they say themselves. A shard that does not answer now, and whose lease has not ended, is there as
        its lease says. Without JetStream there are no such leases."""
        coordinators, answers, kept = await asyncio.gather(
            self.coordinators(), self._connected.gather(topics.LEASES.at().subject), self._kept_leases()
        )
        found: dict[str, ShardLease] = {}
        for data in (*(kept or ()), *(answer.data for answer in answers)):
            try:
                lease = ShardLease.parse(data)
            except MessageRejected:
                continue  # another version's
            before = found.get(lease.shard)
            if before is None or lease.instance >= before.instance:
                found[lease.shard] = lease
        shards = sorted(found.values(), key=lambda shard: (shard.model, shard.layers, shard.shard))
        return MeshStatus(tuple(shards), coordinators, jetstream=kept is not None)

    async def health(self, model: str | None = None) -> Health:
        """Whether a request would be generated now; without a model's name, one for each model that is served."""
        name = model or self._model
        try:
            coordinators = [c for c in await self.coordinators() if name is None or c.model == name]
        except MeshError as error:
            return Health(False, str(error), name)
        if not coordinators:
            return Health(False, f"no coordinator serves {name or 'any model'}", name)
        models = sorted({c.model for c in coordinators})
        lacking = [model for model in models if not any(c.serving for c in coordinators if c.model == model)]
        only = models[0] if len(models) == 1 else None
        if lacking:
            of = "" if only else f" of {' and of '.join(lacking)}"
            return Health(False, f"some layer range{of} has no shard that is ready", only or lacking[0])
        return Health(True, "", only)

    async def shard_stats(self) -> list[ShardStats]:
        """The counts of every shard that answers."""
        found = []
        for answer in await self._connected.gather(f"$SRV.STATS.{SHARD_SERVICE}"):
            try:
                found.append(ShardStats.parse(endpoint_data(answer.data, "stats")))
            except MessageRejected:
                continue  # of another version, or of another service
        return found

    async def usage(self, subject: str | None = None) -> MeshUsage:
        """What a subject has used at all gateways since they started, or what each subject has. For operators and gateways."""
        found = []
        for answer in await self._connected.gather(topics.USAGE.at().subject, UsageQuery(subject=subject).to_bytes()):
            try:
                found.append(UsageReport.parse(answer.data))
            except MessageRejected:
                continue  # of another version
        return MeshUsage.of(found)

    def report_spans(self, *spans: Span) -> None:
        """Send spans to the coordinators, which show them with the traces that they belong to. Never waits; what cannot be sent is
        dropped."""
        if self._spans is None:
            self._spans = SpanPublisher(self._connected)
        self._spans.put(*spans)

    @property
    def spans_dropped(self) -> int:
        """Spans of `report_spans` that could not be sent."""
        return 0 if self._spans is None else self._spans.dropped

    async def traces(
        self, kind: Literal["last", "failed", "slow"] = "last", *, limit: int = 32, model: str | None = None
    ) -> list[SessionReport]:
        """The last generations that ended: all, or those that failed, or those that were slow; the latest first. For operators."""
        found: list[SessionReport] = []
        async for answer in self._each(topics.TRACES, TraceQuery(kind=kind, limit=limit), model):
            found += answer.requests
        return sorted(found, key=lambda report: report.began_unix_s + report.total_s, reverse=True)[:limit]

    async def trace(self, session: str, *, model: str | None = None) -> dict[str, Any] | None:
        """Where the time of a generation of one's own went, running or among the last that ended (docs/client.md has the keys); None where
        no coordinator remembers it. `session`: `answer.session`, or `stream.session`."""
        return await self._trace(topics.TRACE, session, model)

    async def inspect(self, request: str, *, model: str | None = None) -> dict[str, Any] | None:
        """The same for operators and gateways, by the public id, `answer.request`, which the stats of coordinators show too."""
        return await self._trace(topics.INSPECT, request, model)

    async def _trace(self, topic: topics.Topic[TraceRequest, TraceReply], request: str, model: str | None) -> dict[str, Any] | None:
        async for answer in self._each(topic, TraceRequest(request=request), model):
            if answer.trace is not None:
                return answer.trace
        return None

    async def _each(self, topic: topics.Topic[Asked, Answered], question: Asked, model: str | None) -> AsyncIterator[Answered]:
        """The answer of each coordinator of the model, one after the other."""
        name = model or self._model
        for coordinator in await self.coordinators():
            if name not in (None, coordinator.model):
                continue
            try:
                answer = await self._connected.request(topic.at(coordinator.model, coordinator.name), question, timeout_s=_TRACE_S)
            except (Unavailable, DeadlineExceeded):
                continue  # it has gone since
            yield answer

    async def events(self, *, last: int | None = None, since_unix_s: float | None = None, follow: bool = False) -> AsyncIterator[Event]:
        """The events of the mesh, oldest first: the `last` ones, or those since a time, otherwise all of the last week. `follow`: then
        also each new event, without end. Unavailable: the mesh keeps no events."""
        async for event in EventLog(self._connected).events(last=last, since_unix_s=since_unix_s, follow=follow):
            yield event

    async def watch_events(self, call: Callable[[Event], None]) -> Subscription:
        """Call `call` with each new event of the mesh until the subscription is stopped."""

        async def on_message(received: Received) -> None:
            call(Event.parse(received.data))

        subscription = await self._connected.subscribe(topics.EVENTS.every(), on_message)
        await self._connected.require_subscriptions("a reader of events")
        return subscription

    @property
    def connected(self) -> bool:
        """Whether the client is connected to a NATS server now. While it is not, it keeps trying to reconnect."""
        return self._bus is not None and self._bus.connected

    async def _of_batch(
        self, topic: topics.Topic[BatchQuery, Reply], query: BatchQuery, read: Callable[[BatchStore], Awaitable[Reply]]
    ) -> Reply:
        """A coordinator's answer about a batch. Where no coordinator is there the store is read, which only operators may."""
        bus = self._connected
        models = [self._model] if self._model is not None else await self.models()
        for model in models:
            try:
                return await bus.request(topic.at(model), query, timeout_s=_BATCH_S)
            except NobodyListens:
                continue
        try:
            return await read(BatchStore(bus))
        except ServiceError as error:
            raise Unavailable(f"no coordinator answers, and the batches cannot be read without one: {error}") from None

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

    async def _kept_leases(self) -> list[bytes] | None:
        """The leases that JetStream keeps; None: it does not answer."""
        bucket = Bucket(self._connected, subjects.KV_SHARDS, ttl_s=subjects.LEASE_TTL_S)
        try:
            async with asyncio.timeout(_KEPT_S):
                return [entry.value or b"" for entry in await bucket.entries()]
        except (MeshError, TimeoutError):
            return None


def _batch_id(id: str) -> str:
    """BadRequest: no batch has such an id."""
    try:
        return BatchQuery(id=id).id
    except ValueError:
        raise BadRequest(f"id {id[:80]!r} is of no batch: it has letters, digits, - and _, at most 48", field="id") from None


async def _page(store: BatchStore, query: BatchQuery) -> BatchResults:
    total = (await store.status(query.id)).total
    following = query.offset + query.limit
    items = await store.results(query.id, offset=query.offset, limit=query.limit)
    return BatchResults(id=query.id, items=tuple(items), next=following if following < total else None)
