"""Spans leave the process: in a thread of their own, through OpenTelemetry's exporters, as the standard OTEL_* variables say.

What cannot be sent is dropped and counted. Nothing here is waited for: a collector that hangs or refuses costs the thread, not a token.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import Final

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from mesh.errors import ConfigError
from mesh.protocol.spans import Span
from mesh.telemetry.otel import readable
from mesh.telemetry.otel_environment import protocol_of, wants_otlp

__all__ = ["SpanExport", "exporters"]

log = logging.getLogger("mesh.telemetry")

MOST_WAITING: Final = 512
"""Traces that wait to be sent."""
_BATCH: Final = 512
_LAST_S: Final = 2.0
"""How long the end of the process waits for what is still to be sent."""

Make = Callable[[], Sequence[Span]]


def exporters(endpoint: str | None = None, protocol: str | None = None) -> list[SpanExporter]:
    """The exporters that the configuration (`endpoint`, `protocol`) or the environment asks for; none where no collector is named.
    ConfigError: the extra is not installed, or the protocol is not known."""
    if endpoint is None and not wants_otlp("TRACES", os.environ):
        return []
    protocol = protocol or protocol_of("TRACES", os.environ) or "http/protobuf"
    try:
        if protocol == "grpc":
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as ByGrpc

            return [ByGrpc(endpoint=endpoint) if endpoint else ByGrpc()]
        if protocol == "http/protobuf":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as ByHttp

            return [ByHttp(endpoint=_traces_url(endpoint)) if endpoint else ByHttp()]
    except ModuleNotFoundError:
        raise ConfigError("spans are to be sent to a collector, which needs the extra `otlp`: pip install 'stagemesh[otlp]'") from None
    raise ConfigError(f"the OTLP protocol is {protocol!r}: give http/protobuf or grpc")


def _traces_url(endpoint: str) -> str:
    return endpoint if endpoint.rstrip("/").endswith("/v1/traces") else f"{endpoint.rstrip('/')}/v1/traces"


class SpanExport:
    """`put(make)` has the spans that `make` returns sent, or drops them. counters: sent, failed (refused by the collector, or late) and
    full (they found no place to wait)."""

    def __init__(self, exporters: Sequence[SpanExporter], *, most_waiting: int = MOST_WAITING) -> None:
        self.counters: Counter[str] = Counter()
        self._exporters = exporters
        self._most = most_waiting
        self._waiting: deque[Make] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        return self.counters["failed"] + self.counters["full"]

    def put(self, make: Make) -> None:
        """Have spans sent. `make` is called in the thread. Never waits."""
        if len(self._waiting) >= self._most:
            self.counters["full"] += 1
            return
        self._waiting.append(make)
        self._wake.set()

    def stop(self) -> None:
        """Send what waits, for a moment at most."""
        self._stopping = True
        self._wake.set()
        self._thread.join(_LAST_S)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            while self._waiting:
                make = self._waiting.popleft()
                try:
                    self._send([readable(span) for span in make()])
                except Exception as error:  # a defect must not end the thread
                    self.counters["failed"] += 1
                    log.debug("making spans: %r", error)
            if self._stopping:
                return

    def _send(self, spans: Sequence[ReadableSpan]) -> None:
        for exporter in self._exporters:
            for begin in range(0, len(spans), _BATCH):
                batch = spans[begin : begin + _BATCH]
                good = exporter.export(batch) is SpanExportResult.SUCCESS
                self.counters["sent" if good else "failed"] += len(batch)
                self._note(good)

    def _note(self, good: bool) -> None:
        """Say once that the collector takes no spans, and once that it does again."""
        if good == self._failing:
            self._failing = not good
            if good:
                log.info("the collector takes spans again")
            else:
                log.warning("the collector takes no spans: they are dropped until it does")
