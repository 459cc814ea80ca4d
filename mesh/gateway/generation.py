"""A generation for an HTTP request: its tokens count against the caller's limits, and it is cancelled when the client leaves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any

import orjson

from mesh.client import Chunk, Completion
from mesh.errors import BadRequest, Busy, Cancelled, PromptTooLong
from mesh.gateway.auth import Caller
from mesh.gateway.context import Gateway
from mesh.gateway.resume import Progress
from mesh.gateway.settings import Limits
from mesh.gateway.tracing import keep
from mesh.protocol.tools import ToolParser
from mesh.telemetry.log_context import note

log = logging.getLogger("mesh.http")

__all__ = ["ONE_REQUEST", "Bill", "Cost", "HttpGeneration", "check_length", "cost_of", "patiently", "paying"]

_CHARACTERS_A_TOKEN = 4


class Bill:
    """The tokens that a request has used so far. cache_salt: of its caller."""

    def __init__(self, cache_salt: str | None) -> None:
        self.cache_salt = cache_salt
        self.prompt_tokens = 0
        self.completion_tokens = 0

    @property
    def used(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call may take: its requests; the tokens that it may generate, and those of prompts that are given as ids; and a guess at the
    tokens of prompts that are texts."""

    requests: int
    tokens: int
    prompt: int


ONE_REQUEST = Cost(1, 0, 0)
"""Of a call that generates nothing."""


def cost_of(requests: Iterable[Mapping[str, Any]], limits: Limits, *, default: int | None = None, choices: int = 1) -> Cost:
    """The cost of a call of these requests, as mesh.client takes them. `default`: tokens where a request gives no max_tokens; None: those
    of `limits`. `choices`: so many requests in a row have the same prompt, which counts once."""
    count = tokens = characters = 0
    for fields in requests:
        count += 1
        tokens += fields.get("max_tokens") or default or limits.default_max_tokens
        if (count - 1) % choices:
            continue
        tokens += len(fields.get("tokens") or ())
        characters += len(fields.get("prompt") or "") + sum(map(_characters, fields.get("messages") or ()))
        characters += sum(len(orjson.dumps(tool)) for tool in fields.get("tools") or ())
    return Cost(count, tokens, characters // _CHARACTERS_A_TOKEN)


@contextmanager
def paying(caller: Caller, cost: Cost, *, at_once: int | None = None) -> Iterator[Bill]:
    """Set aside what a call may cost; Busy or BadRequest where its token has not so much. Afterwards what it did not use is given back.
    `at_once`: how many of its generations run at the same time; None: all of them."""
    with caller.session(cost.requests if at_once is None else at_once):
        charged = caller.charge(cost.tokens, requests=cost.requests, prompt=cost.prompt)
        bill = Bill(caller.cache_salt)
        try:
            yield bill
        finally:
            caller.settle(charged, bill.used)
            caller.used(cost.requests, bill.prompt_tokens, bill.completion_tokens)


class HttpGeneration:
    """`fields` are those of mesh.protocol.generation.Generate. Without max_tokens, the gateway's default holds, or what the context
    leaves if that is less.

    `progress`, `choice`: the generation is a choice of a stream that may be resumed (resume.py). Its chunks come from the first one on.
    `prompt_counts`: whether its prompt is on the bill; it is there once, for all choices.
    Iterate over `chunks`. The last chunk has no token; when it comes, `completion` is set. Closing the iterator early cancels the
    generation. `request`: the name of the generation in the mesh, once it has begun.
    """

    def __init__(
        self,
        gateway: Gateway,
        bill: Bill,
        model: str,
        fields: Mapping[str, Any],
        progress: Progress | None = None,
        choice: int = 0,
        *,
        prompt_counts: bool = True,
    ) -> None:
        self._prompt_counts = prompt_counts
        self._gateway = gateway
        self._bill = bill
        self._model = model
        self._fields = {**fields, "cache_salt": bill.cache_salt}
        self._had = 0
        self._may_return = progress is not None
        if progress is not None:
            self._fields = {"seed": progress.seed(choice), **self._fields, "session": progress.session(choice)}
            self._had = progress.had(choice)
        self._given = fields.get("max_tokens") is not None
        if not self._given:
            self._fields["max_tokens"] = gateway.settings.limits.default_max_tokens
        check_length(self._fields, gateway.settings.limits, gateway.models.max_prompt_characters(model))
        self.request = ""
        self.completion: Completion | None = None
        self.tool_parser: ToolParser | None = None
        """Reads calls in the chunks' texts; there with the first chunk, where tools were offered."""

    @property
    def max_tokens(self) -> int:
        return int(self._fields["max_tokens"])

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        try:
            async with aclosing(self._stream()) as stream:
                async for chunk in stream:
                    yield chunk
        except PromptTooLong as error:
            left = None if self._given else await self._left(error)
            if left is None or left >= self.max_tokens:
                raise
            self._fields["max_tokens"] = left
            if self._may_return:  # another max_tokens is another request
                self._fields["session"] += "-fit"
            async with aclosing(self._stream()) as stream:
                async for chunk in stream:
                    yield chunk

    async def complete(self) -> Completion:
        async with aclosing(self.chunks()) as chunks:
            async for _ in chunks:
                pass
        if self.completion is None:
            raise Cancelled("the generation ended without an answer")
        return self.completion

    async def _stream(self) -> AsyncGenerator[Chunk, None]:
        given = 0
        limits = self._gateway.settings.limits
        stream = self._gateway.client.stream(model=self._model, timeout_s=limits.request_timeout_s, **self._fields)
        self.request = stream.request
        note(request=stream.request)
        log.debug("generating with %s", self._model)
        try:
            async for chunk in stream:
                if self.tool_parser is None:
                    self.tool_parser = stream.tool_parser()
                if chunk.token is not None:
                    given += 1
                else:
                    self.completion = stream.completion
                yield chunk
        finally:
            await stream.aclose(may_return=self._may_return)
            completion = stream.completion
            keep(None if completion is None else completion.trace)
            prompt = 0
            if completion is not None:
                prompt, given = completion.usage.prompt_tokens, completion.usage.completion_tokens
            elif given:  # it was broken off, but the prompt was computed
                prompt = cost_of([self._fields], limits).prompt + len(self._fields.get("tokens") or ())
            self._bill.prompt_tokens += prompt if self._prompt_counts else 0
            self._bill.completion_tokens += max(given - self._had, 0)

    async def _left(self, error: PromptTooLong) -> int | None:
        """How many tokens the context leaves after the prompt. None: it leaves none, or it is not known."""
        context = await self._gateway.models.context(self._model)
        return context - error.tokens if context is not None and context > error.tokens else None


async def patiently(gateway: Gateway, bill: Bill, model: str, fields: Mapping[str, Any]) -> Completion:
    """One generation of a call that has many. It waits where a single request would get the error that the mesh is busy."""
    until = time.monotonic() + gateway.settings.limits.request_timeout_s
    while True:
        try:
            return await HttpGeneration(gateway, bill, model, fields).complete()
        except Busy as error:
            if time.monotonic() + error.retry_after_s >= until:
                raise
            await asyncio.sleep(error.retry_after_s)


def _characters(message: Mapping[str, Any]) -> int:
    return len(message["content"]) + sum(len(call["function"]["arguments"]) for call in message.get("tool_calls") or ())


def check_length(fields: Mapping[str, Any], limits: Limits, most_characters: int | None) -> None:
    """Refuse a prompt with more characters than a coordinator should tokenize. The coordinator itself checks the context, in tokens.
    PromptTooLong: the prompt has more than `most_characters`, which is the most that can fit."""
    for name in ("prompt", "messages", "tokens"):
        value = fields.get(name)
        if value is None:
            continue
        size = sum(map(_characters, value)) if name == "messages" else len(value)
        if size > limits.max_prompt_chars:
            unit = "ids" if name == "tokens" else "characters"
            raise BadRequest(f"{name} has {size:,} {unit}: at most {limits.max_prompt_chars:,} are taken", field=name)
        if most_characters is not None and name != "tokens" and size > most_characters:
            raise PromptTooLong(
                f"{name} has {size:,} characters: no prompt of more than {most_characters:,} fits the model's context: shorten it",
                tokens=size,
                limit=most_characters,
            )
