"""The tokens of a text or of messages, and the text of tokens, in vLLM's form."""

from __future__ import annotations

from typing import Annotated, Any, Self

from fastapi import Depends
from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import Request
from starlette.responses import Response

from mesh.gateway.answering import json_response
from mesh.gateway.bodies import RequestBody, ResponseBody, Unmet
from mesh.gateway.context import Gateway, gateway_of
from mesh.gateway.events import until_gone
from mesh.gateway.generation import ONE_REQUEST, check_length, paying
from mesh.gateway.guard import caller_of, guarded
from mesh.gateway.openai_schema import ChatMessage, TokenIds
from mesh.protocol.generation import MAX_MESSAGES, Text
from mesh.protocol.message import Label
from mesh.protocol.template_values import TEMPLATE_FIELDS, TemplateValues
from mesh.protocol.tokenizing import Tokenized
from mesh.protocol.tools import MAX_TOOLS, Tool

__all__ = ["tokenizing", "tokens_of"]

tokenizing = guarded("generate", tags=["tokens"])

_TEMPLATE = "a mesh has the template of its model alone: leave it out"


class TokenizeRequest(RequestBody):
    """Exactly one of `prompt` and `messages`. A prompt is tokenized as it is. `add_special_tokens`: it begins with the tokens that the
    model wants there, such as a bos (true where it is left out); the template of messages has them in any case."""

    model: Label | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    parse_special: bool = False
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    chat_template: Annotated[Any, Unmet(_TEMPLATE)] = None
    chat_template_kwargs: TemplateValues | None = None
    mm_processor_kwargs: Annotated[Any, Unmet("a mesh takes text alone: leave it out", ({},))] = None

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise PydanticCustomError("unmet", "give exactly one of prompt and messages")
        if self.messages is not None and self.add_special_tokens:
            raise PydanticCustomError("unmet", "add_special_tokens is for a prompt: the template of messages has those tokens")
        return self

    def fields(self) -> dict[str, Any]:
        """As mesh.protocol.tokenizing.Tokenize."""
        names = bool(self.return_token_strs)
        if self.messages is None:
            return {"prompt": self.prompt, "special": self.add_special_tokens is not False, "names": names}
        tools = [tool.model_dump(exclude_none=True) for tool in self.tools or ()]
        messages = [message.request() for message in self.messages]
        return {
            "messages": messages,
            "tools": tools,
            "names": names,
            **self.model_dump(include=self.model_fields_set & TEMPLATE_FIELDS, exclude_none=True),
        }


class TokenizeResponse(ResponseBody):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(RequestBody):
    model: Label | None = None
    tokens: TokenIds


class DetokenizeResponse(ResponseBody):
    prompt: str


async def tokens_of(gateway: Gateway, request: Request, model: str | None, fields: dict[str, Any]) -> Tokenized:
    """The tokens of a text or of messages; `fields`: of mesh.protocol.tokenizing.Tokenize. It counts as one request of the caller."""
    model = await gateway.models.resolve(model)
    check_length(fields, gateway.settings.limits, gateway.models.max_prompt_characters(model))
    with paying(caller_of(request), ONE_REQUEST):
        return await until_gone(request.receive, gateway.client.tokenize(model=model, **fields))


@tokenizing.post("/tokenize", response_model=TokenizeResponse)
async def tokenize(body: TokenizeRequest, request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """The tokens of a text, or of messages in the model's template."""
    found = await tokens_of(gateway, request, body.model, body.fields())
    answer = {"count": len(found.tokens), "max_model_len": found.context, "tokens": found.tokens}
    return json_response(answer | {"token_strs": found.names})


@tokenizing.post("/detokenize", response_model=DetokenizeResponse)
async def detokenize(body: DetokenizeRequest, request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """The text of tokens, control tokens included."""
    model = await gateway.models.resolve(body.model)
    check_length({"tokens": body.tokens}, gateway.settings.limits, None)
    with paying(caller_of(request), ONE_REQUEST):
        return json_response({"prompt": await until_gone(request.receive, gateway.client.detokenize(body.tokens, model=model))})
