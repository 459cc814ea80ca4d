"""The sampling parameters: every name, type, range, default and description, stated once.

    SamplingFields   the table. NATS requests and both HTTP APIs inherit it; command-line flags and the sampler's columns are made from it
    SamplingParams   the values of one session, checked: what a coordinator sends to a shard, and what the sampler takes

A new parameter is one line here, and its arithmetic in mesh/runtime/sampling.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, ValidationError, model_validator

from mesh.errors import BadRequest
from mesh.protocol.structured import Grammar, LogitBias

__all__ = ["MAX_LOGPROBS", "SamplingFields", "SamplingParams", "without_ranges"]

MAX_LOGPROBS: Final = 20
"""The most alternatives that are reported with a token."""

T = TypeVar("T", bound=BaseModel)

_Seed = Annotated[int, Field(ge=0, lt=2**63)]
_Any64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Count = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


class SamplingFields(BaseModel):
    """The table of parameters. The order of the fields is the order of keys on the wire and of the sampler's columns."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    temperature: Annotated[float, Field(ge=0, le=100, description="randomness; 0 always takes the likeliest token")] = 0.0
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1, description="draw among the N likeliest tokens; 0 is off")] = 0
    top_p: Annotated[float, Field(gt=0, le=1, description="draw among the likeliest tokens that add up to this; 1 is off")] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1, description="drop tokens less likely than this times the likeliest; 0 is off")] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=100, description="weaken tokens of prompt and answer; 1 is off")] = 1.0
    presence_penalty: Annotated[float, Field(ge=-10, le=10, description="weaken tokens of the answer once; 0 is off")] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-10, le=10, description="weaken tokens of the answer each time; 0 is off")] = 0.0
    seed: Annotated[_Seed | None, Field(description="the same seed draws the same tokens")] = None
    logprobs: Annotated[_Count | None, Field(description="log-probabilities of each token and of the N likeliest ones")] = None


class SamplingParams(SamplingFields):
    """The parameters of one session. Making one raises BadRequest, which names the first field whose value is wrong.

    grammar: the answer follows it (mesh.model.grammar). logit_bias: what is added to the logits of tokens. embed: no token is drawn; the
    answer is the hidden state of the last position, after the final norm.
    """

    grammar: Grammar | None = None
    logit_bias: LogitBias = Field(default_factory=dict)
    embed: bool = False

    @model_validator(mode="wrap")
    @classmethod
    def _named(cls, values: Any, handler: ModelWrapValidatorHandler[SamplingParams]) -> SamplingParams:
        try:
            return handler(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            if first["type"] == "extra_forbidden":
                raise  # what is wrong is the message, not a value
            field = str(first["loc"][0]) if first["loc"] else "sampling"
            message = first["msg"].replace("Input should", "should")
            raise BadRequest(f"{field} is {first['input']!r}: it {message}", field=field) from None

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def plain(self) -> bool:
        """Whether nothing but the likeliest token is wanted."""
        return self.likeliest_allowed and self.grammar is None

    @property
    def likeliest_allowed(self) -> bool:
        """Whether nothing but the likeliest token is wanted, or the likeliest of those that the grammar allows."""
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return self.greedy and penalties == (1.0, 0.0, 0.0) and self.logprobs is None and not self.logit_bias

    @property
    def shaped(self) -> bool:
        """Whether the logits are changed before a token is chosen."""
        return self.grammar is not None or bool(self.logit_bias)


def without_ranges(model: type[T]) -> type[T]:
    """`model`, a subclass of SamplingFields, whose numbers are not compared with their ranges when it is parsed, only with what 64 bits
    hold.

    A request is checked when its SamplingParams are made. So one bad request does not spoil the batch it came with.
    """
    for name in SamplingFields.model_fields:
        field = model.model_fields[name]
        field.metadata = []  # the table has no other metadata than ranges
        if field.annotation is int:
            field.annotation = _Any64
        elif field.annotation in (_Seed | None, _Count | None):
            field.annotation = _Any64 | None
    model.model_rebuild(force=True)
    return model
