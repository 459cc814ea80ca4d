"""An HTTP edge inside a process: a client, an application and a listener, in the event loop of the process."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable
from dataclasses import replace

from mesh.bus import BusOptions
from mesh.client import AsyncMeshClient
from mesh.gateway import dashboard
from mesh.gateway.accounts import Accounts
from mesh.gateway.app import create_app
from mesh.gateway.settings import GatewaySettings
from mesh.gateway.sharing import Sharing
from mesh.http.listener import Listener, is_loopback
from mesh.telemetry.export import SpanExport
from mesh.telemetry.registry import Registry

__all__ = ["HttpEdge"]

log = logging.getLogger("mesh.http")

_SPARE_FILES = 256


class HttpEdge:
    """`bind` takes the port, so that a taken port is an error before anything else starts. `serve` then runs until `stop`."""

    def __init__(self, listener: Listener, settings: GatewaySettings, export: SpanExport | None = None) -> None:
        self.settings = settings
        self._export = export
        self._listener = listener
        self._watch: dashboard.Watch | None = None

    @classmethod
    def bind(cls, settings: GatewaySettings, *, or_free: bool = False, export: SpanExport | None = None) -> HttpEdge:
        """Take the port; with `or_free`, any free port if it is taken. `export`: where spans go that leave the mesh.
        ConfigError: the port is taken, or TLS files are wrong."""
        _allow_files(settings.listener.max_connections + _SPARE_FILES)
        return cls(Listener.bind(settings.listener, or_free=or_free), settings, export)

    @property
    def url(self) -> str:
        """The URL for a client on this machine."""
        return self._listener.url

    async def serve(
        self,
        options: BusOptions,
        *,
        model: str | None = None,
        registry: Registry | None = None,
        connected: Callable[[], None] | None = None,
    ) -> None:
        """Connect to the mesh and answer requests until `stop`. `model` overrides the model of the settings. `registry`: the metrics of the
        process. `connected` is called once there is a connection."""
        settings = self.settings if model is None else replace(self.settings, model=model)
        client = AsyncMeshClient(options=options, model=settings.model, retries=settings.retries, retry_busy=False)
        await client.connect()
        if connected is not None:
            connected()
        watch = self._watch = dashboard.Watch(client)
        accounts = Accounts()
        try:
            bus = client.connection()
            assert bus is not None
            await Sharing(accounts).start(bus)
            if settings.verifier is None and not is_loopback(settings.listener.host):
                log.warning("every caller that reaches %s may send requests: authentication.enabled is false", self.url)
            log.info("HTTP on %s", self._listener.where)
            app = create_app(
                client,
                settings,
                routes=dashboard.routes(watch),
                registry=registry,
                connections=lambda: self._listener.connections,
                export=self._export,
                accounts=accounts,
            )
            await self._listener.serve(app)
        finally:
            await watch.close()
            await client.close()

    def stop(self, *, now: bool = False) -> None:
        """Take no new requests. Requests under way may finish, unless `now`."""
        if self._watch is not None:
            self._watch.end()
        self._listener.stop(now=now)


def _allow_files(wanted: int) -> None:
    """Raise the limit of open files to this user's maximum. Each connection is an open file, and the usual limit is 1024."""
    if sys.platform == "win32":
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
