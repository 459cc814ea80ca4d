"""The trace document, a coordinator's answer: the report of a session, sums for each of its routes (`legs`), and spans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import orjson
from pydantic import TypeAdapter, ValidationError

from mesh.errors import MessageRejected
from mesh.protocol.documents import problem
from mesh.protocol.spans import Span

__all__ = ["spans_of"]

_SPANS: Final = TypeAdapter(tuple[Span, ...])


def spans_of(document: Mapping[str, Any]) -> tuple[Span, ...]:
    """The spans of a trace document. MessageRejected: they are not spans as this version knows them."""
    try:
        return _SPANS.validate_json(orjson.dumps(document.get("spans", ())))
    except ValidationError as error:
        key, _, message = problem(error)
        raise MessageRejected(f"spans.{key}: {message}", field=f"spans.{key}") from None
