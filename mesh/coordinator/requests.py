"""A request as it arrives becomes what the core takes: every field is checked, and the prompt is made tokens.

What cannot fit into the context is refused before it costs anything: by the size of its message before that is parsed, then by the
number of its characters, messages or tokens before the prompt is tokenized. The rest is tokenized by prompt_pool.py.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from mesh.coordinator.core.session import GenerationRequest
from mesh.coordinator.prompt_pool import PromptPool
from mesh.coordinator.prompt_process import ChatOptions
from mesh.errors import BadRequest, Busy, MeshError, PromptTooLong
from mesh.model.manifest import Manifest
from mesh.model.tokenizer import Tokenizer
from mesh.protocol import documents, topics
from mesh.protocol.generation import ChatMessage, Generate
from mesh.protocol.message import MAX_STOP_CHARACTERS, MAX_STOPS
from mesh.protocol.rights import inbox_user
from mesh.protocol.structured import MAX_SCHEMA_BYTES, StructuredOutputs
from mesh.protocol.tokenizing import Tokenize
from mesh.protocol.tools import Tool, must_call
from mesh.settings.schema import ReuseScope

__all__ = ["PrefixReuse", "Requests", "options_of"]

_CHARACTER_BYTES: Final = 12
"""Of JSON, at most for a character: two \\uXXXX."""
_TOKEN_BYTES: Final = 12
_MESSAGE_BYTES: Final = 64  # beside its content
_OTHER_BYTES: Final = 64 * 1024 + 4 * MAX_SCHEMA_BYTES + MAX_STOPS * MAX_STOP_CHARACTERS * _CHARACTER_BYTES
_FORM: Final = "structured_outputs"
_MOST_BYTES: Final = 64 * 1024 * 1024
"""Of all requests that are prepared at once."""


@dataclass(frozen=True, slots=True)
class PrefixReuse:
    """Whose sessions may begin with what earlier ones have left. `exact`: hidden states travel as they were computed; what was computed of
    others is kept apart."""

    scope: ReuseScope = "off"
    exact: bool = True

    def salt(self, caller: str) -> str | None:
        """Sessions of equal salt share; None: it shares with none."""
        if self.scope == "off":
            return None
        whose = caller if self.scope == "tenant" else ""
        return f"{'exact' if self.exact else 'bf16'} {whose}"


class Requests:
    """`context()`: the most positions that a session can have now; None: as many as the model has. `most_preparing`: requests that may be
    prepared at once. `reuse`: which of them may begin with what others have left."""

    def __init__(
        self,
        manifest: Manifest,
        tokenizer: Tokenizer | None,
        pool: PromptPool | None,
        *,
        context: Callable[[], int | None] = lambda: None,
        most_preparing: int = 256,
        reuse: PrefixReuse = PrefixReuse(),
    ) -> None:
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._pool = pool
        self._context = context
        self._most_preparing = most_preparing
        self._reuse = reuse
        self._preparing = 0
        self._preparing_bytes = 0

    @property
    def context(self) -> int:
        now = self._context()
        return self._manifest.context_length if now is None else min(now, self._manifest.context_length)

    @property
    def max_prompt_characters(self) -> int | None:
        """A longer prompt does not fit, whatever it says. None: the model has no tokenizer."""
        return None if self._tokenizer is None else self.context * self._tokenizer.characters_per_token

    def most_bytes(self) -> int:
        """No request that fits has more."""
        characters = self.max_prompt_characters or 0
        fits = _OTHER_BYTES + characters * _CHARACTER_BYTES + self.context * (2 * _TOKEN_BYTES + _MESSAGE_BYTES)
        return min(fits, Generate.limit_bytes)

    def too_large(self, size: int) -> MeshError:
        """The answer to a request of so many bytes."""
        if size > Generate.limit_bytes:
            return documents.too_large(Generate, size, Generate.limit_bytes)
        return _too_long(f"the request has {size:,} bytes", f"no request that fits has more than {self.most_bytes():,}", self.context)

    def parse(self, data: bytes) -> Generate:
        """The request in `data`. PromptTooLong where it cannot fit, unread where its size alone says so."""
        if len(data) > self.most_bytes():
            raise self.too_large(len(data))
        message = topics.GENERATE.parse(data)
        if message.tokens is not None:
            self._require_tokens(len(message.tokens), message.longest)
        elif self._tokenizer is not None:
            self._require_text_fits(message)
        return message

    def parse_text(self, data: bytes) -> Tokenize:
        """The text or the messages in `data`. Errors as of `parse`."""
        if len(data) > self.most_bytes():
            raise self.too_large(len(data))
        message = topics.TOKENIZE.parse(data)
        self._require_text_fits(message)
        return message

    def _require_text_fits(self, message: Generate | Tokenize) -> None:
        context, characters = self.context, self.max_prompt_characters or 0
        size = len(message.prompt or "") + sum(map(_characters, message.messages or ()))
        size += sum(len(tool.model_dump_json()) for tool in message.tools)
        if size > characters:
            raise _too_long(f"the prompt has {size:,} characters", f"no prompt that fits has more than {characters:,}", context)
        if len(message.messages or ()) > context:
            raise _too_long(f"there are {len(message.messages or ()):,} messages", "each takes a token at least", context)

    def enter(self, size_bytes: int) -> None:
        """Count a request of so many bytes among those that are prepared, until `leave`. Busy: there are too many."""
        if self._preparing >= self._most_preparing or (self._preparing and self._preparing_bytes + size_bytes > _MOST_BYTES):
            raise Busy("too many requests arrive at once: try again in 1 s", retry_after_s=1.0)
        self._preparing += 1
        self._preparing_bytes += size_bytes

    def leave(self, size_bytes: int) -> None:
        self._preparing -= 1
        self._preparing_bytes -= size_bytes

    async def prepare(self, message: Generate, id: str, reply: str) -> GenerationRequest:
        """`reply`: the subject of its answers. Raises BadRequest, with the field, PromptTooLong, or Busy. The shard that samples checks the
        ranges of the sampling fields."""
        manifest, tokenizer = self._manifest, self._tokenizer
        if message.tokens is not None:
            tokens, field = list(message.tokens), "tokens"
        else:
            field = "prompt" if message.prompt is not None else "messages"
            if self._pool is None:
                raise BadRequest(f"{manifest.name} has no tokenizer: send token ids as `tokens`", field=field)
            messages = None if message.messages is None else [part.template() for part in message.messages]
            options = options_of(message, message.tools if message.offers_tools else ())
            embeds = message.embed is not None
            tokens = await self._pool.tokenize(
                prompt=message.prompt, messages=messages, raw=message.raw or embeds, options=options, trailing=embeds
            )
        if not tokens:
            raise BadRequest("the prompt is empty: give at least one token", field=field)
        if max(tokens) >= manifest.vocab_size:
            bad = next(token for token in tokens if token >= manifest.vocab_size)
            raise BadRequest(f"token {bad} is not in the vocabulary: ids are 0 to {manifest.vocab_size - 1}", field=field)
        self._require_tokens(len(tokens), message.longest)
        wanted = 0 if message.embed is None else message.embed.dimensions or 0
        if wanted > manifest.hidden.size:
            raise BadRequest(f"dimensions is {wanted:,}, but a vector has {manifest.hidden.size:,}: ask for fewer", field="dimensions")
        if len(message.given) > message.max_tokens or max(message.given, default=0) >= manifest.vocab_size:
            raise BadRequest(
                "given is not a beginning of this request's answer: give the tokens that it was answered with, or none", field="given"
            )
        if message.stop and tokenizer is None:
            raise BadRequest("stop texts need a tokenizer, and this model has none", field="stop")
        if any(not text for text in message.stop):
            raise BadRequest("a stop text is empty: give at least one character, or leave it out", field="stop")
        stops = () if message.ignore_eos or tokenizer is None else tokenizer.info.eos_ids
        sampling = message.sampling(seed=secrets.randbits(62), grammar=await self._grammar(message))
        bad_bias = next((token for token in sampling.logit_bias if int(token) >= manifest.vocab_size), None)
        if bad_bias is not None:
            raise BadRequest(
                f"token {bad_bias} is not in the vocabulary: ids are 0 to {manifest.vocab_size - 1}", field=f"logit_bias.{bad_bias}"
            )
        # the log probabilities of a prefix are not known, so with them everything is computed again
        prefix = message.given if message.logprobs is None else ()
        caller = _caller(message, reply)
        return GenerationRequest(
            id,
            tuple(tokens),
            message.longest,
            sampling,
            frozenset(stops),
            prefix,
            waited_s=message.waited_s,
            caller=caller,
            salt=self._reuse.salt(caller),
            embed=message.embed is not None,
        )

    async def _grammar(self, message: Generate) -> str | None:
        """The grammar that the answer must follow. BadRequest: none is supported, or this one is not."""
        form = message.structured_outputs
        if form is None and not message.forces_calls:
            return None
        if self._pool is None:
            raise BadRequest(
                f"{self._manifest.name} has no tokenizer, so the form of an answer cannot be forced: leave it out", field=_FORM
            )
        if form is not None and message.offers_tools:
            _require_forms_go_together(message, form)
        if message.ignore_eos:
            raise BadRequest("an answer that must have a form ends where the form does: leave out ignore_eos", field="ignore_eos")
        return await (self._pool.tool_grammar(_calls(message)) if message.offers_tools or form is None else self._pool.grammar(form))

    def _require_tokens(self, count: int, max_tokens: int) -> None:
        context = self._manifest.context_length
        if count + max_tokens > context:
            more, fewer = (f" and {max_tokens} more are asked for", " or ask for fewer with max_tokens") if max_tokens else ("", "")
            raise PromptTooLong(
                f"the prompt has {count} tokens{more}, but the context is {context}: shorten the prompt{fewer}",
                tokens=count,
                limit=max(context - max_tokens, 0),
            )


def _caller(message: Generate, reply: str) -> str:
    """Who is treated as one caller: a user of NATS with an inbox of its own, and among those of a gateway the one whose salt this is."""
    user, salt = inbox_user(reply), message.cache_salt or ""
    return f"{user} {salt}" if user or salt else ""


def options_of(message: Generate | Tokenize, tools: Sequence[Tool]) -> ChatOptions:
    """How the messages of a request become a prompt. `tools`: those that the template is told of."""
    return ChatOptions(
        add_generation_prompt=message.add_generation_prompt is not False and not message.continue_final_message,
        continue_final_message=message.continue_final_message,
        parse_special=message.parse_special,
        tools=[tool.model_dump(exclude_none=True) for tool in tools] or None,
        variables=message.chat_template_kwargs,
    )


def _characters(message: ChatMessage) -> int:
    return len(message.content) + sum(len(call.function.arguments) for call in message.tool_calls or ())


def _require_forms_go_together(message: Generate, form: StructuredOutputs) -> None:
    """BadRequest: the answer is calls in any case, or its form is not JSON."""
    if must_call(message.tool_choice):
        raise BadRequest("calls are forced, so the answer has their form: leave out structured_outputs or tool_choice", field=_FORM)
    if form.json_schema is None and not form.json_object:
        raise BadRequest("an answer that may call tools is calls, text or JSON: give json or json_object, or leave out tools", field=_FORM)


def _calls(message: Generate) -> dict[str, Any]:
    """The fields of a request about tools, and about the answer that calls none."""
    fields = {"tools", "tool_choice", "parallel_tool_calls", "tool_format", "structured_outputs"}
    return message.model_dump(mode="json", include=fields, exclude_none=True)


def _too_long(what: str, most: str, context: int) -> PromptTooLong:
    return PromptTooLong(f"{what}, but the context is {context} tokens, and {most}: shorten it", tokens=context + 1, limit=context)
