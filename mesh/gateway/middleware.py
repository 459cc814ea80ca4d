"""What every request passes: a request id, bounds on its body, headers for browsers, errors as documents, a line in the log.

HEAD is answered as GET would be, without the body; a path with a slash at its end is the path without it.

It is plain ASGI, so a token of a stream costs no more than two counters.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import secrets
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mesh.gateway.errors import BodyRefused, HttpError, error_response, internal_error
from mesh.gateway.events import ClientGone
from mesh.gateway.origin import foreign_page
from mesh.gateway.settings import Limits
from mesh.gateway.tracing import EdgeTracing, HttpTrace
from mesh.http.hosts import is_plain
from mesh.telemetry.log_context import log_context
from mesh.telemetry.registry import Histogram

__all__ = ["Counters", "Edge"]

log = logging.getLogger("mesh.http")
access = logging.getLogger("mesh.access")

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH")
_CSP = "default-src 'none'; frame-ancestors 'none'"


@dataclass(slots=True)
class Counters:
    """Counts of requests since the start, by status (499: the client left), and of those under way; of these, `streams` are answered
    with server-sent events."""

    active: int = 0
    streams: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    durations: Histogram = field(default_factory=lambda: Histogram("http_server_request_duration_seconds"))

    def as_dict(self) -> dict[str, Any]:
        return {"active": self.active, "requests": dict(self.requests)}


class _HeadAnswered(Exception):
    """The head of an answer has been sent, and the request was for no more."""


class Edge:
    """The outermost part. `secure`: the listener uses TLS. `plain_names_only`: requests are answered only if their Host is an address
    or a name without a dot. A web page of another host could otherwise rebind its name to reach a listener on its visitor's machine.
    `pages_of`: where no token is required, pages of these other origins may send requests; None: a token is required. `cors_origins`:
    pages of these other origins may read answers."""

    def __init__(
        self,
        app: ASGIApp,
        limits: Limits,
        tracing: EdgeTracing,
        *,
        secure: bool,
        plain_names_only: bool = False,
        pages_of: Collection[str] | None = None,
        cors_origins: Collection[str] = (),
    ) -> None:
        self._cors_origins = cors_origins
        self._app = self._readable(app)
        self._limits = limits
        self._tracing = tracing
        self._plain_names_only = plain_names_only
        self._pages_of = pages_of
        self.counters = Counters()
        self._fixed = {
            "x-content-type-options": "nosniff",
            "x-frame-options": "DENY",
            "referrer-policy": "no-referrer",
            **({"strict-transport-security": "max-age=31536000"} if secure else {}),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})["request_id"] = request_id
        with self._tracing.of(headers) as trace, log_context(http_request=request_id, trace=trace.context.trace):
            await self._answer(scope, receive, send, headers, request_id, trace)

    def _readable(self, app: ASGIApp) -> ASGIApp:
        """`app`, whose answers pages of `cors_origins` may read. These pages may send any header: OpenAI's client sends a dozen of its
        own, and none of them gives a right, except a token, which a page cannot know."""
        if not self._cors_origins:
            return app
        return CORSMiddleware(
            app,
            allow_origins=list(self._cors_origins),
            allow_methods=["GET", "HEAD", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "x-trace-id", "retry-after", "x-should-retry"],
        )

    async def _answer(self, outer: Scope, receive: Receive, send: Send, headers: Headers, request_id: str, trace: HttpTrace) -> None:
        began, began_ns = time.perf_counter(), time.time_ns()
        scope, without_body = _as_routes_have_it(outer), outer["method"] == "HEAD"
        status = 0
        streams = False

        async def answer(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                for name, value in self._fixed.items():
                    out.setdefault(name, value)
                out.setdefault("content-security-policy", _CSP)
                out.setdefault("cache-control", "no-store")
                out["x-request-id"] = request_id
                if out.get("content-type", "").startswith("text/event-stream"):
                    streams = True
                    counters.streams += 1
                out["x-trace-id"] = trace.context.trace
            await send(message)
            if without_body:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                raise _HeadAnswered

        body = _Body(receive, self._limits)
        counters = self.counters
        counters.active += 1
        try:
            refusal = self._refusal(outer["method"], headers)
            if refusal is not None:
                await body.drop()
                await self._readable(error_response(refusal, scope["path"], request_id))(scope, receive, answer)
            else:
                await self._app(scope, body.receive, answer)
        except _HeadAnswered:
            pass
        except ClientGone:
            status = status or 499
        except Exception:
            log.exception("%s %s", outer["method"], _route(scope))
            if status:  # the response has begun, so only its connection can be ended
                raise
            with contextlib.suppress(_HeadAnswered):
                await self._readable(error_response(internal_error(), scope["path"], request_id))(scope, receive, answer)
        finally:
            counters.active -= 1
            counters.streams -= streams
            counters.requests[str(status)] += 1
            counters.durations.observe(time.perf_counter() - began, _method(outer), _route(scope), str(status))
            self._tracing.ended(trace, scope, status, began_ns, time.time_ns())
            _log_access(scope, outer["method"], status, time.perf_counter() - began)

    def _refusal(self, method: str, headers: Headers) -> HttpError | None:
        """The error of a request that is wrong before its body is read. None: nothing is wrong."""
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._limits.max_body_bytes:
            return _too_large(self._limits)
        if self._plain_names_only and not is_plain(headers.get("host", "")):
            return HttpError(
                "no token is asked for here, so only addresses and names without a dot are answered: set authentication.enabled: true",
                status=421,
                code="misdirected",
            )
        encoding = headers.get("content-encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            return HttpError(
                "the body is compressed, which is not read here: send it without Content-Encoding",
                status=415,
                code="encoding_not_supported",
            )
        return None if self._pages_of is None else foreign_page(method, headers, self._pages_of)


def _as_routes_have_it(scope: Scope) -> Scope:
    """The request as the routes know it: GET for HEAD, and no slash at the end of the path."""
    method, path = scope["method"], scope["path"]
    if method != "HEAD" and not path.endswith("/"):
        return scope
    return {**scope, "method": "GET" if method == "HEAD" else method, "path": path.rstrip("/") or "/"}


def _method(scope: Scope) -> str:
    return scope["method"] if scope["method"] in _METHODS else "_OTHER"


def _log_access(scope: Scope, method: str, status: int, seconds: float) -> None:
    """One line for a request that has ended."""
    level = logging.DEBUG if status == 200 and "/health" in scope["path"] else logging.INFO
    if not access.isEnabledFor(level):
        return
    fields = {
        "client": (scope.get("client") or ("-",))[0],
        "method": method,
        "route": _route(scope),
        "status": status,
        "seconds": round(seconds, 6),
        "caller": scope["state"].get("caller_name"),
    }
    text = "%(client)s %(method)s %(route)s %(status)d %(ms).1f ms"
    access.log(level, text, {**fields, "ms": seconds * 1e3}, extra={"fields": fields})


def _route(scope: Scope) -> str:
    """The path with its changing parts as names: they may be secrets, such as the id of a batch."""
    template = getattr(scope.get("route"), "path", None)
    if isinstance(template, str):
        return template
    return str(scope["path"]) if "endpoint" in scope and not scope.get("path_params") else "(no route)"


_DROP_BYTES = 256 * 1024
_DROP_S = 1.0


class _Body:
    """Receives a body with a bound on its size and on its time. What comes after the body has no bounds."""

    def __init__(self, receive: Receive, limits: Limits) -> None:
        self._receive = receive
        self._limits = limits
        self._size = 0
        self._more = True
        self._until: float | None = None

    async def receive(self) -> Message:
        if not self._more:
            return await self._receive()
        loop = asyncio.get_running_loop()
        if self._until is None:
            self._until = loop.time() + self._limits.body_timeout_s
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            late = HttpError(f"the body did not arrive within {self._limits.body_timeout_s:g} s", status=408, code="body_timeout")
            raise BodyRefused(late) from None
        if message["type"] == "http.request":
            self._size += len(message.get("body", b""))
            self._more = message.get("more_body", False)
            if self._size > self._limits.max_body_bytes:
                await self.drop()
                raise BodyRefused(_too_large(self._limits))
        return message

    async def drop(self) -> None:
        """Read and drop a little more of the body. If the gateway closed the connection while the client still sends, the connection would
        be reset, and the client would lose the answer."""
        dropped = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DROP_S):
                while self._more and dropped < _DROP_BYTES:
                    message = await self._receive()
                    dropped += len(message.get("body", b""))
                    self._more = message["type"] == "http.request" and message.get("more_body", False)


def _too_large(limits: Limits) -> HttpError:
    return HttpError(f"the body is larger than {limits.max_body_bytes:,} bytes: send less at a time", status=413, code="payload_too_large")
