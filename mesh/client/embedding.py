"""The parts of `embed`: what is one input, all of them at once, and the vector of an answer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from mesh.client.results import Completion
from mesh.errors import BadRequest, ServiceError

__all__ = ["each_input", "together", "vector_in"]

T = TypeVar("T")


def each_input(inputs: str | Sequence[int] | Iterable[str | Sequence[int]]) -> list[str | Sequence[int]]:
    """The inputs, where one alone may stand for itself. BadRequest: there is none."""
    if isinstance(inputs, str):
        return [inputs]
    given: list[Any] = list(inputs)
    if not given:
        raise BadRequest("there is nothing to embed: give at least one text", field="inputs")
    return [given] if isinstance(given[0], int) else given


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all. The first error cancels the others and is raised."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def vector_in(completion: Completion) -> tuple[float, ...]:
    """The vector that was asked for. ServiceError: the answer has none, from a coordinator of another version."""
    if completion.embedding is None:
        raise ServiceError("the answer has no embedding: the coordinator is of another version")
    return completion.embedding
