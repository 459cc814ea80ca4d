"""What one client is told: documents of a stream or the one document, the text as it becomes whole, stop texts.

    stream, first    {"request", "cancel", "model", "done": false}         the name to cancel it by, and where to say so
    stream, waiting  {"waiting": n, "done": false}                         every few seconds, n others are before it
    stream, token    {"index", "token", "text", "done": false}             and "logprob", "piece", "top" where asked for
    last, or only    {"done": true, "tokens", "text", "finish_reason", "usage", "timing"}    and "logprobs"
    an error         Nats-Service-Error headers and an ErrorReply, as the last or only message

The "text" of the token documents and of "rest" in the last one, joined, is the whole text. A text that might be the beginning
of a stop text is held back until it is known not to be.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import orjson

from mesh import messages
from mesh.coordinator.events import Ended
from mesh.coordinator.session import Request
from mesh.model.tokenizer import TextStream, Tokenizer

__all__ = ["HopMeter", "Job", "Token"]


@dataclass(frozen=True, slots=True)
class Token:
    """A sampled token as the last stage reports it."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class HopMeter:
    """Decode steps as they were measured: seconds from sending to the answer, and of these in computing, in queues and in
    reading and writing frames at the stages. A step through n stages has n + 1 hops."""

    frames: int = 0
    hops: int = 0
    wall_s: float = 0.0
    compute_s: float = 0.0
    queue_s: float = 0.0
    codec_s: float = 0.0

    def add(self, wall_s: float, compute_s: float, queue_s: float, codec_s: float, hops: int) -> None:
        self.frames += 1
        self.hops += hops
        self.wall_s += wall_s
        self.compute_s += compute_s
        self.queue_s += queue_s
        self.codec_s += codec_s

    def as_dict(self) -> dict[str, float]:
        """Means; `hop_s` is what a hop takes beyond computing and waiting for other work."""
        frames, hops = max(self.frames, 1), max(self.hops, 1)
        return {
            "steps": self.frames,
            "step_s": self.wall_s / frames,
            "compute_s": self.compute_s / frames,
            "queue_s": self.queue_s / frames,
            "codec_s": self.codec_s / frames,
            "hop_s": max(self.wall_s - self.compute_s - self.queue_s, 0.0) / hops,
        }


@dataclass(slots=True)
class Job:
    """One request and what its client was told."""

    message: messages.Generate
    request: Request
    reply: str  # where answers go
    text: TextStream | None
    tokenizer: Tokenizer | None
    began: float = field(default_factory=time.perf_counter)
    tokens: list[Token] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    held: str = ""  # text that may be the beginning of a stop text
    stopped: bool = False  # a stop text was met
    hops: HopMeter = field(default_factory=HopMeter)

    @classmethod
    def of(cls, message: messages.Generate, request: Request, reply: str, tokenizer: Tokenizer | None) -> Job:
        return cls(message, request, reply, None if tokenizer is None else tokenizer.stream(), tokenizer)

    def accepted(self, model: str, cancel: str) -> bytes:
        return orjson.dumps({"request": self.request.id, "cancel": cancel, "model": model, "done": False})

    def push(self, token: Token) -> tuple[bytes, bool]:
        """Take a token; its document, and whether a stop text is complete with it."""
        self.tokens.append(token)
        self.token_times.append(time.perf_counter())
        piece = self._release("" if self.text is None else self.text.push(token.id))
        return orjson.dumps(self._document(len(self.tokens) - 1, token, piece)), self.stopped

    def finished(self, ended: Ended) -> dict[str, Any]:
        """The last document, and the only one without a stream."""
        rest = ""
        if not self.stopped:
            rest = self._release("" if self.text is None else self.text.finish(), end=True)
        prompt, count = len(self.request.prompt), len(self.tokens)
        steps = [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]
        median = sorted(steps)[len(steps) // 2] if steps else 0.0
        first = self.token_times[0] - self.began if self.token_times else None
        answer: dict[str, Any] = {
            "done": True,
            "request": self.request.id,
            "tokens": [token.id for token in self.tokens],
            "text": None if self.text is None else "".join(self.pieces),
            "rest": rest,
            "finish_reason": ended.reason,
            "usage": {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count},
            "timing": {
                "queue_s": ended.queue_s,
                "prefill_s": max((first or 0.0) - ended.queue_s, 0.0),
                "first_token_s": first,
                "decode_s": sum(steps),
                "decode_step_s": median,
                "tokens_per_s": 1 / median if median else None,
                "total_s": time.perf_counter() - self.began,
                "restarts": ended.restarts,
                "hops": self.hops.as_dict(),
            },
        }
        if self.message.logprobs is not None:
            answer["logprobs"] = [self._logprobs(token) for token in self.tokens]
        return answer

    def documents(self) -> list[bytes]:
        """The token documents so far, for a client that asks again; their texts together, in the first."""
        documents = []
        for index, token in enumerate(self.tokens):
            documents.append(orjson.dumps(self._document(index, token, "".join(self.pieces) if index == len(self.tokens) - 1 else "")))
        return documents

    def _document(self, index: int, token: Token, piece: str) -> dict[str, Any]:
        document: dict[str, Any] = {"index": index, "token": token.id, "text": piece, "done": False}
        if self.message.logprobs is not None:
            document |= {name: value for name, value in self._logprobs(token).items() if name in ("logprob", "piece", "top")}
        return document

    def _logprobs(self, token: Token) -> dict[str, Any]:
        """`piece` is a token's own text, None for a model without a tokenizer."""
        piece = self.tokenizer.piece if self.tokenizer is not None else lambda id: None
        top = [{"token": i, "logprob": p, "piece": piece(i)} for i, p in token.top]
        return {"token": token.id, "logprob": token.logprob, "piece": piece(token.id), "top": top}

    def _release(self, piece: str, *, end: bool = False) -> str:
        """What of the text may be given out now that `piece` has come."""
        if self.stopped:
            return ""
        stops = self.message.stop
        text = self.held + piece
        if stops:
            cut = min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)
            if cut is not None:
                self.stopped, self.held = True, ""
                text = text[:cut]
            elif not end:
                keep = max((_overlap(text, stop) for stop in stops), default=0)
                self.held = text[len(text) - keep :]
                text = text[: len(text) - keep]
        if text:
            self.pieces.append(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`, without being all of it."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
