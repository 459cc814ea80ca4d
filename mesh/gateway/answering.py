"""A request of any of the HTTP APIs is answered: its generations run, and a Shape makes the API's documents from their chunks.

All APIs are the same work: one generation for each prompt and choice, paid for together, whole or as a stream that can be resumed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from mesh.client import Chunk, Completion
from mesh.client.embedding import together
from mesh.client.shapes import Shape
from mesh.errors import MeshError
from mesh.gateway.auth import Caller
from mesh.gateway.context import Gateway
from mesh.gateway.events import EventStream, until_gone
from mesh.gateway.generation import Bill, Cost, HttpGeneration, cost_of, paying
from mesh.gateway.guard import caller_of
from mesh.gateway.resume import HEADER, Progress

__all__ = ["Answering", "answer", "json_response", "nothing"]


async def nothing(*_: object) -> None:
    """What a request does beside generating, where that is nothing."""


@dataclass(frozen=True)
class Answering:
    """The generations of one request, in the order of their choices. `choices`: of each prompt. encode: makes an event of a document, and
    of the id with which the client may ask for what comes after it. closing: the last event. begin: is done before the first generation
    begins, ended: with a generation's answer, before its last document is sent."""

    model: str
    shape: Shape
    requests: list[dict[str, Any]]
    encode: Callable[[dict[str, Any], str | None], bytes]
    failed: Callable[[MeshError], bytes]
    closing: bytes = b""
    choices: int = 1
    begin: Callable[[], Awaitable[None]] = nothing
    ended: Callable[[Completion], Awaitable[None]] = nothing


async def answer(gateway: Gateway, request: Request, work: Answering, *, stream: bool) -> Response:
    """The response to a request, whole or as a stream of events."""
    caller, limits = caller_of(request), gateway.settings.limits
    progress = Progress(len(work.requests), request.headers.get(HEADER) if stream else None, owner=caller.owner)
    running = _Running(gateway, caller, work, progress)
    if stream:
        return EventStream(running.events(), work.failed, keep_alive_s=limits.keep_alive_s)
    return json_response(await until_gone(request.receive, running.complete()))


def json_response(document: Any) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")


@dataclass(slots=True)
class _Running:
    gateway: Gateway
    caller: Caller
    work: Answering
    progress: Progress

    @property
    def cost(self) -> Cost:
        return cost_of(self.work.requests, self.gateway.settings.limits, choices=self.work.choices)

    def generations(self, bill: Bill, progress: Progress | None = None) -> list[HttpGeneration]:
        work = self.work
        return [
            HttpGeneration(self.gateway, bill, work.model, fields, progress, choice, prompt_counts=choice % work.choices == 0)
            for choice, fields in enumerate(work.requests)
        ]

    async def complete(self) -> dict[str, Any]:
        work = self.work
        with paying(self.caller, self.cost) as bill:
            generations = self.generations(bill)
            await work.begin()
            completions = await together([generation.complete() for generation in generations])
            work.shape.name(completions[0].request)
            document = work.shape.whole(completions)
            for completion in completions:
                await work.ended(completion)
        return document

    async def events(self) -> AsyncGenerator[bytes, None]:
        work, shape, progress = self.work, self.work.shape, self.progress
        with paying(self.caller, self.cost) as bill:
            generations = self.generations(bill, progress)
            await work.begin()
            async with aclosing(_merged(generations) if len(generations) > 1 else _numbered(generations[0])) as chunks:
                async for index, chunk in chunks:
                    shape.name(generations[0].request)
                    shape.read_calls(index, generations[index].tool_parser)
                    completion = generations[index].completion if chunk.token is None else None
                    had = progress.has(index, chunk)
                    if had and completion is not None:  # only the reason is left
                        chunk = replace(chunk, text="")
                    documents = shape.part(index, chunk, completion)
                    if had and completion is None:
                        continue
                    if completion is not None:
                        await work.ended(completion)
                    before = progress.id if completion is None else None
                    progress.take(index, chunk)
                    # A token's first document may be its choice's beginning: the client has the token with the last one.
                    ids = [before if completion is None and place < len(documents) - 1 else progress.id for place in range(len(documents))]
                    if documents:
                        yield b"".join(map(work.encode, documents, ids))
            last = shape.end([g.completion for g in generations if g.completion is not None])
            if last or work.closing:
                yield b"".join([*(work.encode(document, None) for document in last), work.closing])


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
