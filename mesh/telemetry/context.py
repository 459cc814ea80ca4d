"""W3C trace contexts: to which trace a request belongs, and whether its sender wants it kept.

traceparent: 00-TRACE-SPAN-FLAGS      https://www.w3.org/TR/trace-context/
"""

from __future__ import annotations

import hashlib
import random
import re
from dataclasses import dataclass
from typing import Final

from opentelemetry import propagate
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

__all__ = ["TraceContext", "TraceSampling", "chosen", "current", "new_span_id", "remote"]

_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?", re.ASCII)
_LONGEST: Final = 128
_random = random.SystemRandom()


@dataclass(frozen=True, slots=True)
class TraceContext:
    """trace: 32 hex digits. span: 16 hex digits of the span that comes next above, None for the root. sampled: whether the process above
    keeps the trace; None: this process is the first one, and decides."""

    trace: str
    span: str | None = None
    sampled: bool | None = None

    @classmethod
    def new(cls) -> TraceContext:
        return cls(f"{_random.getrandbits(128) or 1:032x}")

    @classmethod
    def parse(cls, header: str | None) -> TraceContext:
        """That of a `traceparent` header. A new trace where there is no header, or none that can be read, as the standard wants it."""
        found = _TRACEPARENT.fullmatch(header) if header is not None and len(header) <= _LONGEST else None
        return cls.new() if found is None else cls(found[1], found[2], bool(int(found[3], 16) & 1))

    @classmethod
    def of(cls, header: str | None, session: str) -> TraceContext:
        """As `parse`, but where the sender names no trace, its id is a digest of the session: a generation stays in its trace when another
        coordinator goes on with it."""
        found = cls.parse(header)
        return found if found.span is not None else cls(hashlib.sha256(b"trace " + session.encode()).hexdigest()[:32])

    def header(self, span: str, *, sampled: bool) -> str:
        """The header for what happens below the span `span` of this trace."""
        return f"00-{self.trace}-{span}-{'01' if sampled else '00'}"


@dataclass(frozen=True)
class TraceSampling:
    """Which traces are kept for those to whom spans are sent. ratio: of all requests, from 0 to 1, where the sender has not decided.
    slow_s, slow_first_token_s: a request that took longer, to its end or to its first token, is kept in any case. content: the texts of
    prompts and answers are in the spans. Not `enabled`: the steps of requests are not recorded at all."""

    ratio: float = 0.05
    slow_s: float = 60.0
    slow_first_token_s: float = 10.0
    content: bool = False
    enabled: bool = True


def new_span_id() -> str:
    return f"{random.getrandbits(64) or 1:016x}"


def chosen(trace: str, ratio: float) -> bool:
    """Whether a trace is one of the `ratio` (0 to 1) that are kept. Every process decides the same, by the rule of OpenTelemetry's
    TraceIdRatioBased."""
    return int(trace[16:], 16) < round(ratio * 2**64)


def current() -> str | None:
    """The `traceparent` of the span that the calling program is in; None where it is in none."""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent")


def remote(trace: str, span: str, *, sampled: bool) -> NonRecordingSpan:
    """A span that another part of the program records, for OpenTelemetry to name as the one above."""
    flags = TraceFlags(TraceFlags.SAMPLED if sampled else TraceFlags.DEFAULT)
    return NonRecordingSpan(SpanContext(int(trace, 16), int(span, 16), is_remote=True, trace_flags=flags))
