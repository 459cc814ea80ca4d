"""What OpenTelemetry's standard variables say: whether traces or metrics are sent to a collector, and how.

OTEL_SDK_DISABLED=true                            nothing is
OTEL_TRACES_EXPORTER, OTEL_METRICS_EXPORTER       otlp: they are; another word: they are not
OTEL_EXPORTER_OTLP_ENDPOINT, _TRACES_ENDPOINT, _METRICS_ENDPOINT    without such a word: they are
OTEL_EXPORTER_OTLP_PROTOCOL, _TRACES_PROTOCOL, _METRICS_PROTOCOL    http/protobuf or grpc
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

__all__ = ["protocol_of", "sdk_disabled", "wants_otlp"]

Signal = Literal["TRACES", "METRICS"]


def sdk_disabled(environment: Mapping[str, str]) -> bool:
    return environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"


def wants_otlp(signal: Signal, environment: Mapping[str, str]) -> bool:
    """Whether the environment asks for `signal` over OTLP."""
    if sdk_disabled(environment):
        return False
    named = environment.get(f"OTEL_{signal}_EXPORTER", "").strip().lower()
    if named:
        return "otlp" in named.split(",")
    return bool(_first(f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT", environment))


def protocol_of(signal: Signal, environment: Mapping[str, str]) -> str | None:
    """None: the environment does not say."""
    return _first(f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL", environment)


def _first(own: str, shared: str, environment: Mapping[str, str]) -> str | None:
    return environment.get(own) or environment.get(shared) or None
