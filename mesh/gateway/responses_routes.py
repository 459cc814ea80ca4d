"""OpenAI's responses API. mesh/gateway/responses_schema.py says which fields are supported, kept_responses.py how responses are kept."""

from __future__ import annotations

import time
from typing import Any

from fastapi import Depends
from starlette.requests import Request
from starlette.responses import Response

from mesh.client import Completion
from mesh.errors import BadRequest
from mesh.gateway.answering import Answering, answer, json_response
from mesh.gateway.context import Gateway, gateway_of
from mesh.gateway.errors import HttpError
from mesh.gateway.events import STREAM, named_event
from mesh.gateway.guard import caller_of, guarded
from mesh.gateway.kept_responses import KeptResponse, KeptResponses
from mesh.gateway.openai_schema import OpenAIError
from mesh.gateway.responses_schema import ResponseDeleted, ResponseDocument, ResponsesRequest
from mesh.gateway.responses_shape import ResponseShape

__all__ = ["responses"]

responses = guarded("generate", tags=["openai"])

_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": OpenAIError, "description": "There is no such response"}}


@responses.post("/v1/responses", response_model=ResponseDocument, responses=STREAM)
async def create(body: ResponsesRequest, request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """An answer, which is kept for a while so that the next request goes on with it."""
    owner, kept = caller_of(request).owner, gateway.responses
    model = await gateway.models.resolve(body.model)
    before = await _before(kept, owner, body.previous_response_id)
    shape = ResponseShape(model, int(time.time()), body.echoed())

    async def keep(completion: Completion) -> None:
        if body.kept and not await kept.keep(owner, shape.id, KeptResponse(shape.document, [*before, *body.turns(), shape.turn()])):
            shape.not_kept()

    work = Answering(
        model,
        shape,
        [body.fields(before)],
        encode=named_event,
        failed=lambda error: named_event(shape.failed(error)),
        ended=keep,
    )
    return await answer(gateway, request, work, stream=bool(body.stream))


@responses.get("/v1/responses/{id}", response_model=ResponseDocument, responses=_UNKNOWN)
async def retrieve(id: str, request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """A response that is kept."""
    found = await gateway.responses.get(caller_of(request).owner, id)
    if found is None:
        raise _unknown(id)
    return json_response(found.document)


@responses.delete("/v1/responses/{id}", response_model=ResponseDeleted, responses=_UNKNOWN)
async def delete(id: str, request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """Forget a response that is kept."""
    if not await gateway.responses.forget(caller_of(request).owner, id):
        raise _unknown(id)
    return json_response({"id": id, "object": "response", "deleted": True})


async def _before(kept: KeptResponses, owner: str, id: str | None) -> list[dict[str, Any]]:
    """The messages up to and with an earlier response."""
    if id is None:
        return []
    found = await kept.get(owner, id)
    if found is None:
        raise BadRequest(
            f"no response {id} is kept: it is too old, was not stored, or is another subject's; send its messages as input",
            field="previous_response_id",
        )
    return found.messages


def _unknown(id: str) -> HttpError:
    return HttpError(
        f"no response {id[:80]!r} is kept: it is too old, was not stored, or is another subject's", status=404, code="not_found"
    )
