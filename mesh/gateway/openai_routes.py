"""OpenAI's API: models, chat completions, completions. mesh.gateway.openai_schema says which fields are supported."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Depends
from starlette.requests import Request
from starlette.responses import Response

from mesh.client.openai_shapes import ChatShape, TextShape
from mesh.errors import BadRequest, ModelNotFound
from mesh.gateway.answering import Answering, answer, json_response, nothing
from mesh.gateway.context import Gateway, gateway_of
from mesh.gateway.errors import openai_document
from mesh.gateway.events import STREAM, event
from mesh.gateway.guard import guarded
from mesh.gateway.known import KnownModel
from mesh.gateway.openai_schema import ChatCompletion, ChatRequest, Common, CompletionRequest, ModelCard, ModelList, TextCompletion

__all__ = ["openai"]

openai = guarded("generate", tags=["openai"])

_DONE = b"data: [DONE]\n\n"
_COMPLETION_TOKENS = 16  # OpenAI's default for completions

S = TypeVar("S", ChatShape, TextShape)


@openai.post("/v1/chat/completions", response_model=ChatCompletion, responses=STREAM)
async def chat_completions(body: ChatRequest, request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """The assistant's next message."""
    fields = {**body.turns(), **body.sampling()}
    if body.longest is not None:
        fields["max_tokens"] = body.longest
    if body.logprobs:
        fields["logprobs"] = body.top_logprobs or 0
    _require_few(gateway, body, 1)
    return await _answer(gateway, request, body, [fields], _shape(ChatShape, body, await gateway.models.resolve(body.model)))


@openai.post("/v1/completions", response_model=TextCompletion, responses=STREAM)
async def completions(body: CompletionRequest, request: Request, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """The continuation of a text."""
    common = {"max_tokens": body.max_tokens or _COMPLETION_TOKENS, **body.sampling()}
    if body.logprobs is not None:
        common["logprobs"] = body.logprobs
    prompts = body.prompts()
    _require_few(gateway, body, len(prompts))
    shape = _shape(TextShape, body, await gateway.models.resolve(body.model))

    async def echo() -> None:
        shape.echo([await _text_of(gateway, shape.model, prompt) for prompt in prompts])

    return await _answer(gateway, request, body, [{**prompt, **common} for prompt in prompts], shape, echo if body.echo else nothing)


@openai.get("/v1/models", response_model=ModelList)
async def models(gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """The models that the mesh serves."""
    return json_response({"object": "list", "data": [_card(known) for known in await gateway.models.all()]})


@openai.get("/v1/models/{model}", response_model=ModelCard)
async def model(model: str, gateway: Gateway = Depends(gateway_of)) -> Response:  # noqa: B008
    """One model."""
    for known in await gateway.models.all():
        if known.name == model:
            return json_response(_card(known))
    raise ModelNotFound(f"no coordinator serves a model {model!r}")


def _shape(kind: type[S], body: Common, model: str) -> S:
    include_usage = body.stream_options is not None and body.stream_options.include_usage
    return kind(model, int(time.time()), choices=body.n or 1, usage_is_null=bool(body.stream and include_usage))


async def _answer(
    gateway: Gateway,
    request: Request,
    body: Common,
    prompts: list[dict[str, Any]],
    shape: ChatShape | TextShape,
    begin: Callable[[], Awaitable[None]] = nothing,
) -> Response:
    requests = []
    for prompt in prompts:
        for choice in range(body.n or 1):
            seed = body.seed_of(choice)
            requests.append(prompt if seed is None else {**prompt, "seed": seed})
    work = Answering(
        shape.model,
        shape,
        requests,
        encode=event,
        failed=lambda error: event(openai_document(error)),
        closing=_DONE,
        choices=body.n or 1,
        begin=begin,
    )
    return await answer(gateway, request, work, stream=bool(body.stream))


def _require_few(gateway: Gateway, body: Common, prompts: int) -> None:
    most, count = gateway.settings.limits.max_choices, (body.n or 1) * prompts
    if count > most:
        what = "n" if prompts == 1 else "n times the number of prompts"
        raise BadRequest(f"{what} is {count}: at most {most} choices are made at once", field="n")


async def _text_of(gateway: Gateway, model: str, prompt: dict[str, Any]) -> str:
    """The text that `echo` gives back."""
    return prompt["prompt"] if "prompt" in prompt else await gateway.client.detokenize(prompt["tokens"], model=model)


def _card(known: KnownModel) -> dict[str, Any]:
    created, length = int(known.first_seen_unix_s), known.context
    return {"id": known.name, "object": "model", "created": created, "owned_by": "stagemesh", "max_model_len": length}
