"""Answers what the tokens of a text are, and the text of tokens. The work is done by prompt_pool.py, within the bounds of prompts."""

from __future__ import annotations

from typing import Any

from mesh.bus import Endpoint, Received
from mesh.coordinator.prompt_pool import PromptPool
from mesh.coordinator.requests import Requests, options_of
from mesh.errors import BadRequest, PromptTooLong
from mesh.model.manifest import Manifest
from mesh.protocol import topics
from mesh.protocol.tokenizing import Detokenized, Tokenized

__all__ = ["Tokenizing"]


class Tokenizing:
    """The endpoints of a model whose prompts `pool` tokenizes; None: it has no tokenizer."""

    def __init__(self, manifest: Manifest, requests: Requests, pool: PromptPool | None) -> None:
        self._manifest = manifest
        self._requests = requests
        self._pool = pool

    def endpoints(self) -> list[Endpoint[Any]]:
        model, requests = self._manifest.name, self._requests
        most, refusal = requests.most_bytes, requests.too_large
        return [
            Endpoint("tokenize", topics.TOKENIZE.at(model), self._on_text, concurrent=True, most_bytes=most, too_large=refusal),
            Endpoint("detokenize", topics.DETOKENIZE.at(model), self._on_tokens, concurrent=True, most_bytes=most, too_large=refusal),
        ]

    async def _on_text(self, received: Received) -> Tokenized:
        pool, size = self._with_tokenizer(), len(received.data)
        message = self._requests.parse_text(received.data)
        self._requests.enter(size)
        try:
            tokens = await pool.tokenize(
                prompt=message.prompt,
                messages=None if message.messages is None else [part.template() for part in message.messages],
                raw=True,
                options=options_of(message, message.tools),
                special=message.special,
            )
            names = tuple(await pool.names(tokens)) if message.names else None
        finally:
            self._requests.leave(size)
        return Tokenized(tokens=tuple(tokens), context=self._requests.context, names=names)

    async def _on_tokens(self, received: Received) -> Detokenized:
        pool, size = self._with_tokenizer(), len(received.data)
        tokens = topics.DETOKENIZE.parse(received.data).tokens
        self._require_known(tokens)
        self._requests.enter(size)
        try:
            return Detokenized(text=await pool.text(tokens))
        finally:
            self._requests.leave(size)

    def _with_tokenizer(self) -> PromptPool:
        if self._pool is None:
            raise BadRequest(f"{self._manifest.name} has no tokenizer: its prompts are token ids", field="model")
        return self._pool

    def _require_known(self, tokens: tuple[int, ...]) -> None:
        context, vocabulary = self._requests.context, self._manifest.vocab_size
        if len(tokens) > context:
            what = f"there are {len(tokens):,} tokens, and no prompt has more than {context:,}: send fewer at a time"
            raise PromptTooLong(what, tokens=len(tokens), limit=context)
        bad = next((token for token in tokens if token >= vocabulary), None)
        if bad is not None:
            raise BadRequest(f"token {bad} is not in the vocabulary: ids are 0 to {vocabulary - 1}", field="tokens")
