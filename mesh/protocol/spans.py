"""Spans as they travel between processes of the mesh: to a coordinator that keeps them, and from it to those who look.

A span here has the fields of an OpenTelemetry span, with the names and limits of a message. mesh/telemetry/conventions.py says which
spans and attributes there are. Times are nanoseconds since 1970.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from mesh.protocol.message import Label, Line, Message, Natural, Token

__all__ = ["MAX_SPANS", "Link", "Span", "SpanBatch", "SpanEvent", "SpanId", "SpanKind", "TraceId"]

MAX_SPANS: Final = 256
"""The most spans of one message."""
MAX_ATTRIBUTES: Final = 64
MAX_LINKS: Final = 64
MAX_EVENTS: Final = 64

TraceId = Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
SpanId = Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
SpanKind = Literal["internal", "server", "client", "producer", "consumer"]
Text = Annotated[str, Field(max_length=1024)]
Value = (
    Text
    | bool
    | Annotated[int, Field(ge=-(2**63), lt=2**63)]
    | float
    | Annotated[tuple[Text, ...], Field(max_length=64, fail_fast=True)]
    | Annotated[tuple[Annotated[int, Field(ge=-(2**63), lt=2**63)], ...], Field(max_length=64, fail_fast=True)]
)
Attributes = Annotated[dict[Label, Value], Field(max_length=MAX_ATTRIBUTES)]


class Link(Message):
    """Another span that has to do with this one: each session of a decode batch, for a step of it."""

    trace: TraceId
    span: SpanId


class SpanEvent(Message):
    """A moment in a span."""

    name: Label
    at_ns: Natural
    attributes: Attributes = Field(default_factory=dict)


class Span(Message):
    """One span. parent: None for the root of its trace. service: the kind of process that it was in; instance: that process's name.
    error: what went wrong, empty where nothing did."""

    trace: TraceId
    span: SpanId
    parent: SpanId | None = None
    name: Label
    kind: SpanKind = "internal"
    service: Token
    instance: Label = ""
    start_ns: Natural
    end_ns: Natural
    attributes: Attributes = Field(default_factory=dict)
    links: Annotated[tuple[Link, ...], Field(max_length=MAX_LINKS, fail_fast=True)] = ()
    events: Annotated[tuple[SpanEvent, ...], Field(max_length=MAX_EVENTS, fail_fast=True)] = ()
    error: Line = ""

    @property
    def duration_ns(self) -> int:
        return self.end_ns - self.start_ns


class SpanBatch(Message):
    """Spans on their way to a coordinator that keeps them. dropped: spans of this process that were given up since its start."""

    limit_bytes: ClassVar[int] = 512 * 1024

    spans: Annotated[tuple[Span, ...], Field(max_length=MAX_SPANS, fail_fast=True)] = ()
    dropped: Natural = 0
