"""OpenAI's embeddings: one generation without tokens for each input."""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import orjson
from fastapi import Depends
from starlette.requests import Request
from starlette.responses import Response

from mesh.client import Usage
from mesh.client.embedding import together, vector_in
from mesh.errors import BadRequest, PromptTooLong
from mesh.gateway.answering import json_response
from mesh.gateway.context import Gateway, gateway_of
from mesh.gateway.events import until_gone
from mesh.gateway.generation import check_length, cost_of, patiently, paying
from mesh.gateway.guard import caller_of, guarded
from mesh.gateway.openai_schema import EmbeddingList, EmbeddingRequest

__all__ = ["embeddings"]

embeddings = guarded("generate", tags=["openai"])

_MOST_NUMBERS = 4 * 1024 * 1024
"""Of one answer: 2,048 vectors of 2,048 numbers. They are some 80 MiB of JSON."""


@embeddings.post("/v1/embeddings", response_model=EmbeddingList)
async def create(body: EmbeddingRequest, request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """A vector for each input."""
    model, limits, caller = await gateway.models.resolve(body.model), gateway.settings.limits, caller_of(request)
    inputs = body.inputs()
    for index, fields in enumerate(inputs):
        with _about(index, len(inputs)):
            check_length(fields, limits, gateway.models.max_prompt_characters(model))
    at_once = min(len(inputs), limits.batch_concurrency, caller.quota.concurrent_sessions or limits.batch_concurrency)
    gate = asyncio.Semaphore(at_once)
    with paying(caller, cost_of(inputs, limits), at_once=at_once) as bill:

        async def one(index: int, fields: dict[str, Any]) -> tuple[orjson.Fragment, Usage]:
            async with gate:
                with _about(index, len(inputs)):
                    completion = await patiently(gateway, bill, model, fields)
            vector = vector_in(completion)
            _require_few(len(inputs), len(vector))
            return _encoded(vector, body.encoding_format), completion.usage

        vectors = await until_gone(request.receive, together([one(index, fields) for index, fields in enumerate(inputs)]))
    return json_response(_document(model, vectors))


@contextmanager
def _about(index: int, inputs: int) -> Iterator[None]:
    """An error about a prompt names the input that it was."""
    try:
        yield
    except (BadRequest, PromptTooLong) as error:
        if isinstance(error, BadRequest) and error.field not in ("prompt", "tokens"):
            raise
        raise BadRequest(str(error), field="input" if inputs == 1 else f"input.{index}") from error


def _require_few(inputs: int, numbers: int) -> None:
    if inputs * numbers > _MOST_NUMBERS:
        most = _MOST_NUMBERS // numbers
        raise BadRequest(f"input has {inputs:,} entries of {numbers:,} numbers each: send at most {most:,} at once", field="input")


def _document(model: str, vectors: Sequence[tuple[orjson.Fragment, Usage]]) -> dict[str, Any]:
    data = [{"object": "embedding", "index": index, "embedding": vector} for index, (vector, _) in enumerate(vectors)]
    usage = Usage.total(usage for _, usage in vectors).document()
    del usage["completion_tokens"]
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _encoded(vector: Sequence[float], encoding: str) -> orjson.Fragment:
    """The vector's JSON: its numbers, or a text of them as little-endian float32. It is made when the vector is there: all of an answer at
    once would keep everybody's tokens waiting."""
    if encoding == "base64":
        return orjson.Fragment(b'"' + base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)) + b'"')
    return orjson.Fragment(orjson.dumps(vector))
