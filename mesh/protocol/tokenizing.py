"""What a client asks of a model's tokenizer: the tokens of a text or of messages, and the text of tokens."""

from __future__ import annotations

from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from mesh.protocol.generation import MAX_CHARACTERS, MAX_MESSAGES, ChatMessage, Text
from mesh.protocol.message import MAX_INT, MAX_TOKENS, Message, TokenIds
from mesh.protocol.template_values import TemplateValues
from mesh.protocol.tools import MAX_TOOLS, Tool

__all__ = ["Detokenize", "Detokenized", "Tokenize", "Tokenized"]

_ANSWER_BYTES = 64 * 1024 * 1024
"""The server takes far less in one message; this is what a client reads at most."""


class Tokenize(Message):
    """Exactly one of prompt and messages. A prompt is tokenized as it is, without the chat template, and may spell control tokens.

    `special`: a prompt begins with the tokens that the model wants there, such as a bos. `tools`, `add_generation_prompt`,
    `continue_final_message`, `parse_special`, `chat_template_kwargs`: as in mesh.protocol.generation.Generate. `names`: the tokens as the
    vocabulary has them, too.
    """

    limit_bytes: ClassVar[int] = MAX_CHARACTERS
    null_is_absent: ClassVar[bool] = True

    prompt: Text | None = None
    messages: Annotated[tuple[ChatMessage, ...], Field(max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    special: bool = True
    tools: Annotated[tuple[Tool, ...], Field(max_length=MAX_TOOLS, fail_fast=True)] = ()
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    parse_special: bool = False
    chat_template_kwargs: TemplateValues = Field(default_factory=dict)
    names: bool = False

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        return self


class Tokenized(Message):
    """`context`: the most tokens that a prompt and its answer have together."""

    limit_bytes: ClassVar[int] = _ANSWER_BYTES

    tokens: TokenIds
    context: Annotated[int, Field(ge=0, le=MAX_INT)]
    names: Annotated[tuple[Annotated[str, Field(max_length=4096)], ...], Field(max_length=MAX_TOKENS, fail_fast=True)] | None = None


class Detokenize(Message):
    """Control tokens are spelled, so that the text of a prompt's tokens is the prompt."""

    limit_bytes: ClassVar[int] = MAX_CHARACTERS

    tokens: TokenIds


class Detokenized(Message):
    limit_bytes: ClassVar[int] = _ANSWER_BYTES

    text: Annotated[str, Field(max_length=_ANSWER_BYTES)]
