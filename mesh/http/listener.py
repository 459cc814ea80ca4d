"""An HTTP listener inside a process of the mesh: uvicorn in the event loop that is there, with limits of its own.

What uvicorn does not bound is bounded here: the number of connections (one too many is told so and closed, before it has asked
anything), the size of a request's head, and the time that a connection may spend in any state. Signals stay the process's.

    state of a connection                                  ends by
    before a request, or within its head                   head_timeout_s
    a request under way                                    the application: it bounds the body's time and its own work
    the client does not read its answer                    write_timeout_s
    answered before the whole body came                    _LINGER_S, in which the rest may come; it does not count as a connection
    between requests                                       idle_timeout_s
    between requests, and bytes that begin no request      head_timeout_s

Why it is written this way: docs/adr/0010-listener.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from mesh.errors import ConfigError
from mesh.http.certificates import renewing
from mesh.settings.defaults import DEFAULT_HTTP_PORT

__all__ = ["Listener", "ListenerOptions", "Tls", "is_loopback"]

log = logging.getLogger("mesh.http")

_LINGER_S = 2.0  # how long a refused connection may take to read why
_DRAIN_BYTES = 256 * 1024  # of a body that is not wanted
_LINGERING = 256  # so many refused connections may take that long at once; further ones are closed without a word
_BACKLOG = 2048
_SHORTEST_GRACE_S = 0.3  # for connections without a request to close


def _body(message: str, kind: str, code: str) -> bytes:
    return orjson.dumps({"error": {"message": message, "type": kind, "param": None, "code": code}})


_TOO_MANY = _body("too many connections: try again later", "server_error", "too_many_connections")
_NOT_HTTP = _body("this is not HTTP/1.1", "invalid_request_error", "not_http")
_URL_TOO_LONG = _body("the URL is too long", "invalid_request_error", "url_too_long")
_HEAD_TOO_LARGE = _body("the request head is too large", "invalid_request_error", "head_too_large")


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files. `ca`: the authority that must have signed the certificates that clients show; `required`: they must show one."""

    cert: str
    key: str
    ca: str | None = None
    required: bool = False

    def context(self) -> ssl.SSLContext:
        """The TLS context of these files. ConfigError: a file is missing, or the files do not belong together."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.required and self.ca is None:
            raise ConfigError("tls.require_client_certificate needs tls.ca_file: the authority that signs them")
        try:
            context.load_cert_chain(self.cert, self.key)
            if self.ca is not None:
                context.load_verify_locations(cafile=self.ca)
                context.verify_mode = ssl.CERT_REQUIRED if self.required else ssl.CERT_OPTIONAL
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(str(name) for name in (self.cert, self.key, self.ca) if name is not None)
            raise ConfigError(f"TLS files {files}: {error}: give PEM files that belong together") from None
        return context


@dataclass(frozen=True, slots=True)
class ListenerOptions:
    """Where to listen, and the limits.

    port 0: a free one. head_timeout_s: for a connection's first bytes, and for each request's head. idle_timeout_s: between two requests.
    write_timeout_s: how long a client may leave sent data unread before its connection is dropped. grace_s: how long requests may continue
    after `stop`. send_buffer_bytes: the kernel's buffer for each connection (None: its own choice).
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_HTTP_PORT
    max_connections: int = 1000
    max_head_bytes: int = 64 * 1024
    max_url_bytes: int = 8 * 1024
    max_headers: int = 128
    head_timeout_s: float = 75.0
    idle_timeout_s: float = 75.0
    write_timeout_s: float = 30.0
    grace_s: float = 10.0
    send_buffer_bytes: int | None = None
    tls: Tls | None = None


class Listener:
    """`bind` takes the port, `serve` answers requests on it until `stop`."""

    def __init__(self, options: ListenerOptions, sock: socket.socket, context: ssl.SSLContext | None) -> None:
        self.options = options
        self._socket = sock
        self._context = context
        self._server: _Server | None = None
        self._stopped = False

    @classmethod
    def bind(cls, options: ListenerOptions, *, or_free: bool = False) -> Listener:
        """Take the port. ConfigError: it is taken (unless `or_free`: then any free port is used), or TLS files are wrong."""
        tls = options.tls
        context = None if tls is None else renewing(tls.context, (tls.cert, tls.key))
        try:
            sock = _listening(options, options.port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not or_free:
                raise ConfigError(_cannot_listen(options, error)) from None
            sock = _listening(options, 0)
        return cls(options, sock, context)

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    @property
    def url(self) -> str:
        """Where clients on this machine find it."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(self.options.host, self.options.host)
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        return f"{'https' if self._context is not None else 'http'}://{host}:{self.port}"

    @property
    def where(self) -> str:
        """The URL, and for a listener on every address of the machine what it listens on."""
        every = self.options.host in ("0.0.0.0", "::", "")
        return f"{self.url} (listening on {self.options.host or '0.0.0.0'}, port {self.port})" if every else self.url

    async def serve(self, app: Any) -> None:
        """Answer requests with `app` (ASGI) until `stop`. Requests under way may then continue for `grace_s`."""
        if self._stopped:
            return
        options = self.options
        context = self._context
        config = uvicorn.Config(
            app,
            http=_Connection,
            interface="asgi3",
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="error",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            timeout_keep_alive=max(round(options.idle_timeout_s), 1),
            timeout_graceful_shutdown=max(options.grace_s, _SHORTEST_GRACE_S),  # type: ignore[arg-type]  # a float is as good
            ssl_context_factory=None if context is None else lambda config, default: context,
        )
        config.load()
        self._server = _Server(config, options)
        await self._server.serve(sockets=[self._socket])

    def stop(self, *, now: bool = False) -> None:
        """Accept nothing new and end. `now`: do not wait for requests under way."""
        self._stopped = True
        if self._server is None:
            self._socket.close()
            return
        self._server.should_exit = True
        if now:
            self._server.config.timeout_graceful_shutdown = _SHORTEST_GRACE_S  # type: ignore[assignment]

    @property
    def connections(self) -> int:
        return 0 if self._server is None else len(self._server.server_state.connections)


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers."""

    def __init__(self, config: uvicorn.Config, options: ListenerOptions) -> None:
        super().__init__(config)
        self.server_state.options = options  # type: ignore[attr-defined]  # the only object that every connection gets
        self.server_state.lingering = 0  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Connection(HttpToolsProtocol):
    """One connection, with the limits."""

    _options: ListenerOptions
    _refused = False  # then it never was one of uvicorn's connections
    _lingers = False
    _ended = False  # further data is not read
    _draining = False  # the request is answered, and the rest of its body is read and thrown away
    _body_due = False  # the head of a request has come, and not yet all of its body
    _head_bytes = 0
    _url_bytes = 0
    _headers = 0
    _fed_bytes = 0  # since a head was expected
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._options = self.server_state.options  # type: ignore[attr-defined]
        if len(self.connections) >= self._options.max_connections:
            self._refused = True
            self.transport = transport
            self._say_and_close(b"503 Service Unavailable", _TOO_MANY, b"retry-after: 1\r\n")
            return
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        if self._draining:
            self._fed_bytes += len(data)
            if self._fed_bytes > _DRAIN_BYTES:
                self._linger()
                return
        elif self._head_timer is not None:  # the parser does not report a header before it is whole
            self._fed_bytes += len(data)
            if self._fed_bytes > 4 * self._options.max_head_bytes:
                self._head_too_large()
                return
        super().data_received(data)
        if self._head_timer is None and self.timeout_keep_alive_task is None and not self._ended and self._answered:
            self._expect_head()  # uvicorn took its timer away, and these bytes began no request

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = self._url_bytes = self._headers = 0
        if self._head_timer is None:
            self._expect_head()

    def on_url(self, url: bytes) -> None:
        super().on_url(url)
        self._url_bytes += len(url)
        if self._url_bytes > self._options.max_url_bytes:
            self._head_refused(b"414 URI Too Long", _URL_TOO_LONG)
            raise ValueError("the URL is too long")  # the parser stops
        self._count_head(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        self._headers += 1
        self._count_head(len(name) + len(value))

    def on_headers_complete(self) -> None:
        self._head_arrived()
        self._body_due = True
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._body_due = False
        super().on_message_complete()
        if self._draining:
            self._drained()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._body_due and self._answered and not self.transport.is_closing():
            self._drain()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_arrived()
        self._taken()
        self._give_lingering()
        if self._refused:
            self.parser = None  # type: ignore[assignment]
            return
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._write_timer = self.loop.call_later(self._options.write_timeout_s, self.transport.abort)

    def resume_writing(self) -> None:
        self._taken()
        super().resume_writing()

    def eof_received(self) -> None:
        if self._ended:
            self.transport.close()
        super().eof_received()

    # -- inside --------------------------------------------------------------------------------------------------------

    @property
    def _answered(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or (self.cycle.response_complete and not self.pipeline)

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._options.max_head_bytes or self._headers > self._options.max_headers:
            self._head_too_large()
            raise ValueError("the request head is too large")  # the parser stops

    def _taken(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _expect_head(self) -> None:
        self._head_bytes = self._fed_bytes = 0
        self._head_timer = self.loop.call_later(self._options.head_timeout_s, self._head_late)

    def _head_arrived(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_late(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _head_too_large(self) -> None:
        self._head_refused(b"431 Request Header Fields Too Large", _HEAD_TOO_LARGE)

    def _head_refused(self, status: bytes, body: bytes) -> None:
        self._head_arrived()
        self._say_and_close(status, body)

    def send_400_response(self, msg: str) -> None:
        if not self._ended:
            self._head_arrived()
            self._say_and_close(b"400 Bad Request", _NOT_HTTP)

    def _say_and_close(self, status: bytes, body: bytes, headers: bytes = b"") -> None:
        """Say why, and close once the client has read it. Closing at once while a request is unread would discard the answer."""
        self.transport.write(_document(status, body, headers))
        self._linger()

    def _drain(self) -> None:
        """A request was answered before its body came. A client that sends the rest at once may use the connection again."""
        self._unset_keepalive_if_required()
        self.connections.discard(self)
        if not self._take_lingering():
            self.transport.close()
            return
        self._draining = True
        self._fed_bytes = 0
        self._head_timer = self.loop.call_later(_LINGER_S, self._head_late)

    def _drained(self) -> None:
        """The whole body has come after all."""
        self._draining = False
        self._head_arrived()
        self._give_lingering()
        if len(self.connections) >= self._options.max_connections:
            self.transport.close()
        else:
            self.connections.add(self)

    def _linger(self) -> None:
        """Send no more, read what comes without looking at it, and close when the client does, or after _LINGER_S."""
        self._ended = True
        self._head_arrived()
        if not self._take_lingering():
            self.transport.close()
            return
        if self.transport.can_write_eof():  # not over TLS: there the answer's length tells the client where it ends
            self.transport.write_eof()
        self._head_timer = self.loop.call_later(_LINGER_S, self._head_late)

    def _take_lingering(self) -> bool:
        """Whether this connection may stay a little though it does not count as one; only so many may at once."""
        state: Any = self.server_state
        if not self._lingers and state.lingering < _LINGERING:
            state.lingering += 1
            self._lingers = True
        return self._lingers

    def _give_lingering(self) -> None:
        if self._lingers:
            self.server_state.lingering -= 1  # type: ignore[attr-defined]
            self._lingers = False


def _document(status: bytes, body: bytes, headers: bytes = b"") -> bytes:
    head = b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n%sconnection: close\r\n\r\n"
    return head % (status, len(body), headers) + body


def _listening(options: ListenerOptions, port: int) -> socket.socket:
    host = options.host
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # the kernel drops a peer that acknowledges nothing; accepted sockets inherit it
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(options.write_timeout_s * 1000))
        if options.send_buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, options.send_buffer_bytes)
        sock.bind((host.strip("[]"), port))
        sock.listen(_BACKLOG)  # from here on the port is ours; connections wait until `serve`
    except BaseException:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _cannot_listen(options: ListenerOptions, error: OSError) -> str:
    where = f"cannot listen on {options.host}:{options.port}"
    if error.errno == errno.EADDRINUSE:
        return f"{where}: the port is taken: give another listen_port, or 0 for a free one"
    if error.errno == errno.EACCES:
        return f"{where}: ports below 1024 need a privilege: give a higher listen_port"
    if error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
        return f"{where}: this machine has no such address: give one of its own, 127.0.0.1 or 0.0.0.0"
    return f"{where}: {error.strerror or error}: give an address and port of this machine"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on `host`."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
