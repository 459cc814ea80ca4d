"""What a request may have: the keyword arguments of both clients, as type checkers see them, and the message that is made of them.

A test compares them with mesh.protocol.generation.Generate, which says what each one means.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypedDict, TypeVar

import orjson

from mesh.errors import BadRequest, MessageRejected
from mesh.protocol.generation import Generate
from mesh.protocol.message import Message
from mesh.protocol.stream import Waiting

__all__ = ["ChatArguments", "EmbedArguments", "GenerateArguments", "RequestArguments", "asked", "message_of"]


M = TypeVar("M", bound=Message)


class _Fields(TypedDict, total=False):
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    logprobs: int | None
    stop: Sequence[str]
    logit_bias: Mapping[str, float]
    structured_outputs: Mapping[str, Any] | None
    tools: Sequence[Mapping[str, Any]]
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool
    tool_format: str | None
    embed: Mapping[str, Any] | None
    ignore_eos: bool
    raw: bool
    add_generation_prompt: bool
    continue_final_message: bool
    parse_special: bool
    chat_template_kwargs: Mapping[str, Any]
    session: str | None
    cache_salt: str | None
    traceparent: str | None


class RequestArguments(_Fields, total=False):
    """The fields of a request. One of the prompt, `messages` ({"role", "content"}) and `tokens` is given."""

    messages: Sequence[Mapping[str, Any]]
    tokens: Sequence[int]


class _Sending(TypedDict, total=False):
    model: str | None
    timeout_s: float | None
    on_waiting: Callable[[Waiting], None] | None


class GenerateArguments(RequestArguments, _Sending, total=False):
    """Those of `generate` and `open_stream`: the fields of a request, and how it is sent."""


class ChatArguments(_Fields, _Sending, total=False):
    """Those of `chat`, which takes the messages itself."""


class EmbedArguments(_Sending, total=False):
    """Those of `embed`, beside what it says of the vectors."""

    cache_salt: str | None
    traceparent: str | None


_NAMES: Final = tuple(dict.fromkeys(("prompt", "messages", "tokens", *GenerateArguments.__annotations__)))
_OWN: Final = frozenset({"stream", "attempt", "given", "epoch", "waited_s"})
"""Fields that this package itself sets: they say how a request goes on."""


def message_of(prompt: str | None, request: Mapping[str, Any]) -> Generate:
    """The message of a request. BadRequest: an argument is unknown or wrong."""
    for name in request:
        if name not in _NAMES and name not in _OWN:
            near = difflib.get_close_matches(name, _NAMES, 1)
            right = f"did you mean {near[0]}?" if near else f"there are {', '.join(_NAMES)}"
            raise BadRequest(f"{name} is no argument of a request: {right}", field=name)
    values = {"prompt": prompt, **request}
    return asked(Generate, {name: value for name, value in values.items() if value is not None})


def asked(kind: type[M], values: Mapping[str, Any]) -> M:
    """The message of these fields. BadRequest: a field is unknown or wrong.

    Converted through JSON, so that a tuple passes as a list and an integer as a float, as from any other client.
    """
    try:
        return kind.parse(orjson.dumps(values))
    except MessageRejected as error:
        raise BadRequest(str(error), field=error.field) from None
    except TypeError as error:
        raise BadRequest(f"the request cannot be written as JSON: {error}", field="request") from None
