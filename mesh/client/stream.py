"""One generation request: it is sent, sent again where needed, and its answers are put in order.

A request has a name and a seed of its own, so sending it again is harmless: every coordinator draws the same tokens, and the index of a
token shows whether it was delivered before. The request is sent again

- when no coordinator listened, or the mesh was busy (after the time that the error names),
- when no message came for a while,
- when a token is missing,
- after an error that says it can be retried.

A repeated request carries the tokens that have arrived. The coordinator that has the session, or takes it over, goes on after them.

A wait for layers that no shard serves is the coordinators' alone (`failover_timeout`). After an error that ends such a wait, the request
is not sent again. A request that is sent again during a wait says how long it has lasted, so that another coordinator continues it.

A coordinator that lost the session to another one may still send documents. They have a lower epoch and are ignored.

The session is the proof that the generation is this stream's own. It goes to coordinators alone; documents and errors name the request
by its public id. What does not name this request is not read, whoever sent it to this stream's inbox.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType

from mesh.bus import Bus, Received, Subscription
from mesh.bus.connection import ERROR_HEADER, raise_error
from mesh.client.results import Chunk, Completion
from mesh.errors import Busy, DeadlineExceeded, MeshError, MessageRejected, PayloadTooLarge, ServiceError, Unavailable
from mesh.protocol import topics
from mesh.protocol.generation import Cancel, Generate, public_id
from mesh.protocol.headers import EPOCH_HEADER, REQUEST_HEADER, SESSION_HEADER
from mesh.protocol.stream import Accepted, Finished, Token, TokenDocument, Waiting, parse
from mesh.protocol.tools import FORMATS, ToolParser, joined

__all__ = ["Retry", "Stream"]

_FIRST_BACKOFF_S = 0.1
_LONGEST_BACKOFF_S = 5.0
_SILENCE_S = 2.0  # between tokens
_WAITING_SILENCE_S = 4.0  # before the first one: a request in the queue gets a Waiting document every 3 s
_LONGEST_SILENCE_S = 4.0  # the last try may have gone to a coordinator that is suspended: NATS still counts it as a member


class Retry:
    """When a request is sent again. attempts: how often at most after errors, counted from the last token. stall_s: how long no message
    may arrive in spite of the attempts. busy: whether the request is sent again after Busy; otherwise the caller gets the error."""

    def __init__(self, attempts: int = 5, stall_s: float = 60.0, *, busy: bool = True) -> None:
        self.busy = busy
        self.attempts = attempts
        self.stall_s = stall_s
        self.sent_again = 0  # over all requests


class _NobodyError(Unavailable):
    """The NATS server said that no coordinator listens."""


class Stream:
    """The chunks of one generation, in order, each once: `async for chunk in stream`. Afterwards `completion` is set.

    Closing the stream before its end cancels the generation: use `async with`, or call `aclose`.
    `on_waiting` is called with each Waiting document: the request waits for a row, or for layers that no shard serves.
    Errors: those of the coordinator, Unavailable, Busy, DeadlineExceeded (`timeout_s`, the limit of the whole request).
    """

    def __init__(
        self,
        bus: Bus,
        model: str,
        message: Generate,
        *,
        timeout_s: float | None,
        retry: Retry,
        on_waiting: Callable[[Waiting], None] | None = None,
    ) -> None:
        seed = secrets.randbits(62) if message.seed is None else message.seed
        session = message.session or secrets.token_hex(16)
        self._named = message.session is not None  # perhaps others ask for it too
        self._message = message.model_copy(update={"seed": seed, "session": session, "stream": True})
        self.session = session
        """The name of the generation, by which its owner goes on with it, cancels it and asks for its trace."""
        self.request = public_id(session)
        """The name under which others see the request."""
        self.foreign = 0
        """Messages that came to this stream's inbox and were not about its request."""
        self._bus = bus
        self._model = model
        self._retry = retry
        self._on_waiting = on_waiting
        self._waits_since: float | None = None  # for layers that no shard serves
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._timeout_s = timeout_s
        self._inbox: asyncio.Queue[Received] = asyncio.Queue()  # bounded by the request's max_tokens
        self._subscription: Subscription | None = None
        self._subject = ""
        self._cancel: topics.Address[Cancel, None] | None = None
        self._tool_format: str | None = None
        self._given: list[Token] = []
        self._pieces: list[str] = []  # the text delivered
        self._epoch = 0
        self._asked = 0  # how often the request was sent
        self._tries = 0  # how often it was sent since the last token
        self._errors = 0  # since the last token
        self._began = False
        self._heard_at = time.monotonic()
        self._ready: deque[Chunk] = deque()
        self.completion: Completion | None = None

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Chunk:
        if self._ready:
            return self._ready.popleft()
        if self.completion is not None:
            raise StopAsyncIteration
        try:
            if self._subscription is None:
                self._heard_at = time.monotonic()
                await self._ask()
            while not self._ready:
                try:
                    received = await self._receive()
                    if received is None:
                        await self._ask()
                    else:
                        await self._read(received)
                except MeshError as error:
                    await self._again(error)
            return self._ready.popleft()
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self, *, may_return: bool = False) -> None:
        """Close the stream. A generation that is not finished is cancelled. `may_return`: what was generated is kept for a while, so that a
        stream of the same request and `session` goes on from there. Idempotent."""
        subscription, self._subscription = self._subscription, None
        if subscription is None:
            return
        if self.completion is None and self._cancel is not None and self._bus.connected:
            await self._bus.send(self._cancel, Cancel(request=self.session, gone=may_return))
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
        attempt = self._asked if self._asked or not self._named else None
        self._asked += 1
        waited_s = 0.0 if self._waits_since is None else time.monotonic() - self._waits_since
        update = {"attempt": attempt, "given": tuple(token.id for token in self._given), "epoch": self._epoch or None, "waited_s": waited_s}
        message = self._message.model_copy(update=update)
        headers = {SESSION_HEADER: self.session}
        try:
            await self._bus.send(topics.GENERATE.at(self._model), message, reply=self._subject, headers=headers)
        except PayloadTooLarge:
            if not self._given:
                raise
            # Without the tokens that have come: they come again, and their indexes say so.
            message = message.model_copy(update={"given": ()})
            await self._bus.send(topics.GENERATE.at(self._model), message, reply=self._subject, headers=headers)

    async def _receive(self) -> Received | None:
        """The next message. None: there was none for so long that the request should be sent again."""
        silence_s = min((_SILENCE_S if self._given else _WAITING_SILENCE_S) * 2**self._tries, _LONGEST_SILENCE_S)
        left_s = self._heard_at + self._retry.stall_s - time.monotonic()
        if self._deadline is not None:
            left_s = min(left_s, self._deadline - time.monotonic())
        try:
            async with asyncio.timeout(max(min(silence_s, left_s), 0)):
                return await self._inbox.get()
        except TimeoutError:
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise DeadlineExceeded(f"{self._model} did not finish within {self._timeout_s:g} s") from None
            if self._stalled:
                raise Unavailable(f"nothing was heard of {self._model} for {self._retry.stall_s:g} s: see `mesh status`") from None
            self._tries += 1
            return None

    async def _read(self, received: Received) -> None:
        """Take what is new in a message. Raises the error that it carries."""
        if received.headers.get("Status") == "503":
            raise _NobodyError(f"no coordinator serves {self._model}: start one, or see `mesh status`")
        now = time.perf_counter()
        if ERROR_HEADER in received.headers:
            if received.headers.get(REQUEST_HEADER) != self.request:
                self.foreign += 1
                return
            if int(received.headers.get(EPOCH_HEADER, self._epoch)) >= self._epoch:
                raise_error(received)
            return
        try:
            document = parse(received.data)
        except MessageRejected:
            self.foreign += 1
            return
        if document.id != self.request:
            self.foreign += 1
            return
        epoch = self._epoch if document.epoch is None else document.epoch
        if epoch < self._epoch:
            return
        self._epoch = epoch
        self._heard_at, self._began = time.monotonic(), True
        match document:
            case TokenDocument():
                if document.position == len(self._given):
                    self._give(document.text, document.token, now)
                elif document.position > len(self._given):  # one was lost on the way
                    await self._ask()
            case Accepted():
                self._cancel = topics.CANCEL.read(document.cancel)
                self._tool_format = document.tool_format
            case Waiting():
                self._waits_since = self._heard_at - document.waited_s if document.missing else None
                if self._on_waiting is not None:
                    self._on_waiting(document)
            case Finished():
                self._finish(document, now)

    def _finish(self, document: Finished, now: float) -> None:
        """Deliver what did not come before: the last document has the whole answer, except for parts that came before and are left out."""
        answer = document.answer
        if answer.omitted:
            if len(self._given) < answer.usage.completion_tokens:
                raise Unavailable("some tokens of the answer were lost on the way")
            answer = replace(
                answer,
                tokens=tuple(token.id for token in self._given),
                text="".join(self._pieces) + document.rest if "text" in answer.omitted else answer.text,
                logprobs=tuple(self._given) if "logprobs" in answer.omitted else answer.logprobs,
                omitted=(),
            )
            parser = self.tool_parser()
            if parser is not None and answer.text is not None:
                content, calls = joined(parser.read(answer.text, end=True))
                answer = replace(answer, content=content, tool_calls=calls)
        completion = Completion.of(answer, self.session)
        tokens = completion.logprobs or tuple(Token(id) for id in completion.tokens)
        for token in tokens[len(self._given) :]:
            self._give("", token, now)
        rest = document.rest if completion.text is None else completion.text[len("".join(self._pieces)) :]
        self._ready.append(Chunk(rest, None, len(self._given), now))
        self.completion = completion

    def tool_parser(self) -> ToolParser | None:
        """What reads calls of tools in the chunks' texts. None: none were offered, or it is not known yet how they are written."""
        form = FORMATS.get(self._tool_format or "")
        return None if form is None else ToolParser(form, [tool.function.name for tool in self._message.tools], self.request)

    def _give(self, text: str, token: Token, now: float) -> None:
        self._ready.append(Chunk(text, token, len(self._given), now))
        self._given.append(token)
        self._errors = self._tries = 0
        self._waits_since = None
        self._pieces.append(text)

    async def _again(self, error: MeshError) -> None:
        """Wait and send the request again after an error that allows it. Any other error is raised."""
        if not isinstance(error, ServiceError) or not error.retryable or self._stalled:
            raise error
        if isinstance(error, Busy) and not self._retry.busy:
            raise error
        if isinstance(error, Unavailable) and error.waited_s is not None:
            raise error
        if not (self._began and isinstance(error, _NobodyError)):  # another coordinator will replace the one that answered
            if self._errors >= self._retry.attempts:
                raise error
            self._errors += 1
        wait_s = error.retry_after_s if isinstance(error, Busy) else min(_FIRST_BACKOFF_S * 2**self._tries, _LONGEST_BACKOFF_S)
        self._tries += 1
        if self._deadline is not None and time.monotonic() + wait_s >= self._deadline:
            raise error
        await asyncio.sleep(wait_s)
        self._retry.sent_again += 1
        await self._ask()

    @property
    def _stalled(self) -> bool:
        return time.monotonic() - self._heard_at >= self._retry.stall_s
