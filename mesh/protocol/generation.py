"""What a client asks of a coordinator."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from mesh.protocol.message import Message, Natural, Seconds, Token, TokenId
from mesh.protocol.sampling import SamplingFields, SamplingParams, without_ranges

__all__ = ["Cancel", "ChatMessage", "Generate", "TraceReply", "TraceRequest"]


class ChatMessage(Message):
    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Input(Message):
    """What a generation continues, and how far: exactly one of prompt, messages and tokens."""

    prompt: str | None = None
    messages: tuple[ChatMessage, ...] | None = None
    tokens: tuple[TokenId, ...] | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 128

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if sum(given is not None for given in (self.prompt, self.messages, self.tokens)) != 1:
            raise ValueError("give exactly one of prompt, messages and tokens")
        return self


@without_ranges
class Generate(SamplingFields, Input):
    """A generation request: the input, the sampling parameters, and what is done with the answer.

    `seed` None: the coordinator draws one. `session`: the caller's own name for the request; two requests of one name are the same
    request. `raw`: the prompt is used as it is, without the model's chat template. `attempt`: how often a named request was sent
    before; 0 promises that this is the first time. `given`: the tokens of the answer that the caller already has; the answer
    continues after them. `waited_s`: how long the generation has waited already for layers that no shard serves; the wait goes on from
    there, with whichever coordinator.
    """

    limit_bytes: ClassVar[int] = 4 * 1024 * 1024

    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    raw: bool = False
    stream: bool = False
    session: Token | None = None
    attempt: Natural | None = None
    given: tuple[TokenId, ...] = ()
    waited_s: Seconds = 0.0

    def sampling(self, *, seed: int) -> SamplingParams:
        """The sampling parameters, with `seed` where the request has none. BadRequest names a field that is out of range."""
        values = {name: getattr(self, name) for name in SamplingFields.model_fields}
        return SamplingParams(**{**values, "seed": seed if self.seed is None else self.seed})


class Cancel(Message):
    """Stop a generation. `request`: its name, as the coordinator's first document gives it."""

    request: Token


class TraceRequest(Message):
    """Ask a coordinator where the time of a generation went. `request` names one that runs, or one of the last that ended."""

    request: Token


class TraceReply(Message):
    """Where the time of a generation went (docs/client.md has the keys). None: this coordinator does not know the generation."""

    model_config = ConfigDict(extra="ignore")
    limit_bytes: ClassVar[int] = 8 * 1024 * 1024

    trace: dict[str, Any] | None
