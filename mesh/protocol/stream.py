"""The documents with which a coordinator answers a generation request: their types, and `dump` and `parse` for the wire.

    stream, first    Accepted        {"request", "cancel", "model", "next", "recorded", "done": false}    the name to cancel it by, and the
                                     subject; "recorded": another coordinator goes on if this one dies; "tool_format", where tools were
                                     offered: how calls are written in the text
    stream, waiting  Waiting         {"waiting": n, "missing", "waited_s", "patience_s", "done": false}    every few seconds: n others
                                     come first; or no shard serves the layers `missing`, and the error comes after `patience_s`
    stream, token    TokenDocument   {"index", "token", "text", "done": false}                and "logprob", "piece", "top" if asked for;
                                     "bytes" of a token that is part of a character, or of a control token (none)
    last, or only    Finished        {"done": true, "tokens", "text", "finish_reason", "usage", "timing"}    and "logprobs"; "tool_calls",
                                     "content" and "tool_format", where tools were offered; "embedding", where a vector was
                                     asked for in place of tokens; "stop_text", where
                                     a stop text ended it; "omitted" names
                                     the parts that did not fit in the message: the token documents of a stream have them
    an error         Nats-Service-Error headers and an ErrorReply, as the last or only message

Every document has an "epoch" (an error: the header EPOCH_HEADER): when the coordinator which answers began with the session, in
milliseconds since 1970. It grows when another coordinator takes over the session, also where nothing is known of the one before.
Documents of a lower epoch than one seen before are late: they change nothing. "next" is the index of the first token document that
follows; after another coordinator took over, it may be lower than what was delivered before.

Every document has the "id" of its request (generation.public_id). A client reads no document of another request, whoever sent it.
"request" in the first and the last document is the request's name, where the coordinator drew it; the caller's own name is not repeated.

The "text" of the token documents and the "rest" of the last one, joined, are the whole text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import orjson

from mesh.errors import MessageRejected
from mesh.protocol.tools import ToolCall

__all__ = [
    "Accepted",
    "Answer",
    "Document",
    "Finished",
    "Timing",
    "Token",
    "TokenDocument",
    "Usage",
    "Waiting",
    "dump",
    "fitted",
    "parse",
    "with_epoch",
]


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token. Only the id is set unless log-probabilities were asked for. `top`: (token, logprob) pairs, likeliest first.
    `piece`, `top_pieces`: the texts of these tokens by themselves (None: the model has no tokenizer). `raw`, `top_raws`: what they add to
    the text, where that is not their piece: bytes that are no whole character, or nothing for a control token ("bytes" on the wire)."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    piece: str | None = None
    top_pieces: tuple[str | None, ...] = ()
    raw: bytes | None = None
    top_raws: tuple[bytes | None, ...] = ()

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Token:
        if "logprob" not in document:
            return cls(document["token"])
        entries = document.get("top") or ()
        return cls(
            document["token"],
            document["logprob"],
            tuple([(entry["token"], entry["logprob"]) for entry in entries]),
            document.get("piece"),
            tuple([entry.get("piece") for entry in entries]),
            _raw(document),
            tuple([_raw(entry) for entry in entries]),
        )

    def alternatives(self) -> Iterator[tuple[int, float, str | None, bytes | None]]:
        """(id, logprob, piece, raw) of each of `top`."""
        for place, (id, logprob) in enumerate(self.top):
            piece = self.top_pieces[place] if self.top_pieces else None
            yield id, logprob, piece, self.top_raws[place] if self.top_raws else None

    def details(self) -> dict[str, Any]:
        """The keys of a document about its log-probabilities."""
        top = [{"token": id, "logprob": logprob, "piece": piece} | _bytes(raw) for id, logprob, piece, raw in self.alternatives()]
        return {"logprob": self.logprob, "piece": self.piece, "top": top} | _bytes(self.raw)


def _bytes(raw: bytes | None) -> dict[str, Any]:
    return {} if raw is None else {"bytes": list(raw)}


def _raw(document: Mapping[str, Any]) -> bytes | None:
    return bytes(document["bytes"]) if "bytes" in document else None


@dataclass(frozen=True, slots=True)
class Usage:
    """`cached_tokens`: those of the prompt that were not computed, because the mesh still held them."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    def document(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.total_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    @classmethod
    def total(cls, parts: Iterable[Usage]) -> Usage:
        total = cls(0, 0)
        for each in parts:
            prompt, given = total.prompt_tokens + each.prompt_tokens, total.completion_tokens + each.completion_tokens
            total = cls(prompt, given, total.cached_tokens + each.cached_tokens)
        return total

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Usage:
        cached = (document.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return cls(document["prompt_tokens"], document["completion_tokens"], cached)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds, as the coordinator measured them. queue_s: until rows were asked for; first_token_s: until the first token;
    decode_step_s: the median step. hops: where a decode step went (mean seconds: step_s, compute_s, queue_s, codec_s, hop_s)."""

    queue_s: float
    prefill_s: float
    first_token_s: float | None
    decode_s: float
    decode_step_s: float
    tokens_per_s: float | None
    total_s: float
    restarts: int = 0
    hops: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A finished generation. `finish_reason`: "stop" (an end token or a stop text) or "length" (max_tokens). `text` is None for a model
    without a tokenizer; `logprobs` is None where they were not asked for. `omitted`: the parts that are left out because the message would
    have been too large, of `logprobs`, `content`, `tool_calls`, `text`, `tokens`. `trace`: the W3C trace context of the generation, sampled
    where its trace is kept for a collector. `tool_calls`: what it calls, where tools were offered; `content`: its text beside them;
    `tool_format`: the form in which they are written in `text`. `stop_text`: the stop text that ended it, if one did. `embedding`: the
    vector that was asked for in place of tokens."""

    request: str
    tokens: tuple[int, ...]
    text: str | None
    finish_reason: str
    usage: Usage
    timing: Timing
    logprobs: tuple[Token, ...] | None = None
    omitted: tuple[str, ...] = ()
    trace: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    content: str | None = None
    tool_format: str | None = None
    stop_text: str | None = None
    embedding: tuple[float, ...] | None = None

    def document(self) -> dict[str, Any]:
        """The answer as JSON. The key logprobs exists only if log-probabilities were asked for."""
        document: dict[str, Any] = {
            "request": self.request,
            "tokens": self.tokens,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": self.usage.document(),
            "timing": {name: getattr(self.timing, name) for name in Timing.__dataclass_fields__},
        }
        if self.logprobs is not None:
            document["logprobs"] = [{"token": token.id, **token.details()} for token in self.logprobs]
        if self.omitted:
            document["omitted"] = self.omitted
        if self.stop_text is not None:
            document["stop_text"] = self.stop_text
        if self.embedding is not None:
            document["embedding"] = self.embedding
        if self.trace is not None:
            document["trace"] = self.trace
        if self.tool_format is not None:
            document |= {
                "tool_calls": [call.document() for call in self.tool_calls],
                "content": self.content,
                "tool_format": self.tool_format,
            }
        return document


class Accepted(NamedTuple):
    request: str
    cancel: str
    model: str
    next: int
    epoch: int | None
    id: str
    recorded: bool = True
    tool_format: str | None = None


class Waiting(NamedTuple):
    """`waiting`: how many requests come before this one. `missing`: layer ranges, such as "10-20", that no shard serves; for them the
    request has waited `waited_s` of `patience_s` seconds."""

    waiting: int
    epoch: int | None
    id: str
    missing: tuple[str, ...] = ()
    waited_s: float = 0.0
    patience_s: float = 0.0


class TokenDocument(NamedTuple):
    """`position`: the token's place in the answer, from 0 ("index" on the wire). `text`: what became readable with the token.
    `detailed`: the document has the token's log-probabilities."""

    position: int
    token: Token
    text: str
    epoch: int | None
    id: str
    detailed: bool = False


class Finished(NamedTuple):
    """`rest`: text that no token document had."""

    answer: Answer
    rest: str
    epoch: int | None
    id: str

    def document(self) -> dict[str, Any]:
        return {"done": True, "id": self.id, "epoch": self.epoch, "rest": self.rest, **self.answer.document()}


Document = Accepted | Waiting | TokenDocument | Finished


def dump(document: Document) -> bytes:
    """A document as it goes to a client."""
    if type(document) is TokenDocument:
        position, token, text, epoch, id, detailed = document
        plain = {"index": position, "token": token.id, "text": text, "epoch": epoch, "id": id, "done": False}
        return orjson.dumps(plain | token.details() if detailed else plain)
    if isinstance(document, Finished):
        return orjson.dumps(document.document())
    values = {name: value for name, value in document._asdict().items() if name != "tool_format" or value is not None}
    return orjson.dumps({**values, "done": False})


def fitted(document: Mapping[str, Any], limit_bytes: int) -> dict[str, Any]:
    """The document of an answer, without the parts that would make it larger than `limit_bytes`; `omitted` names them."""
    made, omitted = dict(document), list(document.get("omitted", ()))
    for part, empty in (("logprobs", None), ("content", None), ("tool_calls", ()), ("text", None), ("tokens", ())):
        if len(orjson.dumps(made)) <= limit_bytes:
            break
        if made.get(part):
            omitted.append(part)
            made |= {part: empty, "omitted": omitted}
    return made


def parse(data: bytes) -> Document:
    """The inverse of `dump`. A document of a kind that this version does not know is a Waiting. MessageRejected: it is no document."""
    try:
        document: dict[str, Any] = orjson.loads(data)
        epoch, id = document.get("epoch"), document.get("id") or ""
        if document["done"]:
            return Finished(answer_of(document), document.get("rest") or "", epoch, id)
        if "index" in document:
            return TokenDocument(document["index"], Token.of(document), document["text"], epoch, id, "logprob" in document)
        if "cancel" in document:
            recorded, form = bool(document.get("recorded", True)), document.get("tool_format")
            return Accepted(document["request"], document["cancel"], document["model"], document["next"], epoch, id, recorded, form)
        missing, waited_s, patience_s = document.get("missing", ()), document.get("waited_s", 0.0), document.get("patience_s", 0.0)
        return Waiting(document.get("waiting", 0), epoch, id, tuple(missing), waited_s, patience_s)
    except (orjson.JSONDecodeError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise MessageRejected(f"this is no document of a generation: {error!r}") from None


def with_epoch(answer: bytes, seen: int | None) -> bytes:
    """A last document that was kept, for a client that has seen the epoch `seen`: never of a lower one."""
    if seen is None:
        return answer
    document = orjson.loads(answer)
    return orjson.dumps(document | {"epoch": max(document.get("epoch") or 0, seen)})


def answer_of(document: Mapping[str, Any]) -> Answer:
    """The answer in a last document, or in the result of a batch's request. LookupError: a key is missing."""
    timing, logprobs = document["timing"], document.get("logprobs")
    return Answer(
        request=document["request"],
        tokens=tuple(document["tokens"]),
        text=document["text"],
        finish_reason=document["finish_reason"],
        usage=Usage.of(document["usage"]),
        timing=Timing(**{name: timing.get(name) for name in Timing.__dataclass_fields__}),
        logprobs=None if logprobs is None else tuple([Token.of(entry) for entry in logprobs]),
        omitted=tuple(document.get("omitted", ())),
        trace=document.get("trace"),
        tool_calls=tuple([ToolCall.model_validate(call) for call in document.get("tool_calls") or ()]),
        content=document.get("content"),
        tool_format=document.get("tool_format"),
        stop_text=document.get("stop_text"),
        embedding=None if document.get("embedding") is None else tuple(document["embedding"]),
    )
