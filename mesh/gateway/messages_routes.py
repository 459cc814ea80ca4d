"""Anthropic's messages API. mesh/gateway/messages_schema.py says which fields are supported."""

from __future__ import annotations

from typing import Any

from fastapi import Depends
from starlette.requests import Request
from starlette.responses import Response

from mesh.errors import MeshError
from mesh.gateway.answering import Answering, answer, json_response
from mesh.gateway.context import Gateway, gateway_of
from mesh.gateway.errors import anthropic_document
from mesh.gateway.events import named_event, until_gone
from mesh.gateway.generation import ONE_REQUEST, check_length, paying
from mesh.gateway.guard import caller_of, guarded
from mesh.gateway.messages_schema import CountRequest, CountResponse, MessageResponse, MessagesRequest
from mesh.gateway.messages_shape import MessageShape

__all__ = ["messages"]

messages = guarded("generate", tags=["anthropic"])

_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


@messages.post("/v1/messages", response_model=MessageResponse, responses=_STREAM)
async def create(body: MessagesRequest, request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """The assistant's next message."""
    request_id = request.state.request_id

    def failed(error: MeshError) -> bytes:
        return named_event(anthropic_document(error, request_id))

    model = await gateway.models.resolve(body.model)
    work = Answering(model, MessageShape(model), [body.fields()], encode=named_event, failed=failed)
    return await answer(gateway, request, work, stream=bool(body.stream))


@messages.post("/v1/messages/count_tokens", response_model=CountResponse)
async def count_tokens(body: CountRequest, request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """How many tokens a conversation is, in the model's template."""
    model, fields = await gateway.models.resolve(body.model), body.conversation()
    check_length(fields, gateway.settings.limits, gateway.models.max_prompt_characters(model))
    with paying(caller_of(request), ONE_REQUEST):
        found = await until_gone(request.receive, gateway.client.tokenize(model=model, **fields))
    return json_response({"input_tokens": len(found.tokens)})
