"""One request on its way: asking, asking again, putting the answers in order.

A request has a name and a seed of its own, so that asking again is harmless: whoever answers draws the same tokens, and what
was told already is known by its index. Asked again is when nobody listened, when the mesh was busy (after the time it named), when
the answer stopped coming, and after an error that says it can be retried.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from types import TracebackType
from typing import Any

import orjson

from mesh import messages, subjects
from mesh.bus import Bus, Received, Subscription
from mesh.bus.connection import raise_error
from mesh.client.results import Chunk, Completion, token_of
from mesh.errors import Busy, DeadlineExceeded, MeshError, ServiceError, Unavailable

__all__ = ["Retry", "Stream"]

_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 5.0


class Retry:
    """attempts: how often a request is asked again at most. stall_s: how long an answer may stand still before that. busy: whether
    that is done for a mesh that was full, or left to the caller."""

    def __init__(self, attempts: int = 3, stall_s: float = 60.0, *, busy: bool = True) -> None:
        self.busy = busy
        self.attempts = attempts
        self.stall_s = stall_s


class Stream:
    """Chunks of one generation, in order, each once: `async for chunk in stream`. Afterwards `completion` is set.

    Leaving the loop early cancels the generation when the stream is closed: use it as `async with`, or call `aclose`.
    Errors: those of the coordinator, Unavailable, Busy, DeadlineExceeded (`timeout_s`, of the whole request).
    """

    def __init__(self, bus: Bus, model: str, message: messages.Generate, *, timeout_s: float | None, retry: Retry) -> None:
        seed = secrets.randbits(62) if message.seed is None else message.seed
        session = message.session or secrets.token_hex(12)
        self._message = message.model_copy(update={"seed": seed, "session": session, "stream": True})
        self._bus = bus
        self._model = model
        self._retry = retry
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._inbox: asyncio.Queue[Received] = asyncio.Queue()  # bounded by the request's own max_tokens
        self._subscription: Subscription | None = None
        self._subject = ""
        self._cancel_subject: str | None = None
        self._next = 0
        self._attempts = 0
        self.completion: Completion | None = None

    @property
    def request(self) -> str:
        """The name of the request."""
        assert self._message.session is not None
        return self._message.session

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Chunk:
        if self.completion is not None:
            raise StopAsyncIteration
        try:
            if self._subscription is None:
                await self._ask()
            while True:
                try:
                    chunk = self._read(await self._receive())
                except MeshError as error:
                    await self._again(error)
                    continue
                if chunk is not None:
                    return chunk
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        """End it; a generation that is not finished is cancelled. Idempotent."""
        subscription, self._subscription = self._subscription, None
        if subscription is None:
            return
        if self.completion is None and self._cancel_subject is not None and self._bus.connected:
            await self._bus.send(self._cancel_subject, messages.Cancel(request=self.request))
        await subscription.stop()

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.aclose()

    # -- inside --------------------------------------------------------------------------------------------------------

    async def _ask(self) -> None:
        if self._subscription is None:
            self._subject = self._bus.new_inbox()
            self._subscription = await self._bus.subscribe(self._subject, self._inbox.put)
        await self._bus.publish(subjects.generate(self._model), self._message.to_bytes(), reply=self._subject)

    async def _receive(self) -> Received:
        wait_s = self._retry.stall_s
        if self._deadline is not None:
            wait_s = min(wait_s, max(self._deadline - time.monotonic(), 0))
        try:
            async with asyncio.timeout(wait_s):
                return await self._inbox.get()
        except TimeoutError:
            self._check_deadline()
            raise Unavailable(f"the answer of {self._model} stopped coming for {self._retry.stall_s:g} s") from None

    def _read(self, received: Received) -> Chunk | None:
        """The chunk of a message, None where it says nothing new; its error, raised."""
        if received.headers.get("Status") == "503":
            raise Unavailable(f"no coordinator serves {self._model}: start one, or see `mesh status`")
        raise_error(received)
        document: dict[str, Any] = orjson.loads(received.data)
        now = time.perf_counter()
        if document["done"]:
            self.completion = Completion.of(document)
            # what of the text the chunks did not bring: where the documents of a second answer were skipped, more than the rest
            return Chunk(document.get("rest") or "", None, self._next, now)
        if "cancel" in document:
            self._cancel_subject = document["cancel"]
            return None
        if "waiting" in document:
            return None
        if document["index"] != self._next:  # told before
            return None
        self._next += 1
        return Chunk(document["text"], token_of(document), document["index"], now)

    async def _again(self, error: MeshError) -> None:
        """Wait and ask again after an error that allows it; raise it otherwise."""
        if not isinstance(error, ServiceError) or not error.retryable or self._attempts >= self._retry.attempts:
            raise error
        if isinstance(error, Busy) and not self._retry.busy:
            raise error
        wait_s = error.retry_after_s if isinstance(error, Busy) else min(_FIRST_BACKOFF_S * 2**self._attempts, _LONGEST_BACKOFF_S)
        self._attempts += 1
        if self._deadline is not None and time.monotonic() + wait_s >= self._deadline:
            raise error
        await asyncio.sleep(wait_s)
        while not self._inbox.empty():  # what the first answer still said
            self._inbox.get_nowait()
        await self._ask()

    def _check_deadline(self) -> None:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise DeadlineExceeded(f"{self._model} did not finish within {self._timeout_s:g} s")
