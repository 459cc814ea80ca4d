"""Anthropic's messages API. mesh/gateway/messages_schema.py says which fields are supported."""

from __future__ import annotations

from fastapi import Depends
from starlette.requests import Request
from starlette.responses import Response

from mesh.errors import MeshError
from mesh.gateway.answering import Answering, answer, json_response
from mesh.gateway.context import Gateway, gateway_of
from mesh.gateway.errors import anthropic_document
from mesh.gateway.events import STREAM, named_event
from mesh.gateway.guard import guarded
from mesh.gateway.messages_schema import CountRequest, CountResponse, MessageResponse, MessagesRequest
from mesh.gateway.messages_shape import MessageShape
from mesh.gateway.tokenize_routes import tokens_of

__all__ = ["messages"]

messages = guarded("generate", tags=["anthropic"])


@messages.post("/v1/messages", response_model=MessageResponse, responses=STREAM)
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
    found = await tokens_of(gateway, request, body.model, body.conversation())
    return json_response({"input_tokens": len(found.tokens)})
