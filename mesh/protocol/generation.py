"""What a client asks of a coordinator."""

from __future__ import annotations

import hashlib
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import ConfigDict, Field, model_validator

from mesh.protocol.message import MAX_STOP_CHARACTERS, MAX_STOPS, AnswerEpoch, Label, Message, Token, TokenIds
from mesh.protocol.sampling import SamplingFields, SamplingParams, without_ranges

__all__ = ["MAX_CHARACTERS", "MAX_MESSAGES", "Cancel", "ChatMessage", "Generate", "TraceReply", "TraceRequest", "public_id"]

MAX_CHARACTERS: Final = 4 * 1024 * 1024
"""Of a prompt or a message, and bytes of a whole request."""
MAX_MESSAGES: Final = 10_000
Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
StopText = Annotated[str, Field(max_length=MAX_STOP_CHARACTERS)]


def public_id(session: str) -> str:
    """The name under which a generation is shown: in its documents, in statistics and traces. It says which generation is meant, and gives
    no right to it. Whoever knows the session itself may go on with the generation, cancel it and read its trace."""
    return hashlib.sha256(session.encode()).hexdigest()[:24]


class ChatMessage(Message):
    role: Literal["system", "user", "assistant", "tool"]
    content: Text


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

    `seed` None: the coordinator draws one. `session`: the caller's own name for the request; two requests of one name are the same
    request. It is also the caller's proof that the generation is its own, so it should be one that nobody guesses. `raw`: the prompt is
    used as it is, without the model's chat template. `attempt`: how often a named request was sent before; 0 promises that this is the
    first time. `given`: the tokens of the answer that the caller already has; the answer continues after them.
    `epoch`: the highest of the documents that the caller has seen; those that follow have no lower one.
    """

    limit_bytes: ClassVar[int] = MAX_CHARACTERS

    stop: Annotated[tuple[StopText, ...], Field(max_length=MAX_STOPS, fail_fast=True)] = ()
    ignore_eos: bool = False
    raw: bool = False
    stream: bool = False
    session: Token | None = None
    attempt: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    given: TokenIds = ()
    epoch: AnswerEpoch | None = None

    def sampling(self, *, seed: int) -> SamplingParams:
        """The sampling parameters, with `seed` where the request has none. BadRequest names a field that is out of range."""
        values = {name: getattr(self, name) for name in SamplingFields.model_fields}
        return SamplingParams(**{**values, "seed": seed if self.seed is None else self.seed})


class Cancel(Message):
    """Stop a generation. `request`: its session; where the caller named none, the name in the coordinator's first document."""

    request: Token


class TraceRequest(Message):
    """Ask a coordinator where the time of a generation went, of one that runs or one of the last that ended. `request`: its session, or
    its public id where the topic says so."""

    request: Token


class TraceReply(Message):
    """Where the time of a generation went (docs/client.md has the keys). None: this coordinator does not know the generation."""

    model_config = ConfigDict(extra="ignore")
    limit_bytes: ClassVar[int] = 8 * 1024 * 1024

    trace: Annotated[dict[Label, Any], Field(max_length=256)] | None
