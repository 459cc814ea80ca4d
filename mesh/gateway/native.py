"""The mesh's own HTTP API: inference and statistics. Batches are in batch_routes."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import orjson
from fastapi import Depends
from starlette.requests import Request
from starlette.responses import Response

from mesh.client import Chunk, Completion
from mesh.errors import BadRequest
from mesh.gateway.auth import Caller
from mesh.gateway.context import Gateway, gateway_of
from mesh.gateway.errors import error_document
from mesh.gateway.events import STREAM, EventStream, event, until_gone
from mesh.gateway.generation import HttpGeneration, cost_of, paying
from mesh.gateway.guard import caller_of, guarded
from mesh.gateway.resume import HEADER, Progress
from mesh.gateway.schema import InferenceItem, InferenceRequest, InferenceResponse, StatsResponse

__all__ = ["admin", "answer_document", "check_input", "generate"]

generate = guarded("generate", tags=["inference"])
admin = guarded("admin", tags=["mesh"])


@generate.post("/api/v1/inference", response_model=InferenceResponse, responses=STREAM)
async def inference(body: InferenceRequest, request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """Generate text after a prompt, a conversation or tokens; with `stream`, token by token. The same request with the header
    Last-Event-ID goes on after the event of that id."""
    check_input(body)
    model = await gateway.models.resolve(body.model)
    caller = caller_of(request)
    if body.stream:
        request_id = request.state.request_id
        progress = Progress(1, request.headers.get(HEADER), owner=caller.owner)
        return EventStream(
            _events(gateway, caller, model, body, progress),
            lambda error: event({"done": True, **error_document(error, request_id)}),
            keep_alive_s=gateway.settings.limits.keep_alive_s,
        )
    with paying(caller, cost_of([body.generate_fields()], gateway.settings.limits)) as bill:
        generation = HttpGeneration(gateway, bill, model, body.generate_fields())
        completion = await until_gone(request.receive, generation.complete())
    return _json(answer_document(completion, model))


@admin.get("/api/v1/stats", response_model=StatsResponse)
async def stats(request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """The statistics of the shards, the coordinators and this gateway."""
    status = await gateway.client.status()
    return _json(
        {
            "shards": [shard.model_dump(mode="json") for shard in status.shards],
            "coordinators": [coordinator.stats.document() for coordinator in status.coordinators],
            "gateway": request.app.state.counters.as_dict(),
        }
    )


async def _events(gateway: Gateway, caller: Caller, model: str, body: InferenceItem, progress: Progress) -> AsyncGenerator[bytes, None]:
    with paying(caller, cost_of([body.generate_fields()], gateway.settings.limits)) as bill:
        generation = HttpGeneration(gateway, bill, model, body.generate_fields(), progress)
        rest = ""
        async with aclosing(generation.chunks()) as chunks:
            async for chunk in chunks:
                if chunk.token is None:
                    rest = chunk.text
                elif not progress.has(0, chunk):
                    progress.take(0, chunk)
                    yield event(_token(chunk), progress.id)
        assert generation.completion is not None
        yield event({"done": True, "rest": rest, **answer_document(generation.completion, model)})


def _token(chunk: Chunk) -> dict[str, Any]:
    assert chunk.token is not None
    document: dict[str, Any] = {"index": chunk.index, "token": chunk.token.id, "text": chunk.text, "done": False}
    return document if chunk.token.logprob is None else document | chunk.token.details()


def answer_document(completion: Completion, model: str) -> dict[str, Any]:
    document = completion.document()
    return {"id": document.pop("request"), "model": model, "logprobs": document.pop("logprobs", None), **document}


def check_input(item: InferenceItem, prefix: str = "") -> None:
    if sum(given is not None for given in (item.prompt, item.messages, item.tokens)) != 1:
        raise BadRequest(f"{prefix}prompt: give exactly one of prompt, messages and tokens", field=f"{prefix}prompt")


def _json(document: Any) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")
