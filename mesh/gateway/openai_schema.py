"""The documents of OpenAI's API, as far as a mesh supports them. A field that it does not support is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from mesh.gateway.bodies import RequestBody, ResponseBody, Usage
from mesh.protocol.generation import MAX_MESSAGES, Text
from mesh.protocol.message import MAX_STOP_CHARACTERS, MAX_TOKENS, Label
from mesh.protocol.sampling import MAX_LOGPROBS, SamplingFields

__all__ = [
    "ChatCompletion",
    "ChatRequest",
    "CompletionRequest",
    "ModelCard",
    "ModelList",
    "OpenAIError",
    "TextCompletion",
]

_MAX_INT = 2**31 - 1
MAX_PROMPTS = 2048  # of one completion request, as OpenAI has it; max_choices is a tighter bound
Positive = Annotated[int, Field(ge=1, le=_MAX_INT)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=_MAX_INT)]], Field(max_length=MAX_TOKENS, fail_fast=True)]


class StreamOptions(RequestBody):
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted, but nothing is ever added to hide the length of tokens


class TextPart(RequestBody):
    type: Literal["text"]
    text: Text


class ChatMessage(RequestBody):
    """`content` is a text or parts of one. The role developer means system."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    name: Label | None = None
    refusal: Text | None = None
    tool_call_id: Label | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ResponseFormat(RequestBody):
    type: Literal["text"]


def _describe(schema: dict[str, Any]) -> None:
    """In a JSON schema, give every sampling parameter its description, and allow null for it."""
    for name, field in SamplingFields.model_fields.items():
        value = schema["properties"][name]
        value.setdefault("description", field.description)
        if "anyOf" not in value:
            outer = {key: value.pop(key) for key in ("title", "description", "default") if key in value}
            schema["properties"][name] = {"anyOf": [value, {"type": "null"}], **outer}


class Common(SamplingFields, RequestBody):
    """The fields of both kinds of completion. A sampling parameter that is null has its default.

    ignore_eos and the sampling parameters that OpenAI does not have are additions. Where OpenAI's range or default differs from the
    mesh's, OpenAI's holds.
    """

    model_config = ConfigDict(json_schema_extra=_describe)

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    model: Label
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=4, fail_fast=True)] | None = None
    max_tokens: Positive | None = None
    user: Label | None = None
    logit_bias: Annotated[dict[Label, float], Field(max_length=0)] | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _null_is_the_default(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None or name not in SamplingFields.model_fields}

    def sampling(self) -> dict[str, Any]:
        """The fields of mesh.protocol.generation.Generate that the request has, and the temperature. Without seed and logprobs, which
        have another form in OpenAI's API."""
        names = {*SamplingFields.model_fields, "ignore_eos"} - {"seed", "logprobs"}
        given = self.model_dump(include=names & self.model_fields_set | {"temperature"}, exclude_none=True)
        if self.stop:
            given["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        return given

    def seed_of(self, choice: int) -> int | None:
        """The seed of one choice. Choices of one request differ; the same seed makes the same choices again."""
        return None if self.seed is None else (self.seed + choice) % 2**63


class ChatRequest(Common):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    metadata: Annotated[dict[Label, Annotated[str, Field(max_length=1000)]], Field(max_length=64)] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    reasoning_effort: Label | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=16, fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    @property
    def longest(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Common):
    """`prompt`: a text, several texts, token ids, or several lists of token ids. It is used as it is, without a chat template."""

    prompt: (
        Text
        | Annotated[list[Text], Field(max_length=MAX_PROMPTS, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    )
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _agree(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not n: a mesh gives out every choice it makes")
        return self

    def prompts(self) -> list[dict[str, Any]]:
        """Each prompt as fields of mesh.protocol.generation.Generate."""
        if isinstance(self.prompt, str):
            return [{"prompt": self.prompt, "raw": True}]
        if all(isinstance(part, int) for part in self.prompt):
            return [{"tokens": self.prompt}]
        return [{"prompt": part, "raw": True} if isinstance(part, str) else {"tokens": part} for part in self.prompt]


class TopLogprob(ResponseBody):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseBody):
    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(ResponseBody):
    role: Literal["assistant"]
    content: str | None
    refusal: None = None


class ChatChoice(ResponseBody):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(ResponseBody):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None


class TextLogprobs(ResponseBody):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(ResponseBody):
    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: Literal["stop", "length"]


class TextCompletion(ResponseBody):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    system_fingerprint: str | None = None


class ModelCard(ResponseBody):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(ResponseBody):
    object: Literal["list"]
    data: list[ModelCard]


class OpenAIErrorBody(ResponseBody):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(ResponseBody):
    error: OpenAIErrorBody
