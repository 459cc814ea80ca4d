"""The documents of the mesh's own HTTP API. The OpenAPI description is made from these."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mesh.gateway.bodies import RequestBody, ResponseBody, Usage
from mesh.protocol.batches import MAX_BATCH
from mesh.protocol.generation import MAX_MESSAGES, Content, Text
from mesh.protocol.message import MAX_STOP_CHARACTERS, MAX_STOPS, MAX_TOKENS, Label
from mesh.protocol.sampling import SamplingFields
from mesh.protocol.structured import LogitBias, StructuredOutputs
from mesh.protocol.template_values import TemplateValues
from mesh.protocol.tools import MAX_CALLS, MAX_TOOLS, CallId, Tool, ToolCall, ToolChoice, ToolFormatName

__all__ = [
    "BatchJob",
    "BatchProgress",
    "BatchRequest",
    "BatchResponse",
    "BatchResult",
    "ErrorBody",
    "ErrorResponse",
    "HealthResponse",
    "InferenceRequest",
    "InferenceResponse",
    "LiveResponse",
    "StatsResponse",
]

_MAX_INT = 2**31 - 1
TokenId = Annotated[int, Field(ge=0, le=_MAX_INT)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]


class ChatMessage(RequestBody):
    role: Literal["system", "user", "assistant", "tool"]
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_CALLS, fail_fast=True)] | None = None
    tool_call_id: CallId | None = None
    content: Content


class Sampling(SamplingFields, RequestBody):
    """How tokens are chosen, and when the answer ends."""

    max_tokens: Annotated[int, Field(ge=1, le=_MAX_INT)] | None = None
    stop: list[StopText] = Field(default_factory=list, max_length=MAX_STOPS, fail_fast=True)
    ignore_eos: bool = False
    logit_bias: LogitBias | None = None
    structured_outputs: StructuredOutputs | None = None


class InferenceItem(Sampling):
    """Exactly one of prompt, messages and tokens. `raw`: no chat template around the prompt. `continue_final_message`: the answer goes on
    with the last message, the assistant's. `parse_special`: a control token that a message spells is that token, and not plain text.
    `chat_template_kwargs`: values for the chat template, by its own names."""

    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_TOKENS, fail_fast=True)] | None = None
    raw: bool = False
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    parse_special: bool = False
    chat_template_kwargs: TemplateValues | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    tool_format: ToolFormatName | None = None
    model: Label | None = None

    def generate_fields(self) -> dict[str, Any]:
        """For mesh.client."""
        fields = self.model_dump(exclude={"model", "stream", "structured_outputs"}, exclude_none=True)
        form = self.structured_outputs
        return fields if form is None else fields | {"structured_outputs": form.request()}


class InferenceRequest(InferenceItem):
    """`stream`: server-sent events, one a token, the last with `done`."""

    stream: bool = False


class BatchRequest(RequestBody):
    """Many requests, answered together, in their order; with `async` kept in the mesh, and answered when they are asked for."""

    requests: Annotated[list[InferenceItem], Field(min_length=1, max_length=MAX_BATCH, fail_fast=True)]
    kept: Annotated[bool, Field(alias="async")] = False


class Timing(ResponseBody):
    """Seconds, as the coordinator measured them; `hops`: where a mean decode step went."""

    queue_s: float
    prefill_s: float
    first_token_s: float | None
    decode_s: float
    decode_step_s: float
    tokens_per_s: float | None
    total_s: float
    restarts: int
    hops: dict[str, float]


class TopToken(ResponseBody):
    """`piece`: the token's own text. `bytes`: what it adds to the text, where that is not its piece: part of a character, or nothing
    for a control token."""

    token: int
    piece: str | None
    logprob: float
    bytes: list[int] | None = None


class TokenLogprob(ResponseBody):
    """As TopToken."""

    token: int
    piece: str | None
    logprob: float | None
    top: list[TopToken]
    bytes: list[int] | None = None


class InferenceResponse(ResponseBody):
    id: str
    model: str
    text: str | None
    tokens: list[int]
    finish_reason: Literal["stop", "length"]
    usage: Usage
    timing: Timing
    logprobs: list[TokenLogprob] | None = None
    tool_calls: list[ToolCall] | None = None
    content: str | None = None
    tool_format: ToolFormatName | None = None
    stop_text: str | None = None


class ErrorBody(ResponseBody):
    """`code` is stable; `field` the key that is wrong; `retryable`: the same request can succeed later."""

    code: str
    message: str
    field: str | None
    retryable: bool
    retry_after_s: float | None


class ErrorResponse(ResponseBody):
    error: ErrorBody
    request_id: str


class BatchResult(ResponseBody):
    """Of one request: `result`, or `error`."""

    index: int
    result: InferenceResponse | None = None
    error: ErrorBody | None = None


class BatchResponse(ResponseBody):
    results: list[BatchResult]
    usage: Usage


class BatchJob(ResponseBody):
    """A batch that is kept. `total` = waiting + `running` + `done` + `failed` + `cancelled`."""

    id: str
    model: str
    state: Literal["queued", "running", "done", "failed", "cancelled"]
    total: int
    running: int
    done: int
    failed: int
    cancelled: int
    submitted_unix_s: float


class BatchProgress(BatchJob):
    """`results`: of those asked for, what has ended; `next`: the offset to ask with for more."""

    results: list[BatchResult]
    next: int | None


class RangeHealth(ResponseBody):
    """A layer range as `A-B`; the shards that are ready for it, and the others there."""

    layers: str
    ready: list[str]
    others: list[str]


class ModelHealth(ResponseBody):
    """`last_step_s`: how long ago a step came back. `probed`: two tokens were generated to see. `ranges`: for callers with the
    scope admin."""

    model: str
    ready: bool
    reason: str
    last_step_s: float | None
    probed: bool
    ranges: list[RangeHealth] | None = None


class HealthResponse(ResponseBody):
    """`status` ready: a token can be generated now."""

    status: Literal["ready", "not_ready"]
    reason: str
    models: list[ModelHealth]


class LiveResponse(ResponseBody):
    status: Literal["live"] = "live"


class StatsResponse(ResponseBody):
    """What shards and coordinators say of themselves, and what this gateway has done since its start."""

    shards: list[dict[str, Any]]
    coordinators: list[dict[str, Any]]
    gateway: dict[str, Any]
