"""The metrics port: `GET /metrics` of one process, for Prometheus.

No token is asked for, so it listens on loopback unless it is told otherwise. Its connections are few and bounded in time, and what was
written is sent again for a moment (registry.py), so a slow or hostile reader takes nothing from the tokens.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator
from typing import Any, Final

from mesh.http.hosts import host_of, is_plain
from mesh.http.listener import Listener, ListenerOptions, is_loopback
from mesh.settings.schema import MetricsSection
from mesh.telemetry.export import SpanExport
from mesh.telemetry.metrics_otlp import OtlpExport
from mesh.telemetry.registry import Registry

__all__ = ["MetricsEndpoint", "reporting"]

log = logging.getLogger("mesh.metrics")

_CONNECTIONS: Final = 16
_HEAD_S: Final = 10.0
_WRITE_S: Final = 10.0
_WILDCARDS: Final = ("0.0.0.0", "::", "")


class MetricsEndpoint:
    """`bind` takes the port; `run` answers until cancelled. `url` is where other machines find it."""

    def __init__(self, listener: Listener, registry: Registry) -> None:
        self.registry = registry
        self._listener = listener

    @classmethod
    def bind(cls, registry: Registry, section: MetricsSection, *, port: int | None = None, or_free: bool = False) -> MetricsEndpoint | None:
        """Take the port of `section`, or `port`; None where metrics are off. A port that nobody has chosen may be any free one, and so may
        a chosen one with `or_free`. ConfigError: the port is taken."""
        if not section.enabled:
            return None
        options = ListenerOptions(
            section.listen_host,
            section.port if port is None else port,
            _CONNECTIONS,
            head_timeout_s=_HEAD_S,
            write_timeout_s=_WRITE_S,
            grace_s=0,
        )
        chosen = port is not None or "port" in section.model_fields_set
        return cls(Listener.bind(options, or_free=or_free or not chosen), registry)

    @property
    def url(self) -> str:
        host = self._listener.options.host
        return f"http://{socket.gethostname()}:{self._listener.port}/metrics" if host in _WILDCARDS else f"{self._listener.url}/metrics"

    def say(self) -> None:
        """Log where the metrics are. The process calls it once it is connected, so that a start that fails says its error alone."""
        log.info("metrics on %s", self.url)

    def close(self) -> None:
        """Give the port back."""
        self._listener.stop(now=True)

    async def run(self) -> None:
        """Answer requests until cancelled."""
        serving = asyncio.create_task(self._listener.serve(self.app))
        try:
            await asyncio.shield(serving)
        finally:
            self.close()
            await asyncio.gather(serving, return_exceptions=True)

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI application."""
        status, headers, body = 200, [], b""
        if is_loopback(self._listener.options.host) and not is_plain(host_of(scope)):
            status, body = 421, b"only addresses and names without a dot are answered here\n"
        elif scope["path"] != "/metrics":
            status, body = 404, b"see /metrics\n"
        elif scope["method"] not in ("GET", "HEAD"):
            status, headers, body = 405, [(b"allow", b"GET, HEAD")], b"only GET is answered here\n"
        content_type = "text/plain; charset=utf-8"
        if status == 200:
            accept = next((value for name, value in scope["headers"] if name == b"accept"), b"").decode("latin-1")
            body, content_type = self.registry.render(accept)
        headers += [(b"content-type", content_type.encode()), (b"content-length", str(len(body)).encode()), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body if scope["method"] != "HEAD" else b""})


@contextlib.asynccontextmanager
async def reporting(registry: Registry, endpoint: MetricsEndpoint | None, spans: SpanExport | None = None) -> AsyncIterator[None]:
    """While this context is open the process reports its metrics: on its port, if it has one, and over OTLP, if the environment asks for
    that. At its end the last of `spans` are sent."""
    export = OtlpExport.start(registry, asyncio.get_running_loop())
    answering = None if endpoint is None else asyncio.create_task(endpoint.run())
    try:
        yield
    finally:
        if answering is not None:
            answering.cancel()
            await asyncio.gather(answering, return_exceptions=True)
        if export is not None:
            export.stop()
        if spans is not None:
            await asyncio.to_thread(spans.stop)
