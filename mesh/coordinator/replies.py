"""What one client is told: the documents of its generation (mesh/protocol/stream.py), the text as it becomes whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mesh.coordinator.core.events import Ended
from mesh.coordinator.core.session import GenerationRequest
from mesh.coordinator.stops import StopTexts
from mesh.coordinator.trace import Trace
from mesh.model.tokenizer import TextStream, Tokenizer
from mesh.protocol.embedding import vector_of
from mesh.protocol.generation import Generate, public_id
from mesh.protocol.stream import Accepted, Answer, Finished, Timing, Token, TokenDocument, Usage, Waiting, dump
from mesh.protocol.tools import FORMATS, ToolCall, ToolFormat, calls_of
from mesh.telemetry.context import TraceContext

__all__ = ["HopMeter", "Job"]


@dataclass(slots=True)
class HopMeter:
    """Sums of decode steps: seconds from sending a frame to its answer, and of these at the stages: computing, waiting in queues, reading
    and writing frames. A step through n stages has n + 1 hops."""

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
    """One request, and what its client has of the answer. digest: tells requests of the same name apart. start: the client came with the
    tokens before this index. delivered: so many tokens the client has, or has been sent. revision: of its record, 0 for none. accepted: the
    client of a stream has been told so; before that it is told nothing. recorded: another coordinator could go on. wait: the last Waiting
    document. context: the trace that it belongs to. arrived: when the request came (time.perf_counter); `began`: when it was ready to be
    generated. trace: its record, once it is accepted. form: how calls are written in the text, where tools were offered. state: the hidden
    state that was asked for in place of tokens."""

    message: Generate
    request: GenerationRequest
    reply: str  # where answers go
    text: TextStream | None
    tokenizer: Tokenizer | None
    id: str  # public
    digest: str = ""
    epoch: int = 1
    start: int = 0
    delivered: int = 0
    revision: int = 0
    accepted: bool = False
    recorded: bool = False
    wait: bytes | None = None
    context: TraceContext = field(default_factory=TraceContext.new)
    trace: Trace | None = None
    arrived: float = field(default_factory=time.perf_counter)
    began: float = field(default_factory=time.perf_counter)
    tokens: list[Token] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)  # the text each token made readable
    hops: HopMeter = field(default_factory=HopMeter)
    form: ToolFormat | None = None
    state: Sequence[float] | None = None
    stops: StopTexts = field(init=False)

    def __post_init__(self) -> None:
        self.stops = StopTexts(self.message.stop)

    @classmethod
    def of(
        cls,
        message: Generate,
        request: GenerationRequest,
        reply: str,
        tokenizer: Tokenizer | None,
        *,
        digest: str = "",
        epoch: int = 1,
        context: TraceContext | None = None,
    ) -> Job:
        """A job that has the request's prefix, as if it had been generated here. `context`: None: that of the message."""
        form = _form_of(message, tokenizer)
        # marks that are control tokens are part of a call's text
        text = None if tokenizer is None else tokenizer.stream(skip_special=form is None or not tokenizer.marks(form))
        context = context or TraceContext.of(message.traceparent, request.id)
        job = cls(message, request, reply, text, tokenizer, public_id(request.id), digest, epoch, context=context, form=form)
        for id in request.prefix:
            job._take(Token(id))
        return job

    def acceptance(self, model: str, cancel: str) -> bytes:
        form = None if self.form is None else self.form.name
        return dump(Accepted(self.name, cancel, model, self.start, self.epoch, self.id, self.recorded, form))

    def waiting(self, place: int, missing: tuple[str, ...] = (), waited_s: float = 0.0, patience_s: float = 0.0) -> bytes:
        return dump(Waiting(place, self.epoch, self.id, missing, waited_s, patience_s))

    def push(self, token: Token) -> tuple[bytes | None, bool]:
        """Take a token. Returns its document (None: the client has it already), and whether a stop text is complete with it."""
        began = time.perf_counter()
        self._take(token)
        now = time.perf_counter()
        self.token_times.append(now)
        if self.trace is not None:
            self.trace.text(began, now - began)
        index = len(self.tokens) - 1
        return self._document(index) if index >= self.start else None, self.stopped

    def documents(self) -> list[tuple[int, bytes]]:
        """(index, document) of the tokens so far, without those that the client came with."""
        return [(index, self._document(index)) for index in range(self.start, len(self.tokens))]

    def finished(self, ended: Ended) -> dict[str, Any]:
        """The last document of a stream, and the only one of any other request."""
        rest = self.stops.push("" if self.text is None else self.text.finish(), end=True)
        self.pieces.append(rest)
        prompt, count = len(self.request.prompt), len(self.tokens)
        steps = [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]
        median = sorted(steps)[len(steps) // 2] if steps else 0.0
        first = self.token_times[0] - self.began if self.token_times else None
        text = None if self.text is None or self.message.embed is not None else "".join(self.pieces)
        content, calls = self._calls(text)
        answer = Answer(
            request=self.name,
            tokens=tuple([token.id for token in self.tokens]),
            text=text,
            finish_reason=ended.reason,
            usage=Usage(prompt, count, ended.cached),
            timing=Timing(
                queue_s=ended.queue_s,
                prefill_s=max((first or 0.0) - ended.queue_s, 0.0),
                first_token_s=first,
                decode_s=sum(steps),
                decode_step_s=median,
                tokens_per_s=1 / median if median else None,
                total_s=time.perf_counter() - self.began,
                restarts=ended.restarts,
                hops=self.hops.as_dict(),
            ),
            logprobs=tuple([self._named(token) for token in self.tokens]) if self.detailed else None,
            trace=None if self.trace is None else self.trace.context.header(self.trace.span, sampled=self.trace.kept is not None),
            tool_calls=calls,
            content=content,
            tool_format=None if self.form is None else self.form.name,
            stop_text=self.stops.found,
            embedding=self._embedding(),
        )
        return Finished(answer, rest, self.epoch, self.id).document()

    def _embedding(self) -> tuple[float, ...] | None:
        asked = self.message.embed
        return None if asked is None or self.state is None else tuple(vector_of(self.state, asked))

    def _calls(self, text: str | None) -> tuple[str | None, tuple[ToolCall, ...]]:
        """(the text beside calls, the calls), where tools were offered."""
        if self.form is None or text is None:
            return None, ()
        return calls_of(text, self.form, [tool.function.name for tool in self.message.tools], self.id)

    @property
    def name(self) -> str:
        """The request's name as its documents show it. A caller's own name is not repeated: others may read the answers."""
        return self.request.id if self.message.session is None else self.id

    @property
    def stopped(self) -> bool:
        """Whether a stop text was met."""
        return self.stops.found is not None

    @property
    def detailed(self) -> bool:
        """Whether log-probabilities were asked for."""
        return self.message.logprobs is not None

    def _take(self, token: Token) -> None:
        self.tokens.append(token)
        self.pieces.append(self.stops.push("" if self.text is None else self.text.push(token.id)))

    def _document(self, index: int) -> bytes:
        token = self.tokens[index]
        if self.message.logprobs is None:
            return dump(TokenDocument(index, token, self.pieces[index], self.epoch, self.id))
        return dump(TokenDocument(index, self._named(token), self.pieces[index], self.epoch, self.id, detailed=True))

    def _named(self, token: Token) -> Token:
        """`token` with the texts of itself and its alternatives."""
        if self.tokenizer is None:
            return token
        own, *others = [self.tokenizer.piece(id) for id in (token.id, *(id for id, _ in token.top))]
        texts, raws = tuple([each.text for each in others]), tuple([each.raw for each in others])
        return replace(token, piece=own.text, top_pieces=texts, raw=own.raw, top_raws=raws)


def _form_of(message: Generate, tokenizer: Tokenizer | None) -> ToolFormat | None:
    """How the answer writes calls; None where it is offered no tools."""
    if tokenizer is None or not message.offers_tools:
        return None
    return tokenizer.tool_format if message.tool_format is None else FORMATS[message.tool_format]
