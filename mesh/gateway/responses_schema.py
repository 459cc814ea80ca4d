"""The documents of OpenAI's responses API, as far as a mesh supports them: see openai_schema.py for which keys are taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from mesh.gateway.bodies import ByKind, Harmless, RequestBody, ResponseBody, Unmet, describe_sampling, require_keys
from mesh.gateway.openai_schema import Positive
from mesh.protocol.documents import BRANCH
from mesh.protocol.generation import MAX_MESSAGES, Text
from mesh.protocol.message import Label
from mesh.protocol.sampling import MAX_LOGPROBS, SamplingFields
from mesh.protocol.structured import SchemaObject
from mesh.protocol.template_values import TemplateValues
from mesh.protocol.tools import MAX_TOOLS, CallId, Name, ToolFormatName, choice_kind, must_call

__all__ = ["ResponseDeleted", "ResponseDocument", "ResponsesRequest"]

ResponseId = Annotated[str, Field(pattern=r"^resp_[A-Za-z0-9_-]{1,64}$")]
_ONE_TIER = "a mesh has one tier: leave it out"
_KEEPS_NONE = "a mesh keeps responses, and no conversations beside them: give previous_response_id"


class InputPart(RequestBody):
    """The keys of other types are known so that the error is about the type."""

    type: Literal["input_text", "output_text", "reasoning_text"]
    text: Text
    annotations: Harmless = None
    logprobs: Harmless = None
    image_url: Harmless = None
    file_id: Harmless = None
    file_data: Harmless = None
    detail: Harmless = None


_Parts = Annotated[
    Text | Annotated[list[InputPart], Field(max_length=MAX_MESSAGES, fail_fast=True)],
    ByKind('a text or a list of parts, each {"type": "input_text", "text": ...}'),
]


class InputItem(RequestBody):
    """A message, a call of a function, or its result. Each type has keys of its own. Items of an earlier response may come
    back as they are. What another server's model thought (reasoning) is taken, and left out: templates have no place for it."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: _Parts | None = None
    call_id: CallId | None = None
    name: Name | None = None
    arguments: Text | None = None
    output: _Parts | None = None
    id: Harmless = None
    status: Harmless = None
    phase: Harmless = None
    summary: Harmless = None
    encrypted_content: Harmless = None

    @model_validator(mode="after")
    def _has_its_keys(self) -> Self:
        needed = {
            "message": ("role", "content"),
            "function_call": ("call_id", "name", "arguments"),
            "function_call_output": ("call_id", "output"),
            "reasoning": (),
        }[self.type]
        require_keys(self, self.type, needed)
        return self

    def turn(self) -> dict[str, Any]:
        """As mesh.protocol.generation.ChatMessage."""
        if self.type == "function_call":
            function = {"name": self.name, "arguments": self.arguments}
            return {"role": "assistant", "content": "", "tool_calls": [{"id": self.call_id, "type": "function", "function": function}]}
        if self.type == "function_call_output":
            return {"role": "tool", "tool_call_id": self.call_id, "content": _joined(self.output)}
        return {"role": "system" if self.role == "developer" else self.role, "content": _joined(self.content)}


def _joined(parts: str | list[InputPart] | None) -> str:
    return parts if isinstance(parts, str) else "".join(part.text for part in parts or () if part.type != "reasoning_text")


def joined_turns(turns: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Messages in which each turn of the assistant is one: its text, and all that it calls."""
    last: dict[str, Any] | None = None
    for turn in turns:
        if last is not None and last["role"] == "assistant" and turn.get("tool_calls"):
            last = {**last, "tool_calls": [*last.get("tool_calls", ()), *turn["tool_calls"]]}
            continue
        if last is not None:
            yield last
        last = turn
    if last is not None:
        yield last


class FunctionTool(RequestBody):
    """`strict`: a call always has arguments that follow the schema."""

    type: Literal["function"]
    name: Name
    description: Annotated[str, Field(max_length=65536)] | None = None
    parameters: SchemaObject | None = None
    strict: bool | None = None

    def request(self) -> dict[str, Any]:
        """As mesh.protocol.tools.Tool."""
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class FunctionChoice(RequestBody):
    type: Literal["function"]
    name: Name


FunctionToolChoice = Annotated[
    Annotated[Literal["auto", "none", "required"], Tag(BRANCH.format("text"))] | Annotated[FunctionChoice, Tag(BRANCH.format("object"))],
    Discriminator(choice_kind),
]


class TextFormat(RequestBody):
    """What the answer is: any text, any JSON object, or JSON by a schema. `strict` is always so."""

    type: Literal["text", "json_object", "json_schema"]
    name: Label | None = None
    description: Annotated[str, Field(max_length=65536)] | None = None
    strict: bool | None = None
    form: SchemaObject | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.form is not None):
            raise PydanticCustomError("unmet", 'needs schema with type "json_schema", and with no other')
        return self

    def structured(self) -> dict[str, Any] | None:
        """As mesh.protocol.structured has it."""
        if self.type == "text":
            return None
        return {"json_object": True} if self.form is None else {"json": self.form}


class TextOptions(RequestBody):
    format: TextFormat | None = None
    verbosity: Harmless = None


class ResponseStreamOptions(RequestBody):
    include_obfuscation: Harmless = None  # nothing is ever added to hide the length of tokens


class ResponsesRequest(SamplingFields, RequestBody):
    """`store` (true where it is left out): the response is kept for a while, for previous_response_id. ignore_eos, tool_format,
    chat_template_kwargs and the sampling parameters that OpenAI does not have are additions."""

    model_config = ConfigDict(json_schema_extra=describe_sampling)

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    logprobs: Annotated[Any, Unmet('give top_logprobs and include: ["message.output_text.logprobs"] in its place')] = None
    model: Label | None = None
    input: Annotated[
        Text | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)],
        ByKind("a text or a list of items"),
    ]
    instructions: Text | None = None
    previous_response_id: ResponseId | None = None
    store: bool | None = None
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: Positive | None = None
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: FunctionToolChoice | None = None
    parallel_tool_calls: bool | None = None
    tool_format: ToolFormatName | None = None
    chat_template_kwargs: TemplateValues | None = None
    text: TextOptions | None = None
    metadata: Annotated[dict[Label, Annotated[str, Field(max_length=512)]], Field(max_length=16)] | None = None
    ignore_eos: bool | None = None
    include: (
        Annotated[list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]], Field(max_length=8, fail_fast=True)] | None
    ) = None
    truncation: Annotated[Any, Unmet("a mesh leaves no messages out: shorten the input", ("disabled",))] = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    background: Annotated[Any, Unmet("a mesh answers at once: leave it out, or use /api/v1/batch", (False,))] = None
    background_options: Annotated[Any, Unmet("a mesh answers at once: leave it out, or use /api/v1/batch")] = None
    conversation: Annotated[Any, Unmet(_KEEPS_NONE)] = None
    context_management: Annotated[Any, Unmet("a mesh takes a conversation as it is: leave it out")] = None
    prompt: Annotated[Any, Unmet("a mesh keeps no prompts: give input and instructions")] = None
    max_tool_calls: Annotated[Any, Unmet("a mesh calls no tools itself: leave it out")] = None
    moderation: Annotated[Any, Unmet("a mesh moderates nothing: leave it out")] = None
    image: Annotated[Any, Unmet("a mesh answers with text alone: leave it out")] = None
    access_programs: Annotated[Any, Unmet("a mesh has no such programs: leave it out")] = None
    service_tier: Annotated[Any, Unmet(_ONE_TIER, ("auto", "default"))] = None
    reasoning: Harmless = None
    user: Harmless = None
    safety_identifier: Harmless = None
    prompt_cache_key: Harmless = None
    prompt_cache_retention: Harmless = None
    prompt_cache_options: Harmless = None

    @model_validator(mode="after")
    def _has_text_whose_tokens_are_known(self) -> Self:
        if self.with_logprobs and self.tools and self.tool_choice != "none":
            raise PydanticCustomError(
                "unmet", "log-probabilities are not told apart where calls may be made: leave out top_logprobs or tools"
            )
        return self

    @property
    def with_logprobs(self) -> bool:
        """Whether the text of the answer comes with log-probabilities."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or ())

    @property
    def kept(self) -> bool:
        return self.store is not False

    def turns(self) -> list[dict[str, Any]]:
        """As mesh.protocol.generation.ChatMessage."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return [item.turn() for item in self.input if item.type != "reasoning"]

    def fields(self, before: list[dict[str, Any]]) -> dict[str, Any]:
        """As mesh.protocol.generation.Generate. `before`: the messages of the responses before this one."""
        system = [] if not self.instructions else [{"role": "system", "content": self.instructions}]
        names = {*SamplingFields.model_fields, "ignore_eos", "chat_template_kwargs"} - {"logprobs"}
        given = self.model_dump(include=names & self.model_fields_set | {"temperature"}, exclude_none=True)
        given["messages"] = list(joined_turns([*system, *before, *self.turns()]))
        if self.max_output_tokens is not None:
            given["max_tokens"] = self.max_output_tokens
        if self.with_logprobs:
            given["logprobs"] = self.top_logprobs or 0
        forced = self.tools and must_call(self.tool_choice)  # then there is no text that could have a form
        form = None if forced or self.text is None or self.text.format is None else self.text.format.structured()
        return given | ({} if form is None else {"structured_outputs": form}) | self._tools()

    def _tools(self) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if self.tool_choice is not None:
            choice = self.tool_choice
            given["tool_choice"] = choice if isinstance(choice, str) else {"type": "function", "function": {"name": choice.name}}
        if self.tools:
            given["tools"] = [tool.request() for tool in self.tools]
            given |= self.model_dump(include={"parallel_tool_calls", "tool_format"}, exclude_none=True)
        return given

    def echoed(self) -> dict[str, Any]:
        """What a response says of its request."""
        choice = self.tool_choice or "auto"
        text = TextFormat(type="text") if self.text is None or self.text.format is None else self.text.format
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": self.previous_response_id,
            "store": self.kept,
            "temperature": self.temperature,
            "text": {"format": text.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "top_p": self.top_p,
            "truncation": "disabled",
        }


class ResponsePart(ResponseBody):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputItem(ResponseBody):
    """A message, or a call of a function."""

    type: Literal["message", "function_call"]
    id: str
    status: Literal["in_progress", "completed", "incomplete"]
    role: Literal["assistant"] | None = None
    content: list[ResponsePart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class InputDetails(ResponseBody):
    cached_tokens: int


class OutputDetails(ResponseBody):
    reasoning_tokens: int


class ResponseUsage(ResponseBody):
    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class IncompleteDetails(ResponseBody):
    reason: Literal["max_output_tokens"]


class ResponseDocument(ResponseBody):
    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete", "in_progress"]
    error: None = None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None


class ResponseDeleted(ResponseBody):
    id: str
    object: Literal["response"]
    deleted: bool
