"""The documents of OpenAI's API, as far as a mesh supports them.

A key that cannot change an answer is taken, whatever its value (Harmless). A key that asks for what a mesh does not do is refused by name,
with the reason (unmet). Null is the same as a key that is left out. Any other key is refused: it may be a misspelt one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from mesh.errors import BadRequest
from mesh.gateway.bodies import ByKind, Harmless, PromptTokensDetails, RequestBody, ResponseBody, Unmet, Usage, describe_sampling
from mesh.protocol.embedding import Dimensions
from mesh.protocol.generation import MAX_MESSAGES, Text
from mesh.protocol.message import MAX_STOP_CHARACTERS, MAX_TOKENS, Label
from mesh.protocol.sampling import MAX_LOGPROBS, SamplingFields
from mesh.protocol.structured import LogitBias, SchemaObject, StructuredOutputs
from mesh.protocol.template_values import TEMPLATE_FIELDS, TemplateValues
from mesh.protocol.tools import MAX_CALLS, MAX_TOOLS, CallId, Tool, ToolCall, ToolChoice, ToolFormatName, must_call

__all__ = [
    "ChatCompletion",
    "ChatRequest",
    "CompletionRequest",
    "EmbeddingList",
    "EmbeddingRequest",
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


NO_FUNCTIONS = "functions are OpenAI's older form of tools: give tools and tool_choice in their place"


class StreamOptions(RequestBody):
    """Usage comes with the last part, which has the final counts."""

    include_usage: bool = False
    include_obfuscation: Harmless = None  # nothing is ever added to hide the length of tokens
    continuous_usage_stats: Harmless = None


class JsonSchema(RequestBody):
    """`strict` is always so: the answer has exactly the form, or the request is refused."""

    name: Label
    description: Annotated[str, Field(max_length=65536)] | None = None
    strict: bool | None = None
    form: SchemaObject | None = Field(default=None, alias="schema")


class ResponseFormat(RequestBody):
    """What the answer is: any text, any JSON object, or JSON by a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise PydanticCustomError("unmet", 'needs json_schema with type "json_schema", and with no other')
        return self

    def form(self) -> dict[str, Any] | None:
        """As mesh.protocol.structured has it."""
        if self.type == "text":
            return None
        if self.json_schema is None or self.json_schema.form is None:
            return {"json_object": True}
        return {"json": self.json_schema.form}


class TextPart(RequestBody):
    """The keys of other types are known so that the error is about the type."""

    type: Literal["text"]
    text: Text
    cache_control: Harmless = None
    annotations: Harmless = None
    image_url: Harmless = None
    input_audio: Harmless = None
    file: Harmless = None


class ChatMessage(RequestBody):
    """`content` is a text or parts of one. The role developer means system. A message of an earlier answer may come back with everything
    that clients add to it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            Text | Annotated[list[TextPart], Field(max_length=MAX_MESSAGES, fail_fast=True)],
            ByKind('a text or a list of parts, each {"type": "text", "text": ...}'),
        ]
        | None
    ) = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    function_call: Annotated[Any, Unmet(NO_FUNCTIONS)] = None
    audio: Annotated[Any, Unmet("a mesh takes text alone: leave it out")] = None
    name: Harmless = None
    refusal: Harmless = None
    tool_call_id: CallId | None = None
    id: Harmless = None
    status: Harmless = None
    annotations: Harmless = None
    provider_specific_fields: Harmless = None
    reasoning: Harmless = None
    reasoning_content: Harmless = None
    reasoning_details: Harmless = None
    thinking_blocks: Harmless = None
    images: Harmless = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""

    def request(self) -> dict[str, Any]:
        """As mesh.protocol.generation.ChatMessage."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [call.document() for call in self.tool_calls]
        return message if self.tool_call_id is None else message | {"tool_call_id": self.tool_call_id}


def _needs(value: Any, info: ValidationInfo, other: str) -> Any:
    """The value of a key that means something only where the key `other`, which comes before it, is true."""
    if value is not None and not info.data.get(other):
        raise PydanticCustomError("unmet", "needs {other}: true", {"other": other})
    return value


class Common(SamplingFields, RequestBody):
    """The fields of both kinds of completion.

    ignore_eos, structured_outputs and the sampling parameters that OpenAI does not have are additions. Where OpenAI's range or default
    differs from the mesh's, OpenAI's holds.
    """

    model_config = ConfigDict(json_schema_extra=describe_sampling)

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    model: Label | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: (
        Annotated[
            StopText | Annotated[list[StopText], Field(max_length=4, fail_fast=True)],
            ByKind("a text or a list of at most 4 texts"),
        ]
        | None
    ) = None
    max_tokens: Positive | None = None
    ignore_eos: bool | None = None
    logit_bias: LogitBias | None = None
    structured_outputs: StructuredOutputs | None = None
    user: Harmless = None
    safety_identifier: Harmless = None
    prompt_cache_key: Harmless = None
    prompt_cache_retention: Harmless = None
    metadata: Harmless = None

    @field_validator("stream_options", mode="before")
    @classmethod
    def _options_of_a_stream(cls, value: Any, info: ValidationInfo) -> Any:
        return _needs(value, info, "stream")

    def sampling(self) -> dict[str, Any]:
        """The fields of mesh.protocol.generation.Generate that the request has, and the temperature. Without seed and logprobs, which
        have another form in OpenAI's API."""
        names = {*SamplingFields.model_fields, "ignore_eos"} - {"seed", "logprobs"}
        given = self.model_dump(include=names & self.model_fields_set | {"temperature"}, exclude_none=True)
        if self.stop:
            given["stop"] = [self.stop] if isinstance(self.stop, str) else self.stop
        if self.logit_bias:
            given["logit_bias"] = self.logit_bias
        if self.structured_outputs is not None:
            given["structured_outputs"] = self.structured_outputs.request()
        return given

    def seed_of(self, choice: int) -> int | None:
        """The seed of one choice. Choices of one request differ; the same seed makes the same choices again."""
        return None if self.seed is None else (self.seed + choice) % 2**63


def _choice(choice: ToolChoice) -> Any:
    return choice if isinstance(choice, str) else choice.model_dump()


class ChatRequest(Common):
    """add_generation_prompt, continue_final_message, parse_special, chat_template_kwargs and tool_format are additions: see
    mesh.protocol.generation.Generate."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Positive | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    parse_special: bool = False
    chat_template_kwargs: TemplateValues | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    tool_format: ToolFormatName | None = None
    functions: Annotated[Any, Unmet(NO_FUNCTIONS, ([],), {"type": "array", "maxItems": 0})] = None
    function_call: Annotated[Any, Unmet(NO_FUNCTIONS, ("none", "auto"))] = None
    modalities: Annotated[Any, Unmet('a mesh answers with text alone: give ["text"], or leave it out', (["text"],))] = None
    audio: Annotated[Any, Unmet("a mesh answers with text alone: leave it out")] = None
    web_search_options: Annotated[Any, Unmet("a mesh searches nothing: leave it out")] = None
    service_tier: Annotated[Any, Unmet("a mesh has one tier: leave it out", ("auto", "default"))] = None
    prediction: Harmless = None
    reasoning_effort: Harmless = None
    store: Harmless = None
    verbosity: Harmless = None

    @field_validator("top_logprobs", mode="before")
    @classmethod
    def _of_logprobs(cls, value: Any, info: ValidationInfo) -> Any:
        return _needs(value, info, "logprobs")

    def turns(self) -> dict[str, Any]:
        """The fields of mesh.protocol.generation.Generate about messages."""
        messages = [message.request() for message in self.messages]
        return {
            "messages": messages,
            **self.model_dump(include=self.model_fields_set & TEMPLATE_FIELDS, exclude_none=True),
            **self._form(),
            **self._tools(),
        }

    def _tools(self) -> dict[str, Any]:
        if not self.tools:
            return {} if self.tool_choice is None else {"tool_choice": _choice(self.tool_choice)}
        given: dict[str, Any] = {"tools": [tool.model_dump(exclude_none=True) for tool in self.tools]}
        if self.tool_choice is not None:
            given["tool_choice"] = _choice(self.tool_choice)
        return given | self.model_dump(include={"parallel_tool_calls", "tool_format"}, exclude_none=True)

    def _form(self) -> dict[str, Any]:
        form = None if self.response_format is None else self.response_format.form()
        if form is None:
            return {}
        if self.structured_outputs is not None:
            raise BadRequest("response_format and structured_outputs both say which form the answer has: give one", field="response_format")
        forced = self.tools and must_call(self.tool_choice)
        return {} if forced else {"structured_outputs": form}  # of text: an answer of calls has none

    @property
    def longest(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


Inputs = Annotated[
    Text
    | Annotated[list[Text], Field(max_length=MAX_PROMPTS, fail_fast=True)]
    | TokenIds
    | Annotated[list[TokenIds], Field(max_length=MAX_PROMPTS, fail_fast=True)],
    ByKind("a text, a list of texts, a list of token ids, or a list of such lists"),
]


def _parts(inputs: str | list[Any]) -> list[Any]:
    """Each text, or list of token ids."""
    return [inputs] if isinstance(inputs, str) or all(isinstance(part, int) for part in inputs) else inputs


class CompletionRequest(Common):
    """`prompt`: a text, several texts, token ids, or several lists of token ids. It is used as it is, without a chat template."""

    prompt: Inputs
    best_of: Annotated[int, Field(ge=1, le=128)] | None = None
    echo: bool | None = None
    suffix: Annotated[Any, Unmet("a mesh continues a text, and inserts nothing: leave it out", ("",))] = None

    @field_validator("echo")
    @classmethod
    def _without_logprobs(cls, value: bool | None, info: ValidationInfo) -> bool | None:
        if value and info.data.get("logprobs") is not None:
            raise PydanticCustomError("unmet", "a mesh knows no log-probabilities of a prompt: leave out echo or logprobs")
        return value

    @field_validator("best_of")
    @classmethod
    def _all_are_given_out(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value != (info.data.get("n") or 1):
            raise PydanticCustomError("unmet", "is not n: a mesh gives out every choice it makes")
        return value

    def prompts(self) -> list[dict[str, Any]]:
        """Each prompt as fields of mesh.protocol.generation.Generate."""
        return [{"prompt": part, "raw": True} if isinstance(part, str) else {"tokens": part} for part in _parts(self.prompt)]


class EmbeddingRequest(RequestBody):
    """`input`: a text, several texts, token ids, or several lists of token ids. A text is used as it is, without a chat template. A vector
    is the hidden state of the last token after the model's final norm; `pooling` says the same. `dimensions`: only the first so many
    numbers of it. `normalize`: its length is 1 (true where it is left out)."""

    model: Label | None = None
    input: Inputs
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Dimensions | None = None
    pooling: Literal["last"] = "last"
    normalize: bool = True
    user: Harmless = None
    truncate_prompt_tokens: Annotated[Any, Unmet("a text that does not fit is refused, and never cut: shorten it")] = None

    def inputs(self) -> list[dict[str, Any]]:
        """Each input as fields of mesh.protocol.generation.Generate."""
        embed = self.model_dump(include={"dimensions", "pooling", "normalize"}, exclude_none=True)
        return [{"prompt" if isinstance(part, str) else "tokens": part, "embed": embed, "max_tokens": 1} for part in _parts(self.input)]


class EmbeddingEntry(ResponseBody):
    """`embedding`: the numbers, or with encoding_format base64 their bytes as little-endian float32."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(ResponseBody):
    prompt_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class EmbeddingList(ResponseBody):
    object: Literal["list"]
    data: list[EmbeddingEntry]
    model: str
    usage: EmbeddingUsage


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
    tool_calls: list[ToolCall] | None = None


class ChatChoice(ResponseBody):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


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
    """`max_model_len`: the most tokens that a prompt and its answer may have together now; null where a layer range has no shard."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None


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
