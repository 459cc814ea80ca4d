"""OpenAI's API: models, chat completions, completions. mesh.gateway.openai_schema says which fields are supported.

Both kinds of completion are the same work: one generation for each prompt and choice. A Shape makes the documents from its chunks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import orjson
from fastapi import Depends
from starlette.requests import Request
from starlette.responses import Response

from mesh.client import Chunk, Completion
from mesh.client.openai_shapes import ChatShape, Shape, TextShape
from mesh.errors import BadRequest, MeshError, ModelNotFound
from mesh.gateway.auth import Caller
from mesh.gateway.context import Gateway, gateway_of
from mesh.gateway.errors import openai_document
from mesh.gateway.events import EventStream, event, until_gone
from mesh.gateway.generation import Bill, Cost, HttpGeneration, cost_of, paying
from mesh.gateway.guard import caller_of, guarded
from mesh.gateway.openai_schema import ChatCompletion, ChatRequest, Common, CompletionRequest, ModelCard, ModelList, TextCompletion
from mesh.gateway.resume import HEADER, Progress

__all__ = ["openai"]

openai = guarded("generate", tags=["openai"])

_DONE = b"data: [DONE]\n\n"
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
_COMPLETION_TOKENS = 16  # OpenAI's default for completions


@openai.post("/v1/chat/completions", response_model=ChatCompletion, responses=_STREAM)
async def chat_completions(body: ChatRequest, request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """The assistant's next message."""
    fields = {**body.turns(), **body.sampling()}
    if body.longest is not None:
        fields["max_tokens"] = body.longest
    if body.logprobs:
        fields["logprobs"] = body.top_logprobs or 0
    return await _answer(gateway, request, body, [fields], ChatShape)


@openai.post("/v1/completions", response_model=TextCompletion, responses=_STREAM)
async def completions(body: CompletionRequest, request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """The continuation of a text."""
    common = {"max_tokens": body.max_tokens or _COMPLETION_TOKENS, **body.sampling()}
    if body.logprobs is not None:
        common["logprobs"] = body.logprobs
    return await _answer(gateway, request, body, [{**prompt, **common} for prompt in body.prompts()], TextShape)


@openai.get("/v1/models", response_model=ModelList)
async def models(gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """The models that the mesh serves."""
    return _json({"object": "list", "data": [_card(known.name, known.first_seen_unix_s) for known in await gateway.models.all()]})


@openai.get("/v1/models/{model}", response_model=ModelCard)
async def model(model: str, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """One model."""
    for known in await gateway.models.all():
        if known.name == model:
            return _json(_card(known.name, known.first_seen_unix_s))
    raise ModelNotFound(f"no coordinator serves a model {model!r}")


@dataclass(slots=True)
class _Work:
    """The generations of one request, in the order of their choices. `choices`: of each prompt."""

    gateway: Gateway
    caller: Caller
    shape: Shape
    requests: list[dict[str, Any]]
    choices: int
    include_usage: bool
    progress: Progress

    @property
    def cost(self) -> Cost:
        return cost_of(self.requests, self.gateway.settings.limits, choices=self.choices)

    def generations(self, bill: Bill, progress: Progress | None = None) -> list[HttpGeneration]:
        return [
            HttpGeneration(self.gateway, bill, self.shape.model, request, progress, choice, prompt_counts=choice % self.choices == 0)
            for choice, request in enumerate(self.requests)
        ]

    async def complete(self) -> dict[str, Any]:
        with paying(self.caller, self.cost) as bill:
            completions = await _together([generation.complete() for generation in self.generations(bill)])
        self.shape.name(completions[0].request)
        return self.shape.whole(completions)

    async def events(self) -> AsyncGenerator[bytes, None]:
        shape, progress = self.shape, self.progress
        with paying(self.caller, self.cost) as bill:
            generations = self.generations(bill, progress)
            async with aclosing(_merged(generations) if len(generations) > 1 else _numbered(generations[0])) as chunks:
                async for index, chunk in chunks:
                    shape.name(generations[0].request)
                    shape.read_calls(index, generations[index].tool_parser)
                    completion = generations[index].completion if chunk.token is None else None
                    had = progress.has(index, chunk)
                    if had and completion is not None:  # only the reason is left
                        chunk = replace(chunk, text="")
                    documents = shape.part(index, chunk, None if completion is None else completion.finish_reason)
                    if had and completion is None:
                        continue
                    before = progress.id if completion is None else None
                    progress.take(index, chunk)
                    # A token's first document may be its choice's beginning: the client has the token with the last one.
                    ids = [before if completion is None and place < len(documents) - 1 else progress.id for place in range(len(documents))]
                    if documents:
                        yield b"".join(map(event, documents, ids))
            last = [_DONE]
            if self.include_usage:
                last.insert(0, event(shape.usage([g.completion for g in generations if g.completion is not None])))
            yield b"".join(last)


async def _answer(gateway: Gateway, request: Request, body: Common, prompts: list[dict[str, Any]], kind: type[Shape]) -> Response:
    limits = gateway.settings.limits
    count = (body.n or 1) * len(prompts)
    if count > limits.max_choices:
        what = "n" if len(prompts) == 1 else "n times the number of prompts"
        raise BadRequest(f"{what} is {count}: at most {limits.max_choices} choices are made at once", field="n")
    name = await gateway.models.resolve(body.model)
    requests = []
    for prompt in prompts:
        for choice in range(body.n or 1):
            seed = body.seed_of(choice)
            requests.append(prompt if seed is None else {**prompt, "seed": seed})
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    shape = kind(name, int(time.time()), choices=body.n or 1, usage_is_null=bool(body.stream and include_usage))
    caller = caller_of(request)
    progress = Progress(len(requests), request.headers.get(HEADER) if body.stream else None, owner=caller.owner)
    work = _Work(gateway, caller, shape, requests, body.n or 1, include_usage, progress)
    if body.stream:
        return EventStream(work.events(), lambda error: event(openai_document(error)), keep_alive_s=limits.keep_alive_s)
    return _json(await until_gone(request.receive, work.complete()))


async def _together(work: Sequence[Any]) -> list[Completion]:
    """The results of all. The first error cancels the others and is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _numbered(generation: HttpGeneration) -> AsyncGenerator[tuple[int, Chunk], None]:
    async with aclosing(generation.chunks()) as chunks:
        async for chunk in chunks:
            yield 0, chunk


async def _merged(generations: Sequence[HttpGeneration]) -> AsyncGenerator[tuple[int, Chunk], None]:
    """The chunks of all generations as they come. The first error cancels the others and is raised."""
    queue: asyncio.Queue[tuple[int, Chunk | MeshError | BaseException | None]] = asyncio.Queue(maxsize=64)

    async def pump(index: int) -> None:
        try:
            async with aclosing(generations[index].chunks()) as chunks:
                async for chunk in chunks:
                    await queue.put((index, chunk))
            await queue.put((index, None))
        except Exception as error:
            await queue.put((index, error))

    tasks = [asyncio.create_task(pump(index)) for index in range(len(generations))]
    try:
        left = len(tasks)
        while left:
            index, item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _card(name: str, created_unix_s: float) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created_unix_s), "owned_by": "stagemesh"}


def _json(document: Any) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")
