"""The documents of Anthropic's messages API, as far as a mesh supports them.

As in OpenAI's API (openai_schema.py), a key that cannot change an answer is taken, one that asks for what a mesh does not do is refused
by name, and any other key is refused. The sampling parameters that Anthropic does not have are additions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

import orjson
from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from mesh.gateway.bodies import ByKind, Harmless, RequestBody, ResponseBody, Unmet, describe_sampling, require_keys
from mesh.gateway.openai_schema import Positive, StopText
from mesh.protocol.generation import MAX_MESSAGES, Text
from mesh.protocol.message import MAX_STOPS, Label
from mesh.protocol.sampling import SamplingFields
from mesh.protocol.structured import SchemaObject
from mesh.protocol.tools import MAX_TOOLS, CallId, Name, ToolFormatName

__all__ = ["AnthropicError", "CountRequest", "CountResponse", "MessageResponse", "MessagesRequest"]

_TEXT_ALONE = "a mesh takes text alone: leave it out"
_SPEED = "a mesh has one speed: leave it out"


class TextBlock(RequestBody):
    type: Literal["text"]
    text: Text
    cache_control: Harmless = None
    citations: Harmless = None


_Blocks = Annotated[
    Text | Annotated[list[TextBlock], Field(max_length=MAX_MESSAGES, fail_fast=True)],
    ByKind('a text or a list of blocks, each {"type": "text", "text": ...}'),
]


def _joined(blocks: str | list[TextBlock] | None) -> str:
    return blocks if isinstance(blocks, str) else "\n".join(block.text for block in blocks or ())


class MessageBlock(RequestBody):
    """A text, a call of a tool (the assistant's: tool_use), or the result of one (the user's: tool_result). Each type has keys of its own;
    those of types that a mesh does not take are known so that the error is about the type. What another server's model thought (thinking)
    is taken, and left out: templates have no place for it."""

    type: Literal["text", "tool_use", "tool_result", "thinking", "redacted_thinking"]
    text: Text | None = None
    id: CallId | None = None
    name: Name | None = None
    input: SchemaObject | None = None
    tool_use_id: CallId | None = None
    content: _Blocks | None = None
    is_error: bool | None = None
    cache_control: Harmless = None
    citations: Harmless = None
    caller: Harmless = None
    source: Harmless = None
    title: Harmless = None
    context: Harmless = None
    thinking: Harmless = None
    signature: Harmless = None
    data: Harmless = None

    @model_validator(mode="after")
    def _has_its_keys(self) -> Self:
        needed = {"text": ("text",), "tool_use": ("id", "name", "input"), "tool_result": ("tool_use_id",)}
        require_keys(self, self.type, needed.get(self.type, ()))
        return self

    def call(self) -> dict[str, Any]:
        """As mesh.protocol.tools.ToolCall."""
        arguments = orjson.dumps(self.input).decode()
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": arguments}}

    def result(self) -> dict[str, Any]:
        """As mesh.protocol.generation.ChatMessage. Templates have no place for `is_error`, so the text says it."""
        text = _joined(self.content)
        return {"role": "tool", "tool_call_id": self.tool_use_id, "content": f"Error: {text}" if self.is_error else text}


class InputMessage(RequestBody):
    role: Literal["user", "assistant"]
    content: Annotated[
        Text | Annotated[list[MessageBlock], Field(max_length=MAX_MESSAGES, fail_fast=True)],
        ByKind("a text or a list of blocks"),
    ]

    @model_validator(mode="after")
    def _blocks_are_of_its_role(self) -> Self:
        wrong = {"tool_result"} if self.role == "assistant" else {"tool_use", "thinking", "redacted_thinking"}
        found = next((block.type for block in self._blocks if block.type in wrong), None)
        if found is not None:
            raise PydanticCustomError(
                "unmet", "has a block {type}, which messages of the role {role} do not have", {"type": found, "role": self.role}
            )
        return self

    @property
    def _blocks(self) -> list[MessageBlock]:
        return [] if isinstance(self.content, str) else self.content

    def turns(self) -> Iterator[dict[str, Any]]:
        """As mesh.protocol.generation.ChatMessage: each result of a tool is a message of its own."""
        if isinstance(self.content, str):
            yield {"role": self.role, "content": self.content}
            return
        texts, calls = list[str](), list[dict[str, Any]]()
        for block in self.content:
            if block.type == "text":
                texts.append(block.text or "")
            elif block.type == "tool_use":
                calls.append(block.call())
            elif block.type == "tool_result":
                if texts:
                    yield {"role": self.role, "content": "\n".join(texts)}
                    texts = []
                yield block.result()
        if texts or calls:
            yield {"role": self.role, "content": "\n".join(texts), **({"tool_calls": calls} if calls else {})}


class MessageTool(RequestBody):
    """`strict`: a call always has arguments that follow the schema."""

    type: Literal["custom"] | None = None
    name: Name
    description: Annotated[str, Field(max_length=65536)] | None = None
    input_schema: SchemaObject
    strict: bool | None = None
    cache_control: Harmless = None
    eager_input_streaming: Harmless = None

    def request(self) -> dict[str, Any]:
        """As mesh.protocol.tools.Tool."""
        about = self.model_dump(include={"name", "description", "strict"}, exclude_none=True)
        return {"type": "function", "function": {**about, "parameters": self.input_schema}}


class MessageToolChoice(RequestBody):
    """any: some tool; tool: the one of this name."""

    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _has_its_name(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            raise PydanticCustomError("unmet", 'needs name with type "tool", and with no other')
        return self

    def request(self) -> dict[str, Any]:
        named = {"type": "function", "function": {"name": self.name}}
        choice = {"auto": "auto", "any": "required", "none": "none"}.get(self.type, named)
        return {"tool_choice": choice} | ({"parallel_tool_calls": False} if self.disable_parallel_tool_use else {})


class Thinking(RequestBody):
    """A mesh shows no thinking of its own: a model that writes any writes it in the text."""

    type: Annotated[Literal["disabled"], Unmet("a mesh keeps no thinking apart: leave thinking out", ("disabled",))]
    budget_tokens: Harmless = None
    display: Harmless = None


class OutputFormat(RequestBody):
    type: Literal["json_schema"]
    form: SchemaObject = Field(alias="schema")


class OutputConfig(RequestBody):
    """`format`: the answer is JSON that follows a schema."""

    format: OutputFormat | None = None
    effort: Harmless = None


class CountRequest(RequestBody):
    """What a message continues: the fields that both routes have."""

    model: Label
    messages: Annotated[list[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    system: _Blocks | None = None
    tools: Annotated[list[MessageTool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    cache_control: Harmless = None
    context_management: Annotated[Any, Unmet("a mesh takes a conversation as it is: leave it out")] = None
    mcp_servers: Annotated[Any, Unmet("a mesh calls no servers: leave it out", ([],), {"type": "array", "maxItems": 0})] = None
    speed: Annotated[Any, Unmet(_SPEED, ("standard",))] = None

    def turns(self) -> list[dict[str, Any]]:
        """As mesh.protocol.generation.ChatMessage. Neighbouring texts of one role are one message: templates want roles to alternate."""
        made: list[dict[str, Any]] = []
        if self.system:
            made.append({"role": "system", "content": _joined(self.system)})
        for message in self.messages:
            for turn in message.turns():
                if made and made[-1].keys() == turn.keys() == {"role", "content"} and made[-1]["role"] == turn["role"]:
                    made[-1]["content"] += "\n" + turn["content"]
                else:
                    made.append(turn)
        return made

    @property
    def continues(self) -> bool:
        """Whether the last message is the beginning of the answer."""
        last = self.messages[-1]
        kinds = {"text"} if isinstance(last.content, str) else {block.type for block in last.content}
        return last.role == "assistant" and "text" in kinds and "tool_use" not in kinds

    def conversation(self) -> dict[str, Any]:
        """The fields of mesh.protocol.tokenizing.Tokenize."""
        offered = self.tools if self.tool_choice is None or self.tool_choice.type != "none" else None
        tools = {"tools": [tool.request() for tool in offered]} if offered else {}
        return {"messages": self.turns(), **({"continue_final_message": True} if self.continues else {}), **tools}


class MessagesRequest(SamplingFields, CountRequest):
    """ignore_eos, tool_format and the sampling parameters that Anthropic does not have are additions."""

    model_config = ConfigDict(json_schema_extra=describe_sampling)

    temperature: Annotated[float, Field(ge=0, le=1)] = 1.0
    logprobs: Annotated[Any, Unmet("messages have no place for log-probabilities: leave it out")] = None
    max_tokens: Positive
    stop_sequences: Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    ignore_eos: bool | None = None
    tool_format: ToolFormatName | None = None
    metadata: Harmless = None
    service_tier: Annotated[Any, Unmet("a mesh has one tier: leave it out", ("auto", "standard_only"))] = None
    container: Annotated[Any, Unmet("a mesh runs no containers: leave it out")] = None
    inference_geo: Annotated[Any, Unmet("a mesh is where its machines are: leave it out")] = None

    def fields(self) -> dict[str, Any]:
        """As mesh.protocol.generation.Generate."""
        names = {*SamplingFields.model_fields, "ignore_eos", "tool_format"} - {"logprobs"}
        given = self.model_dump(include=names & self.model_fields_set | {"temperature", "max_tokens"}, exclude_none=True)
        if self.stop_sequences:
            given["stop"] = self.stop_sequences
        forced = self.tool_choice is not None and self.tool_choice.type in ("any", "tool")  # then there is no text that could have a form
        if self.output_config is not None and self.output_config.format is not None and not forced:
            given["structured_outputs"] = {"json": self.output_config.format.form}
        if self.tool_choice is not None:
            given |= self.tool_choice.request()
        return given | self.conversation()


class AnswerBlock(ResponseBody):
    type: Literal["text", "tool_use"]
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessageUsage(ResponseBody):
    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class MessageResponse(ResponseBody):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class CountResponse(ResponseBody):
    input_tokens: int


class AnthropicErrorBody(ResponseBody):
    type: str
    message: str


class AnthropicError(ResponseBody):
    type: Literal["error"]
    error: AnthropicErrorBody
    request_id: str
