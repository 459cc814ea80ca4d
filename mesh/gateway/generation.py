"""A generation that an HTTP request asked for: paid for by its caller, ended with its client."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any

from mesh.client import Chunk, Completion
from mesh.errors import BadRequest, Cancelled, PromptTooLong
from mesh.gateway.auth import Caller
from mesh.gateway.context import Gateway
from mesh.gateway.resume import Progress
from mesh.gateway.settings import Limits

__all__ = ["Bill", "Generation", "check_length", "paying"]


class Bill:
    """Tokens a request has used so far."""

    used = 0


@contextmanager
def paying(caller: Caller, tokens: int, *, requests: int = 1) -> Iterator[Bill]:
    """Set `tokens` aside for a request, Busy where its token has none left; afterwards what it did not use is given back."""
    charged = caller.charge(tokens, requests=requests)
    bill = Bill()
    try:
        yield bill
    finally:
        caller.settle(charged, bill.used)


class Generation:
    """`fields` are those of mesh.protocol.generation.Generate; without max_tokens it is the gateway's default, or what the context leaves.

    `progress`, `choice`: the generation is a choice of a stream that may be resumed (resume.py). Its chunks come from the first one on.
    Iterate over `chunks`; with the last one, which has no token, `completion` is set. Closing the iterator early cancels the
    generation. `request`: its name in the mesh, once it has begun.
    """

    def __init__(
        self, gateway: Gateway, bill: Bill, model: str, fields: Mapping[str, Any], progress: Progress | None = None, choice: int = 0
    ) -> None:
        self._gateway = gateway
        self._bill = bill
        self._model = model
        self._fields = dict(fields)
        self._had = 0
        self._may_return = progress is not None
        if progress is not None:
            self._fields = {"seed": progress.seed(choice), **self._fields, "session": progress.session(choice)}
            self._had = progress.had(choice)
        self._given = fields.get("max_tokens") is not None
        if not self._given:
            self._fields["max_tokens"] = gateway.settings.limits.default_max_tokens
        check_length(self._fields, gateway.settings.limits)
        self.request = ""
        self.completion: Completion | None = None

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
        try:
            async for chunk in stream:
                if chunk.token is not None:
                    given += 1
                else:
                    self.completion = stream.completion
                yield chunk
        finally:
            await stream.aclose(may_return=self._may_return)
            completion = stream.completion
            used = given if completion is None else completion.usage.total_tokens
            self._bill.used += max(used - self._had, 0)

    async def _left(self, error: PromptTooLong) -> int | None:
        """How many tokens the context leaves after the prompt; None: none."""
        context = await self._gateway.models.context(self._model)
        return context - error.tokens if context is not None and context > error.tokens else None


def check_length(fields: Mapping[str, Any], limits: Limits) -> None:
    """A bound on what the coordinators are given to tokenize; the context, in tokens, is theirs to check."""
    for name in ("prompt", "messages", "tokens"):
        value = fields.get(name)
        if value is None:
            continue
        size = sum(len(message["content"]) for message in value) if name == "messages" else len(value)
        if size > limits.max_prompt_chars:
            unit = "ids" if name == "tokens" else "characters"
            raise BadRequest(f"{name} has {size:,} {unit}: at most {limits.max_prompt_chars:,} are taken", field=name)
