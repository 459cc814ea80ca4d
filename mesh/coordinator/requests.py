"""A request as it arrives becomes what the core takes: every field is checked, and the prompt is made tokens."""

from __future__ import annotations

import asyncio
import secrets

from mesh.coordinator.core.session import GenerationRequest
from mesh.errors import BadRequest, PromptTooLong
from mesh.model.manifest import Manifest
from mesh.model.tokenizer import Tokenizer
from mesh.protocol.generation import Generate

__all__ = ["prepare"]

_INLINE_CHARACTERS = 2000
"""Longer texts are tokenized in a thread, because the event loop carries the tokens of every client."""


async def prepare(message: Generate, id: str, manifest: Manifest, tokenizer: Tokenizer | None) -> GenerationRequest:
    """Raises BadRequest, with the field, or PromptTooLong. The shard that samples checks the ranges of the sampling fields."""
    if message.tokens is not None:
        tokens, field = list(message.tokens), "tokens"
    else:
        field = "prompt" if message.prompt is not None else "messages"
        if tokenizer is None:
            raise BadRequest(f"{manifest.name} has no tokenizer: send token ids as `tokens`", field=field)
        size = len(message.prompt or "") + sum(len(part.content) for part in message.messages or ())
        if size > _INLINE_CHARACTERS:
            tokens = await asyncio.to_thread(_tokenize, message, tokenizer)
        else:
            tokens = _tokenize(message, tokenizer)
    if not tokens:
        raise BadRequest("the prompt is empty: give at least one token", field=field)
    bad = next((token for token in tokens if token >= manifest.vocab_size), None)
    if bad is not None:
        raise BadRequest(f"token {bad} is not in the vocabulary: ids are 0 to {manifest.vocab_size - 1}", field=field)
    if len(tokens) + message.max_tokens > manifest.context_length:
        raise PromptTooLong(
            f"the prompt has {len(tokens)} tokens and {message.max_tokens} more are asked for, but the context is "
            f"{manifest.context_length}: shorten the prompt or ask for fewer with max_tokens",
            tokens=len(tokens),
            limit=max(manifest.context_length - message.max_tokens, 0),
        )
    if len(message.given) > message.max_tokens or any(token >= manifest.vocab_size for token in message.given):
        raise BadRequest(
            "given is not a beginning of this request's answer: give the tokens that it was answered with, or none", field="given"
        )
    if message.stop and tokenizer is None:
        raise BadRequest("stop texts need a tokenizer, and this model has none", field="stop")
    if any(not text for text in message.stop):
        raise BadRequest("a stop text is empty: give at least one character, or leave it out", field="stop")
    stops = () if message.ignore_eos or tokenizer is None else tokenizer.info.eos_ids
    sampling = message.sampling(seed=secrets.randbits(62))
    # the log probabilities of a prefix are not known, so with them everything is computed again
    prefix = message.given if message.logprobs is None else ()
    return GenerationRequest(id, tuple(tokens), message.max_tokens, sampling, frozenset(stops), prefix, waited_s=message.waited_s)


def _tokenize(message: Generate, tokenizer: Tokenizer) -> list[int]:
    if message.messages is not None:
        if not message.messages:
            raise BadRequest("messages is empty: give at least one", field="messages")
        chat = [part.model_dump() for part in message.messages]
        return tokenizer.encode(tokenizer.apply_chat_template(chat), add_special=False)
    assert message.prompt is not None
    if tokenizer.has_chat_template and not message.raw:
        return tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": message.prompt}]), add_special=False)
    return tokenizer.encode(message.prompt)
