"""The client for programs without asyncio: it runs an AsyncMeshClient in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar, Unpack

from mesh.bus import BusOptions
from mesh.client.aio import AsyncMeshClient
from mesh.client.parsing import Form
from mesh.client.request import ChatArguments, EmbedArguments, GenerateArguments, RequestArguments
from mesh.client.results import BatchResult, Chunk, Completion, Embeddings, Health, MeshStatus, MeshUsage
from mesh.client.stream import Stream
from mesh.errors import MeshError, Unavailable
from mesh.protocol.batches import BatchStatus, DeadMessage
from mesh.protocol.status import ShardStats
from mesh.protocol.tokenizing import Tokenized

__all__ = ["MeshClient", "SyncStream"]

T = TypeVar("T")


class SyncStream:
    """The chunks of one generation: `for chunk in stream`. Afterwards `completion` is set. Leaving `with` early cancels it."""

    def __init__(self, client: MeshClient, stream: Stream) -> None:
        self._client = client
        self._stream = stream

    @property
    def completion(self) -> Completion | None:
        return self._stream.completion

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        chunk = self._client._run(self._next())
        if chunk is None:
            raise StopIteration
        return chunk

    def close(self) -> None:
        self._client._run(self._stream.aclose())

    def __enter__(self) -> SyncStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    async def _next(self) -> Chunk | None:
        try:
            return await anext(self._stream)
        except StopAsyncIteration:
            return None


class MeshClient:
    """A connection to a mesh. Any thread may use it.

        with MeshClient("nats://127.0.0.1:4222") as mesh:
            print(mesh.generate("What is rain?", max_tokens=50).text)

    Arguments and errors are those of AsyncMeshClient.
    """

    def __init__(
        self,
        servers: str | Sequence[str] = "nats://127.0.0.1:4222",
        *,
        model: str | None = None,
        timeout_s: float | None = None,
        retries: int = 5,
        stall_timeout_s: float = 60.0,
        options: BusOptions | None = None,
    ) -> None:
        self._client = AsyncMeshClient(
            servers, model=model, timeout_s=timeout_s, retries=retries, stall_timeout_s=stall_timeout_s, options=options
        )
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def connect(self) -> None:
        """Idempotent."""
        if self._loop is not None:
            return
        loop = self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, name="mesh-client", daemon=True)
        self._thread.start()
        try:
            self._run(self._client.connect())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        loop, self._loop = self._loop, None
        if loop is None or self._thread is None:
            return
        asyncio.run_coroutine_threadsafe(self._client.close(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        self._thread.join()
        loop.close()

    def __enter__(self) -> MeshClient:
        self.connect()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def stream(self, prompt: str | None = None, **request: Unpack[GenerateArguments]) -> SyncStream:
        return SyncStream(self, self._run(self._client.open_stream(prompt, **request)))

    def generate(self, prompt: str | None = None, **request: Unpack[GenerateArguments]) -> Completion:
        return self._run(self._client.generate(prompt, **request))

    def parse(self, form: type[Form], prompt: str | None = None, **request: Unpack[GenerateArguments]) -> Form:
        return self._run(self._client.parse(form, prompt, **request))

    def chat(self, messages: Iterable[Mapping[str, Any]], **request: Unpack[ChatArguments]) -> Completion:
        return self._run(self._client.chat(messages, **request))

    def batch(
        self, requests: Iterable[str | Mapping[str, Any]], *, concurrency: int = 8, **common: Unpack[GenerateArguments]
    ) -> list[Completion | MeshError]:
        return self._run(self._client.batch(requests, concurrency=concurrency, **common))

    def embed(
        self,
        inputs: str | Sequence[int] | Iterable[str | Sequence[int]],
        *,
        dimensions: int | None = None,
        normalize: bool = True,
        concurrency: int = 8,
        **common: Unpack[EmbedArguments],
    ) -> Embeddings:
        work = self._client.embed(inputs, dimensions=dimensions, normalize=normalize, concurrency=concurrency, **common)
        return self._run(work)

    def tokenize(self, prompt: str | None = None, *, model: str | None = None, **request: Any) -> Tokenized:
        return self._run(self._client.tokenize(prompt, model=model, **request))

    def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        return self._run(self._client.detokenize(tokens, model=model))

    def submit_batch(
        self,
        requests: Iterable[str | Mapping[str, Any]],
        *,
        id: str | None = None,
        model: str | None = None,
        **common: Unpack[RequestArguments],
    ) -> BatchStatus:
        return self._run(self._client.submit_batch(requests, id=id, model=model, **common))

    def batch_status(self, id: str) -> BatchStatus:
        return self._run(self._client.batch_status(id))

    def batches(self) -> list[BatchStatus]:
        return self._run(self._client.batches())

    def cancel_batch(self, id: str) -> BatchStatus:
        return self._run(self._client.cancel_batch(id))

    def batch_results(self, id: str, *, offset: int = 0, limit: int | None = None) -> list[BatchResult]:
        return self._run(self._client.batch_results(id, offset=offset, limit=limit))

    def wait_batch(self, id: str, *, timeout_s: float | None = None) -> BatchStatus:
        return self._run(self._client.wait_batch(id, timeout_s=timeout_s))

    def dead_messages(self, *, last: int = 100) -> list[DeadMessage]:
        return self._run(self._client.dead_messages(last=last))

    def models(self) -> list[str]:
        return self._run(self._client.models())

    def status(self) -> MeshStatus:
        return self._run(self._client.status())

    def health(self, model: str | None = None) -> Health:
        return self._run(self._client.health(model))

    def shard_stats(self) -> list[ShardStats]:
        return self._run(self._client.shard_stats())

    def usage(self, subject: str | None = None) -> MeshUsage:
        return self._run(self._client.usage(subject))

    def trace(self, session: str, *, model: str | None = None) -> dict[str, Any] | None:
        return self._run(self._client.trace(session, model=model))

    def inspect(self, request: str, *, model: str | None = None) -> dict[str, Any] | None:
        return self._run(self._client.inspect(request, model=model))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` in the client's thread and return its result. An interruption (Ctrl-C) cancels it there too."""
        if self._loop is None:
            work.close()
            raise Unavailable("not connected: use `with MeshClient(...)`, or call connect() first")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
