"""What form an answer must have: JSON by a schema, a regular expression, one of several texts, or a grammar.

StructuredOutputs   as a request says it: exactly one form. The keys are those that vLLM's API has
Grammar             as a coordinator sends it to the shard that samples: one text, made by mesh.model.grammar
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = [
    "MAX_BIASES",
    "MAX_CHOICES",
    "MAX_GRAMMAR_BYTES",
    "MAX_SCHEMA_BYTES",
    "Bias",
    "Grammar",
    "LogitBias",
    "SchemaObject",
    "StructuredOutputs",
]

MAX_SCHEMA_BYTES: Final = 64 * 1024
"""Of a schema as compact JSON, of a grammar and of a regular expression."""
MAX_CHOICES: Final = 1000
MAX_GRAMMAR_BYTES: Final = 256 * 1024
"""Of what a coordinator makes of a request: a schema with its options, or those of all tools."""
MAX_BIASES: Final = 300
"""Tokens of one logit_bias, as OpenAI has it."""

Grammar = Annotated[str, Field(max_length=MAX_GRAMMAR_BYTES)]
Bias = Annotated[float, Field(ge=-100, le=100)]
LogitBias = Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias], Field(max_length=MAX_BIASES)]
"""Token id, as a JSON key -> what is added to its logit; -100 forbids the token in practice."""
SchemaObject = Annotated[dict[Annotated[str, Field(max_length=4096)], Any], Field(max_length=4096)]
"""A JSON schema. What is in it is bounded by mesh.model.grammar."""
_Text = Annotated[str, Field(min_length=1, max_length=MAX_SCHEMA_BYTES)]
_Choice = Annotated[str, Field(min_length=1, max_length=4096)]


class StructuredOutputs(BaseModel):
    """The form of an answer. Exactly one of: json (a JSON schema), json_object (any JSON object), regex, choice, and grammar (Lark as
    llguidance reads it, or GBNF)."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,
        populate_by_name=True,
        serialize_by_alias=True,
    )

    json_schema: SchemaObject | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: _Text | None = None
    choice: Annotated[tuple[_Choice, ...], Field(min_length=1, max_length=MAX_CHOICES, fail_fast=True, strict=False)] | None = None
    grammar: _Text | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        forms = (self.json_schema, self.json_object or None, self.regex, self.choice, self.grammar)
        if sum(form is not None for form in forms) != 1:
            raise ValueError("give exactly one of json, json_object (true), regex, choice and grammar")
        return self

    def request(self) -> dict[str, Any]:
        """As a request has it: only what is given, by the names on the wire."""
        return self.model_dump(mode="json", exclude_none=True, by_alias=True)
