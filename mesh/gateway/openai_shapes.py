"""Makes OpenAI's documents from generations: one whole document, or a part for each chunk."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from mesh.client import Chunk, Completion, Token

__all__ = ["ChatShape", "Shape", "TextShape"]

_REPLACEMENT = "\ufffd"  # a token that is part of a character has no text of its own


class Shape(Protocol):
    """The documents of one request. Its id is the name of its first generation in the mesh. `part`: the documents for one chunk of
    choice `index`; `reason` is set with the last chunk."""

    model: str

    def __init__(self, model: str, created: int, *, usage_is_null: bool) -> None: ...
    def name(self, request: str) -> None: ...
    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]: ...
    def part(self, index: int, chunk: Chunk, reason: str | None) -> list[dict[str, Any]]: ...
    def usage(self, completions: Sequence[Completion]) -> dict[str, Any]: ...


class _Documents:
    prefix: str
    object: str
    part_object: str

    def __init__(self, model: str, created: int, *, usage_is_null: bool) -> None:
        self.model = model
        self._id = ""
        self._created = created
        self._null = {"usage": None} if usage_is_null else {}

    def name(self, request: str) -> None:
        self._id = f"{self.prefix}-{request}"

    def _document(self, choices: list[dict[str, Any]], *, part: bool, **more: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self.part_object if part else self.object,
            "created": self._created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    def usage(self, completions: Sequence[Completion]) -> dict[str, Any]:
        return self._document([], part=True, usage=_usage(completions))


class ChatShape(_Documents):
    prefix, object, part_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, created: int, *, usage_is_null: bool) -> None:
        super().__init__(model, created, usage_is_null=usage_is_null)
        self._begun: set[int] = set()

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "logprobs": _chat_logprobs(completion.logprobs),
                "finish_reason": completion.finish_reason,
            }
            for index, completion in enumerate(completions)
        ]
        return self._document(choices, part=False, usage=_usage(completions), system_fingerprint=None)

    def part(self, index: int, chunk: Chunk, reason: str | None) -> list[dict[str, Any]]:
        documents = []
        if index not in self._begun:
            self._begun.add(index)
            documents.append(self._delta(index, {"role": "assistant", "content": ""}))
        logprobs = None if chunk.token is None or chunk.token.logprob is None else _chat_logprobs((chunk.token,))
        if chunk.text or logprobs is not None:
            documents.append(self._delta(index, {"content": chunk.text}, logprobs=logprobs))
        if reason is not None:
            documents.append(self._delta(index, {}, reason=reason))
        return documents

    def _delta(self, index: int, delta: dict[str, Any], *, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._document([choice], part=True, **self._null)


class TextShape(_Documents):
    prefix, object, part_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, created: int, *, usage_is_null: bool) -> None:
        super().__init__(model, created, usage_is_null=usage_is_null)
        self._offsets: dict[int, int] = {}

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": completion.text or "",
                "logprobs": None if completion.logprobs is None else _text_logprobs(completion.logprobs, 0),
                "finish_reason": completion.finish_reason,
            }
            for index, completion in enumerate(completions)
        ]
        return self._document(choices, part=False, usage=_usage(completions), system_fingerprint=None)

    def part(self, index: int, chunk: Chunk, reason: str | None) -> list[dict[str, Any]]:
        logprobs = None
        if chunk.token is not None and chunk.token.logprob is not None:
            offset = self._offsets.get(index, 0)
            logprobs = _text_logprobs((chunk.token,), offset)
            self._offsets[index] = offset + len(_piece(chunk.token))
        if not chunk.text and logprobs is None and reason is None:
            return []
        choice = {"index": index, "text": chunk.text, "logprobs": logprobs, "finish_reason": reason}
        return [self._document([choice], part=True, **self._null)]


def _usage(completions: Sequence[Completion]) -> dict[str, int]:
    """The usage of all choices. A prompt with several choices is processed, and counted, once for each choice."""
    prompt = sum(completion.usage.prompt_tokens for completion in completions)
    given = sum(completion.usage.completion_tokens for completion in completions)
    return {"prompt_tokens": prompt, "completion_tokens": given, "total_tokens": prompt + given}


def _piece(token: Token) -> str:
    return f"<{token.id}>" if token.piece is None else token.piece


def _chat_logprobs(tokens: Sequence[Token] | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    content = []
    for token in tokens:
        top = [
            _entry(f"<{id}>" if piece is None else piece, logprob)
            for (id, logprob), piece in zip(token.top, token.top_pieces or (None,) * len(token.top), strict=True)
        ]
        content.append({**_entry(_piece(token), token.logprob or 0.0), "top_logprobs": top})
    return {"content": content, "refusal": None}


def _entry(text: str, logprob: float) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": None if _REPLACEMENT in text else list(text.encode())}


def _text_logprobs(tokens: Sequence[Token], offset: int) -> dict[str, Any]:
    pieces = [_piece(token) for token in tokens]
    offsets = []
    for piece in pieces:
        offsets.append(offset)
        offset += len(piece)
    top = [
        {
            (f"<{id}>" if piece is None else piece): logprob
            for (id, logprob), piece in zip(token.top, token.top_pieces or (None,) * len(token.top), strict=True)
        }
        for token in tokens
    ]
    return {"tokens": pieces, "token_logprobs": [token.logprob for token in tokens], "top_logprobs": top, "text_offset": offsets}
