"""A trace as OTLP/JSON: one ExportTraceServiceRequest, which collectors and viewers of OpenTelemetry read."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from typing import Any, Final

from mesh.errors import ConfigError
from mesh.protocol.spans import Span
from mesh.telemetry.otel import readable

__all__ = ["otlp_json"]

_IDS: Final = ("traceId", "spanId", "parentSpanId")


def otlp_json(spans: Iterable[Span]) -> dict[str, Any]:
    """The trace, to be written as JSON. The SDK's own encoder makes it; protobuf's JSON has ids in base64, and OTLP/JSON has them in hex.
    ConfigError: the extra `otlp` is not installed."""
    try:
        from google.protobuf.json_format import MessageToDict
        from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    except ImportError as error:
        raise ConfigError(f"OTLP files need the extra `otlp` ({error.name} is missing): pip install 'stagemesh[otlp]'") from None
    document: dict[str, Any] = MessageToDict(encode_spans([readable(span) for span in spans]), use_integers_for_enums=True)
    for of_process in document.get("resourceSpans", ()):
        for of_scope in of_process["scopeSpans"]:
            for span in of_scope["spans"]:
                for holder in (span, *span.get("links", ())):
                    holder |= {name: base64.b64decode(holder[name]).hex() for name in _IDS if name in holder}
    return document
