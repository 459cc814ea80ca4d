"""The trace document, a coordinator's answer: the report of a session, sums for each of its routes (`legs`), and spans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson
from pydantic import TypeAdapter, ValidationError

from mesh.errors import MessageRejected
from mesh.protocol.documents import problem
from mesh.protocol.spans import Span
from mesh.telemetry.views.bound import bound
from mesh.telemetry.views.skew import aligned
from mesh.telemetry.views.waterfall import clocks

__all__ = ["looked_at", "spans_of"]

_SPANS: Final = TypeAdapter(tuple[Span, ...])


def spans_of(document: Mapping[str, Any]) -> tuple[Span, ...]:
    """The spans of a trace document. MessageRejected: they are not spans as this version knows them."""
    try:
        return _SPANS.validate_json(orjson.dumps(document.get("spans", ())))
    except ValidationError as error:
        key, _, message = problem(error)
        raise MessageRejected(f"spans.{key}: {message}", field=f"spans.{key}") from None


def looked_at(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with its spans on one clock, and with `bound` (what bounds the request: sentence, phase, parts) and `clocks` (a line for
    each clock that was corrected)."""
    spans = spans_of(document)
    found = aligned(spans)
    shown = [
        given if now is before else {**given, "start_ns": now.start_ns, "end_ns": now.end_ns}
        for given, before, now in zip(document.get("spans", ()), spans, found.spans, strict=True)
    ]
    return {**document, "spans": shown, "bound": bound(document, found.spans).document(), "clocks": clocks(found.spans, found)}
