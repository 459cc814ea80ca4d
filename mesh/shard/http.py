"""A shard's own HTTP: its health and its statistics. Plain ASGI, because there are only two questions.

GET /api/v1/health         200 if the shard serves: it is ready, connected, and its compute thread answers. Otherwise 503 with the reason
GET /api/v1/health/live    200 as long as the process answers
GET /api/v1/stats          counters and memory. Where tokens are asked for, the token needs the scope admin
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import orjson

from mesh.errors import Denied
from mesh.http.hosts import host_of, is_plain
from mesh.http.listener import Listener, is_loopback
from mesh.http.tokens import Checks
from mesh.shard.service import Shard

__all__ = ["ShardHttp"]

_HEADERS = [
    (b"content-type", b"application/json"),
    (b"cache-control", b"no-store"),
    (b"x-content-type-options", b"nosniff"),
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
]


class ShardHttp:
    """The application and its listener. `check_interval_s`: how often the compute thread is asked for an answer; `timeout_s`: how long
    the answer may take. `shard` is None until the process has made its shard. `also`: further listeners, which answer the same."""

    def __init__(
        self,
        listener: Listener,
        *,
        check_interval_s: float,
        timeout_s: float,
        verifier: Checks | None = None,
        also: Sequence[Listener] = (),
    ) -> None:
        self.listener = listener
        self._also = also
        self.shard: Shard | None = None
        self._check_interval_s = check_interval_s
        self._timeout_s = timeout_s
        self._verifier = verifier
        self._asked_at: float | None = None  # when the compute thread was asked; None once it has answered

    async def run(self) -> None:
        """Answer requests until cancelled or stopped."""
        checking = asyncio.create_task(self._check())
        also = [asyncio.create_task(listener.serve(self.app)) for listener in self._also]
        try:
            await self.listener.serve(self.app)
        finally:
            for listener in self._also:
                listener.stop(now=True)
            await asyncio.gather(*also)
            checking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await checking

    def reason(self) -> str:
        """Why the shard does not serve; empty if it does."""
        shard = self.shard
        if shard is None:
            return "the shard has not begun to load"
        if not shard.ready.is_set():
            return f"the shard is {shard.status}"
        if not shard.bus.connected:
            return "the connection to NATS is lost"
        if not shard.computing:
            return "the compute thread has ended"
        silent_s = 0.0 if self._asked_at is None else time.monotonic() - self._asked_at
        return f"the compute thread has not answered for {silent_s:.0f} s" if silent_s > self._timeout_s else ""

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI application."""
        status, document, headers = self._answer(scope)
        body = orjson.dumps(document)
        start = {"type": "http.response.start", "status": status}
        await send({**start, "headers": [*_HEADERS, (b"content-length", str(len(body)).encode()), *headers]})
        await send({"type": "http.response.body", "body": body})

    def _answer(self, scope: Any) -> tuple[int, dict[str, Any], list[tuple[bytes, bytes]]]:
        path = scope["path"]
        if self._verifier is None and is_loopback(self.listener.options.host) and not is_plain(host_of(scope)):
            return 421, _error("misdirected", "no token is asked for here, so only addresses and names without a dot are answered"), []
        if path not in ("/api/v1/health", "/api/v1/health/live", "/api/v1/stats"):
            return 404, _error("not_found", "there is no such path: see /api/v1/health and /api/v1/stats"), []
        if scope["method"] not in ("GET", "HEAD"):
            return 405, _error("method_not_allowed", "only GET is answered here"), [(b"allow", b"GET, HEAD")]
        if path == "/api/v1/health/live":
            return 200, {"status": "live"}, []
        shard = self.shard
        if path == "/api/v1/health":
            reason = self.reason()
            document: dict[str, Any] = {"status": "not_ready" if reason else "ready", "reason": reason}
            if shard is not None:
                layers = str(shard.state.shape.layers)
                document |= {"shard": shard.options.name, "model": shard.manifest.name, "layers": layers, "state": shard.status}
            return 503 if reason else 200, document, []
        try:
            self._admit(scope)
        except PermissionError as error:
            return 401, _error("not_authenticated", str(error)), [(b"www-authenticate", b"Bearer")]
        except Denied as error:
            return 403, _error("denied", str(error)), []
        if shard is None:
            return 503, _error("unavailable", "the shard has not begun to load"), [(b"retry-after", b"2")]
        return 200, {"layers": str(shard.state.shape.layers), **shard.stats().model_dump(mode="json")}, []

    def _admit(self, scope: Any) -> None:
        """PermissionError: the request has no valid token. Denied: the token lacks the scope."""
        if self._verifier is None:
            return
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"").decode("latin-1")
        scheme, _, token = header.partition(" ")
        if scheme.lower() != "bearer":
            raise PermissionError("a token is needed: send the header `Authorization: Bearer TOKEN` (see `mesh token issue`)")
        try:
            claims = self._verifier.verify(token.strip())
        except Denied as error:
            raise PermissionError(str(error)) from None
        if not claims.allows("admin"):
            raise Denied("this token may not do this: it needs the scope admin")

    async def _check(self) -> None:
        """Ask the compute thread for an answer, again and again."""
        while True:
            if self.shard is not None and self._asked_at is None and self.shard.ready.is_set():
                self._asked_at = time.monotonic()
                self.shard.ping(self._answered)
            await asyncio.sleep(self._check_interval_s)

    def _answered(self) -> None:
        self._asked_at = None


def _error(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}
