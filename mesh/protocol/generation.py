"""What a client asks of a coordinator."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from mesh.protocol.message import Message, Natural, Token, TokenId

__all__ = ["Cancel", "ChatMessage", "Generate", "Sampling", "TraceRequest"]


class ChatMessage(Message):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Sampling(Message):
    """How the next token is chosen; the fields, ranges and defaults of mesh.runtime.sampling.SamplingParams, checked there."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


class Generate(Message):
    """A generation request: exactly one of prompt, messages and tokens.

    `seed` None: the coordinator draws one. `session`: the caller's own name for the request; two requests of one name are the same
    request. `raw`: the prompt is used as it is, without the model's chat template. `attempt`: how often a named request was sent
    before; 0 promises that this is the first time. `given`: the tokens of the answer that the caller already has; the answer
    continues after them.
    """

    limit_bytes: ClassVar[int] = 4 * 1024 * 1024

    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    tokens: tuple[TokenId, ...] | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    raw: bool = False
    stream: bool = False
    session: Token | None = None
    attempt: Natural | None = None
    given: tuple[TokenId, ...] = ()

    @model_validator(mode="after")
    def _one_input(self) -> Generate:
        if sum(given is not None for given in (self.prompt, self.messages, self.tokens)) != 1:
            raise ValueError("give exactly one of prompt, messages and tokens")
        return self


class Cancel(Message):
    """Stop a generation. `request`: its name, as the coordinator's first document gives it."""

    request: Token


class TraceRequest(Message):
    """Ask a coordinator where the time of a generation went. `request` names one that runs, or one of the last that ended."""

    request: Token
