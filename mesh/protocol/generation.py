"""What a client asks of a coordinator."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, ClassVar, Final, Literal, Self

import orjson
from pydantic import BeforeValidator, ConfigDict, Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from mesh.errors import BadRequest, PayloadTooLarge
from mesh.protocol.embedding import Embed
from mesh.protocol.message import MAX_STOP_CHARACTERS, MAX_STOPS, AnswerEpoch, Label, Message, Seconds, Token, TokenIds
from mesh.protocol.sampling import SamplingFields, SamplingParams, without_ranges
from mesh.protocol.structured import LogitBias, StructuredOutputs
from mesh.protocol.template_values import TemplateValues
from mesh.protocol.tools import MAX_CALLS, MAX_TOOLS, CallId, NamedChoice, Tool, ToolCall, ToolChoice, ToolFormatName, must_call
from mesh.settings.units import format_bytes

__all__ = [
    "MAX_CHARACTERS",
    "MAX_MESSAGES",
    "Cancel",
    "ChatMessage",
    "Content",
    "Generate",
    "TraceReply",
    "TraceRequest",
    "public_id",
    "require_answer_fits",
    "without_prefix",
]

MAX_CHARACTERS: Final = 4 * 1024 * 1024
"""Of a prompt or a message, and bytes of a whole request."""
MAX_MESSAGES: Final = 10_000
Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
StopText = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]
_TOKEN_BYTES = 16
"""What a token takes in an answer: its id and its text."""
_LOGPROB_BYTES = 64
"""What a token and each of its alternatives take where log-probabilities are asked for."""
_NUMBER_BYTES = 24
"""What a number of an embedding takes."""
_ANSWER_BYTES = 4096
"""What an answer takes besides its tokens."""


def public_id(session: str) -> str:
    """The name under which a generation is shown: in its documents, in statistics and traces. It says which generation is meant, and gives
    no right to it. Whoever knows the session itself may go on with the generation, cancel it and read its trace."""
    return hashlib.sha256(session.encode()).hexdigest()[:24]


def without_prefix(id: str) -> str:
    """The public id in an id as OpenAI's and Anthropic's APIs show it."""
    return id.removeprefix("chatcmpl-").removeprefix("cmpl-").removeprefix("resp_").removeprefix("msg_")


def _content(value: Any, info: ValidationInfo) -> Any:
    """Only a message that calls tools may have no text."""
    if value is None and info.data.get("tool_calls"):
        return ""
    if value is None:
        raise PydanticCustomError("missing", "Field required")
    return value


Content = Annotated[Text, Field(default_factory=lambda: None, validate_default=True), BeforeValidator(_content)]
"""The text of a message whose fields have its calls before it."""


class ChatMessage(Message):
    role: Literal["system", "user", "assistant", "tool"]
    tool_calls: Annotated[tuple[ToolCall, ...], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: CallId | None = None
    content: Content

    def template(self) -> dict[str, Any]:
        """As chat templates take it: arguments of calls as objects. BadRequest: they are none."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [_template_call(call) for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


def _template_call(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = orjson.loads(call.function.arguments or "{}")
    except orjson.JSONDecodeError:
        arguments = None
    if not isinstance(arguments, dict):
        raise BadRequest(f"the arguments of the call {call.id} are no JSON object: give them as {{...}} in a text", field="messages")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


class Input(Message):
    """What a generation continues, and how far: exactly one of prompt, messages and tokens."""

    prompt: Text | None = None
    messages: Annotated[tuple[ChatMessage, ...], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tokens: TokenIds | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] = 128

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if sum(given is not None for given in (self.prompt, self.messages, self.tokens)) != 1:
            raise ValueError("give exactly one of prompt, messages and tokens")
        return self


@without_ranges
class Generate(SamplingFields, Input):
    """A generation request: the input, the sampling parameters, and what is done with the answer.

    `tools`: what the answer may call; `tool_choice`: whether it does (None: auto); `parallel_tool_calls`: more than once; `tool_format`:
    how calls are written (None: as the chat template says). `structured_outputs`: the form that the answer must have. `logit_bias`: what
    is added to the logits of tokens, by their ids. `embed`: the answer is a vector in place of tokens: the prompt is used as it is, without
    the chat template, and ends as the model's tokenizer ends a text; fields about tokens of the answer are refused, and max_tokens and
    seed mean nothing.
    `seed` None: the coordinator draws one. `session`: the caller's own name for the request; two requests of one name are the same
    request. It is also the caller's proof that the generation is its own, so it should be one that nobody guesses. `raw`: the prompt is
    used as it is, without the model's chat template. `add_generation_prompt`: the template begins the assistant's turn (None: it does,
    unless the last message is continued). `continue_final_message`: the last message, the assistant's, is the beginning of the answer,
    which goes on from there. `parse_special`: a control token that a message spells, such as <|im_end|>, is that token; otherwise it is
    plain text. In a raw prompt it always is one. `chat_template_kwargs`: values for the chat template, by its own names. `attempt`: how
    often a named request was sent before; 0 promises that this is the first time. `given`: the tokens of the answer that the caller already
    has; the answer continues after them.
    `epoch`: the highest of the documents that the caller has seen; those that follow have no lower one.
    `cache_salt`: the generation begins with what an earlier one has left in the mesh only where both have the same salt; a gateway sets
    that of its caller (docs/prefix-reuse.md).
    `waited_s`: how long the generation has waited already for layers that no shard serves; the wait goes on from there, with whichever
    coordinator. `traceparent`: the W3C trace context of the caller, where the message does not have it as a NATS header.
    """

    limit_bytes: ClassVar[int] = MAX_CHARACTERS
    null_is_absent: ClassVar[bool] = True

    stop: Annotated[tuple[StopText, ...], Field(max_length=MAX_STOPS, fail_fast=True)] = ()
    logit_bias: LogitBias = Field(default_factory=dict)
    structured_outputs: StructuredOutputs | None = None
    tools: Annotated[tuple[Tool, ...], Field(max_length=MAX_TOOLS, fail_fast=True)] = ()
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    tool_format: ToolFormatName | None = None
    embed: Embed | None = None
    ignore_eos: bool = False
    raw: bool = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    parse_special: bool = False
    chat_template_kwargs: TemplateValues = Field(default_factory=dict)
    stream: bool = False
    session: Token | None = None
    attempt: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    given: TokenIds = ()
    epoch: AnswerEpoch | None = None
    waited_s: Seconds = 0.0
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    traceparent: Annotated[str, Field(max_length=128)] | None = None

    @model_validator(mode="after")
    def _tools_fit(self) -> Self:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("tools has two functions of one name: give each its own")
        if self.tool_choice not in (None, "auto", "none") and not names:
            raise ValueError("tool_choice needs tools: give them, or leave it out")
        if isinstance(self.tool_choice, NamedChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name}, which is none of the tools")
        known: set[str] = set()
        for index, message in enumerate(self.messages or ()):
            if message.tool_calls and message.role != "assistant":
                raise ValueError(f"messages.{index} has tool_calls, which only messages of the role assistant have")
            if message.tool_call_id is not None and (message.role != "tool" or message.tool_call_id not in known):
                raise ValueError(
                    f"messages.{index} answers the call {message.tool_call_id[:64]!r}, which no message of the assistant before it has made"
                )
            known.update(call.id for call in message.tool_calls or ())
        return self

    @property
    def offers_tools(self) -> bool:
        """Whether the answer may call something."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def forces_calls(self) -> bool:
        """Whether a grammar has to see to it that calls are made, or are right."""
        return self.offers_tools and (must_call(self.tool_choice) or any(tool.function.strict for tool in self.tools))

    @model_validator(mode="after")
    def _can_be_continued(self) -> Self:
        if not self.continue_final_message:
            return self
        if not self.messages or self.messages[-1].role != "assistant":
            raise ValueError("continue_final_message needs messages, of which the last one is the assistant's")
        if self.add_generation_prompt:
            raise ValueError("continue_final_message goes on with a turn, and add_generation_prompt begins one: give one of them")
        return self

    @model_validator(mode="after")
    def _has_a_template(self) -> Self:
        if self.chat_template_kwargs and (self.tokens is not None or self.raw or self.embed is not None):
            raise ValueError("chat_template_kwargs needs a chat template, which tokens, raw prompts and embeddings have not: leave it out")
        return self

    @model_validator(mode="after")
    def _embeds_alone(self) -> Self:
        if self.embed is None:
            return self
        fields = (*SamplingFields.model_fields, "stop", "logit_bias", "structured_outputs", "tools", "given", "ignore_eos")
        for name in fields:
            if name != "seed" and getattr(self, name) != Generate.model_fields[name].get_default(call_default_factory=True):
                raise ValueError(f"an embedding has no tokens, so {name} means nothing: leave out {name} or embed")
        return self

    @property
    def operation(self) -> str:
        """Its name in traces and metrics, by OpenTelemetry's conventions."""
        if self.embed is not None:
            return "embeddings"
        return "text_completion" if self.messages is None else "chat"

    @property
    def longest(self) -> int:
        """The most tokens that the answer has."""
        return self.max_tokens if self.embed is None else 0

    def answer_bytes(self, tokens: int | None = None) -> int:
        """About what the answer takes in one message, if it has `tokens` tokens; None: as many as it may have."""
        each = _TOKEN_BYTES + (0 if self.logprobs is None else _LOGPROB_BYTES * (self.logprobs + 1))
        return _ANSWER_BYTES + each * (self.longest if tokens is None else tokens)

    def sampling(self, *, seed: int, grammar: str | None = None) -> SamplingParams:
        """The sampling parameters, with `seed` where the request has none. BadRequest names a field that is out of range."""
        values = {name: getattr(self, name) for name in SamplingFields.model_fields}
        own = {
            "seed": seed if self.seed is None else self.seed,
            "grammar": grammar,
            "logit_bias": self.logit_bias,
            "embed": self.embed is not None,
        }
        return SamplingParams(**{**values, **own})


def require_answer_fits(request: Generate, limit_bytes: int, *, hidden_size: int = 0) -> None:
    """PayloadTooLarge where the answer to `request`, in one message, would be larger than the server takes. `hidden_size`: the numbers of
    a vector."""
    if request.embed is not None:
        _require_vector_fits(request.embed, limit_bytes, hidden_size)
        return
    size = request.answer_bytes()
    if size <= limit_bytes or request.stream:
        return
    each = request.answer_bytes(1) - request.answer_bytes(0)
    most = max((limit_bytes - _ANSWER_BYTES) // each, 0)
    less = " without logprobs," if request.logprobs is not None else ""
    raise PayloadTooLarge(
        f"the answer may take {format_bytes(size)} in one message, and the server takes {format_bytes(limit_bytes)} (max_payload): "
        f"ask with stream: true,{less} with max_tokens up to {most}, or raise max_payload in the server's configuration",
        size_bytes=size,
        limit_bytes=limit_bytes,
    )


def _require_vector_fits(embed: Embed, limit_bytes: int, hidden_size: int) -> None:
    size = _ANSWER_BYTES + _NUMBER_BYTES * min(hidden_size, embed.dimensions or hidden_size)
    if size > limit_bytes:
        raise PayloadTooLarge(
            f"an embedding may take {format_bytes(size)} in one message, and the server takes {format_bytes(limit_bytes)} (max_payload): "
            f"ask for dimensions up to {max((limit_bytes - _ANSWER_BYTES) // _NUMBER_BYTES, 1)}, or raise max_payload in the server's "
            "configuration",
            size_bytes=size,
            limit_bytes=limit_bytes,
        )


class Cancel(Message):
    """Stop a generation. `request`: its session; where the caller named none, the name in the coordinator's first document. `gone`: the
    client has left, and may come back: what was generated is kept for a while."""

    request: Token
    gone: bool = False


class TraceRequest(Message):
    """Ask a coordinator where the time of a generation went, of one that runs or one of the last that ended. `request`: its session, or
    its public id where the topic says so."""

    request: Token


class TraceReply(Message):
    """Where the time of a generation went (docs/client.md has the keys). None: this coordinator does not know the generation."""

    model_config = ConfigDict(extra="ignore")
    limit_bytes: ClassVar[int] = 8 * 1024 * 1024

    trace: Annotated[dict[Label, Any], Field(max_length=256)] | None
