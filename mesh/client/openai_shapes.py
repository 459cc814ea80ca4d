"""Makes OpenAI's documents from generations: one whole document, or a part for each chunk. For HTTP, and for results of batches."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from mesh.client.results import Chunk, Completion, Token, Usage
from mesh.protocol.tools import CallPart, ToolParser

__all__ = ["ChatShape", "OpenAIShape", "TextShape", "logprob_entries"]


class OpenAIShape:
    """What both kinds of completion have in common: see mesh.client.shapes.Shape. Its id is the name of its first generation in the mesh.
    `choices`: of each prompt. `usage_is_null`: in all documents of a stream whose last one has the usage."""

    prefix: str
    object: str
    part_object: str

    def __init__(self, model: str, created: int, *, choices: int, usage_is_null: bool) -> None:
        self.model = model
        self._id = ""
        self._created = created
        self._choices = choices
        self._null = {"usage": None} if usage_is_null else {}

    def name(self, request: str) -> None:
        self._id = f"{self.prefix}-{request}"

    def read_calls(self, index: int, parser: ToolParser | None) -> None:
        """Does nothing: texts have no calls."""

    def _document(self, choices: list[dict[str, Any]], *, part: bool, **more: Any) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": self.part_object if part else self.object,
            "created": self._created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    def end(self, completions: Sequence[Completion]) -> list[dict[str, Any]]:
        return [self._document([], part=True, usage=self._usage(completions))] if self._null else []

    def _usage(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """The usage of all choices, in their order. A prompt counts once, however many choices it has."""
        prompts = Usage.total(completion.usage for completion in completions[:: self._choices])
        given = sum(completion.usage.completion_tokens for completion in completions)
        return Usage(prompts.prompt_tokens, given, prompts.cached_tokens).document()


class ChatShape(OpenAIShape):
    prefix, object, part_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model: str, created: int, *, choices: int, usage_is_null: bool) -> None:
        super().__init__(model, created, choices=choices, usage_is_null=usage_is_null)
        self._begun: set[int] = set()
        self._parsers: dict[int, ToolParser] = {}

    def read_calls(self, index: int, parser: ToolParser | None) -> None:
        if parser is not None:
            self._parsers.setdefault(index, parser)

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": _message(completion),
                "logprobs": _chat_logprobs(completion.logprobs),
                "finish_reason": _reason(completion.finish_reason, called=bool(completion.tool_calls)),
            }
            for index, completion in enumerate(completions)
        ]
        return self._document(choices, part=False, usage=self._usage(completions), system_fingerprint=None)

    def part(self, index: int, chunk: Chunk, completion: Completion | None) -> list[dict[str, Any]]:
        reason = None if completion is None else completion.finish_reason
        documents = []
        if index not in self._begun:
            self._begun.add(index)
            documents.append(self._delta(index, {"role": "assistant", "content": ""}))
        logprobs = None if chunk.token is None or chunk.token.logprob is None else _chat_logprobs((chunk.token,))
        parser = self._parsers.get(index)
        deltas = [{"content": chunk.text}] if parser is None else _deltas(parser, chunk.text, end=reason is not None)
        if any(deltas[0].values()) or logprobs is not None:
            documents.append(self._delta(index, deltas[0], logprobs=logprobs))
        documents += [self._delta(index, delta) for delta in deltas[1:]]
        if reason is not None:
            called = parser is not None and parser.calls > 0
            documents.append(self._delta(index, {}, reason=_reason(reason, called=called)))
        return documents

    def _delta(self, index: int, delta: dict[str, Any], *, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self._document([choice], part=True, **self._null)


def _message(completion: Completion) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": completion.text, "refusal": None}
    if completion.tool_format is None:
        return message
    message["content"] = completion.content or None
    if completion.tool_calls:
        message["tool_calls"] = [call.document() for call in completion.tool_calls]
    return message


def _reason(reason: str, *, called: bool) -> str:
    return "tool_calls" if called and reason == "stop" else reason


def _deltas(parser: ToolParser, text: str, *, end: bool) -> list[dict[str, Any]]:
    """What a piece of text adds to the message: at least one delta, perhaps without content."""
    parts = parser.read(text, end=end)
    return [{"content": part} if isinstance(part, str) else {"tool_calls": [_call(part)]} for part in parts] or [{"content": ""}]


def _call(part: CallPart) -> dict[str, Any]:
    if part.id is None:
        return {"index": part.call, "function": {"arguments": part.arguments}}
    return {"index": part.call, "id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}}


class TextShape(OpenAIShape):
    prefix, object, part_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, created: int, *, choices: int, usage_is_null: bool) -> None:
        super().__init__(model, created, choices=choices, usage_is_null=usage_is_null)
        self._offsets: dict[int, _Offsets] = {}
        self._echoes: dict[int, str] = {}

    def echo(self, prompts: Sequence[str]) -> None:
        """Begin the text of each choice with its prompt."""
        count = len(prompts) * self._choices
        self._echoes = {index: prompts[index // self._choices] for index in range(count)}

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": self._echoes.get(index, "") + (completion.text or ""),
                "logprobs": None if completion.logprobs is None else _text_logprobs(completion.logprobs, _Offsets()),
                "finish_reason": completion.finish_reason,
            }
            for index, completion in enumerate(completions)
        ]
        return self._document(choices, part=False, usage=self._usage(completions), system_fingerprint=None)

    def part(self, index: int, chunk: Chunk, completion: Completion | None) -> list[dict[str, Any]]:
        reason, text = None if completion is None else completion.finish_reason, self._echoes.pop(index, "") + chunk.text
        logprobs = None
        if chunk.token is not None and chunk.token.logprob is not None:
            logprobs = _text_logprobs((chunk.token,), self._offsets.setdefault(index, _Offsets()))
        if not text and logprobs is None and reason is None:
            return []
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return [self._document([choice], part=True, **self._null)]


class _Offsets:
    """Where each token of a text begins, in characters. A token that is part of a character begins where the character does."""

    def __init__(self) -> None:
        self._next = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, token: Token) -> int:
        begins = self._next
        self._next += len(self._decoder.decode(_bytes(token.piece, token.raw) or b""))
        return begins


def _bytes(piece: str | None, raw: bytes | None) -> bytes | None:
    """What a token adds to the text. None: nothing, as a control token does, or nobody knows."""
    return None if piece is None else piece.encode() if raw is None else raw or None


def _chat_logprobs(tokens: Sequence[Token] | None) -> dict[str, Any] | None:
    return None if tokens is None else {"content": logprob_entries(tokens), "refusal": None}


def logprob_entries(tokens: Sequence[Token]) -> list[dict[str, Any]]:
    """Each token, with its log-probability and those of its alternatives."""
    entries = []
    for token in tokens:
        top = [_entry(*alternative) for alternative in token.alternatives()]
        entries.append({**_entry(token.id, token.logprob or 0.0, token.piece, token.raw), "top_logprobs": top})
    return entries


def _entry(id: int, logprob: float, piece: str | None, raw: bytes | None) -> dict[str, Any]:
    added = _bytes(piece, raw)
    return {"token": f"<{id}>" if piece is None else piece, "logprob": logprob, "bytes": None if added is None else list(added)}


def _text_logprobs(tokens: Sequence[Token], offsets: _Offsets) -> dict[str, Any]:
    names = [_name(token.id, token.piece, token.raw) for token in tokens]
    return {
        "tokens": names,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top(token, name) for token, name in zip(tokens, names, strict=True)],
        "text_offset": [offsets.take(token) for token in tokens],
    }


def _top(token: Token, name: str) -> dict[str, float]:
    """The likeliest tokens, and the one that was drawn, where it is none of them."""
    return {_name(id, piece, raw): logprob for id, logprob, piece, raw in token.alternatives()} | {name: token.logprob or 0.0}


def _name(id: int, piece: str | None, raw: bytes | None) -> str:
    """A token in a document that has no place for its bytes: those of part of a character are spelled out, as OpenAI does."""
    if piece is None:
        return f"<{id}>"
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if raw else piece
