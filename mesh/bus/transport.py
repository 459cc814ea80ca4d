"""The socket under nats-py, with a short path for frames.

nats-py reads through a stream, a task and a queue with a task for each subscription, and writes through a queue and a task. Each direction
takes two or three turns of the event loop. Between two steps of a stage, whose weights have just gone through the processor's caches, that
takes several times as long as the sending itself (docs/adr/0004-frames-under-nats-py.md). So this transport hands a message to a direct
subscription as soon as its bytes arrive, and a message can be written from the thread that made it. Everything else stays nats-py's, on the
same connection: authentication, TLS, reconnecting, all other messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import ssl
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, cast
from urllib.parse import ParseResult

import nats.aio.transport

from mesh.protocol.headers import UNREAD_HEADER

__all__ = ["DirectTransport", "Incoming"]

log = logging.getLogger("mesh.bus")

_READ_AHEAD: Final = 4 * 1024 * 1024
"""Bytes that nats-py has not taken yet before the socket is left alone."""
_WRITE_AHEAD: Final = 1024 * 1024
"""Bytes that the socket has not taken yet before `send` refuses."""
_CRLF: Final = b"\r\n"
_MOST_LINE: Final = 1024 * 1024
"""The longest that a server writes is INFO, with the addresses of its cluster."""
_MOST_MESSAGE: Final = 128 * 1024 * 1024
"""With its headers. A server takes at most 64 MiB, by its `max_pending`."""
_MOST_HEADERS: Final = 64 * 1024
"""Of a message whose payload is dropped."""
_UNHEARD: Final = b"NATS/1.0 503\r\n"
"""The beginning of the headers with which the server reports that no process listens."""


class DirectTransport(nats.aio.transport.Transport):
    """One for the life of a connection, reconnections included.

    `direct` maps a subscription's id, as the protocol writes it, to the function that is called with the payload of each of its messages,
    in the event loop and in order; it must not raise. `unheard` does the same for the server's reports that no process listens, with the
    subject of the report. All other messages go to nats-py.

    `limits` gives a subscription the most bytes that its messages may have. What is longer is dropped as it arrives: the message goes to
    nats-py without its payload, with UNREAD_HEADER.
    """

    def __init__(self) -> None:
        self.direct: dict[bytes, Callable[[bytes], None]] = {}
        self.unheard: dict[bytes, Callable[[str], None]] = {}
        self.limits: dict[bytes, Callable[[], int]] = {}
        self._socket: asyncio.Transport | None = None
        self._protocol: Incoming | None = None
        self._short: _Short | None = None  # writes past the transport's buffer; None under TLS

    @property
    def reads(self) -> int:
        """How often bytes have arrived on the present connection."""
        return 0 if self._protocol is None else self._protocol.reads

    @property
    def holding(self) -> bool:
        """Whether nothing is read at present, because nats-py has not taken yet what arrived."""
        return self._protocol is not None and self._protocol.held

    def abort(self) -> None:
        """Close the connection at once: what is still to be written is dropped."""
        if self._socket is not None:
            self._socket.abort()

    # -- the short path -------------------------------------------------------------------------------------------------

    def send(self, head: bytes, data: bytes) -> bool:
        """Write a protocol line and its payload, together with everything else that this turn of the loop writes. False: there is no
        socket, or it has too much to write. Call it in the loop's thread."""
        socket = self._socket
        if socket is None or socket.is_closing() or socket.get_write_buffer_size() > _WRITE_AHEAD:
            return False
        self._write((head, data, _CRLF))
        return True

    def send_now(self, head: bytes, data: bytes) -> bool:
        """The same, but written at once. Any thread may call it. False: other bytes are still to be written, or the connection uses TLS."""
        short = self._short
        return short is not None and short.send((head, data, _CRLF))

    # -- nats-py's side ------------------------------------------------------------------------------------------------

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        assert uri.hostname is not None and uri.port is not None  # nats-py has filled them in
        loop = asyncio.get_running_loop()
        connecting = loop.create_connection(lambda: Incoming(self.direct, self.unheard, self.limits), uri.hostname, uri.port)
        socket, protocol = await asyncio.wait_for(connecting, connect_timeout)
        self._socket, self._protocol = socket, protocol
        self._short = protocol.short = _Short(socket, loop)

    async def connect_tls(self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int) -> None:
        assert self._socket is not None, "connect comes first"
        name = uri if isinstance(uri, str) else uri.hostname
        if self._short is not None:
            self._short.close()
            self._short = None
        plain, protocol = self._protocol, Incoming(self.direct, self.unheard, self.limits)
        securing = asyncio.get_running_loop().start_tls(self._socket, protocol, ssl_context, server_hostname=name)
        try:
            secured = await asyncio.wait_for(securing, connect_timeout)
            assert secured is not None
        except BaseException as error:
            assert plain is not None
            self._socket.abort()
            plain.connection_lost(error if isinstance(error, OSError) else None)  # no other code reports it
            raise
        protocol.connection_made(secured)
        self._socket, self._protocol = secured, protocol

    def write(self, payload: bytes) -> None:
        self._write((payload,))

    def writelines(self, payload: list[bytes]) -> None:
        self._write(payload)

    def _write(self, payload: Sequence[bytes]) -> None:
        if self._short is not None:
            self._short.write(payload)
        elif self._socket is not None:
            self._socket.writelines(payload)

    async def read(self, buffer_size: int) -> bytes:
        assert self._protocol is not None
        return await self._protocol.read()

    async def readline(self) -> bytes:
        assert self._protocol is not None
        return await self._protocol.readline()

    async def drain(self) -> None:
        if self._protocol is not None:
            await self._protocol.drain()

    async def wait_closed(self) -> None:
        if self._protocol is not None:
            await self._protocol.closed.wait()

    def close(self) -> None:
        if self._short is not None:
            self._short.close()
        if self._socket is not None:
            self._socket.close()

    def at_eof(self) -> bool:
        return self._protocol is None or self._protocol.at_eof

    def __bool__(self) -> bool:
        return True  # nats-py makes its own transport otherwise


class _Short:
    """Writes to the socket of an asyncio transport directly, past its buffer, if that buffer is empty. Messages stay whole: a writer holds
    the lock, and the rest of a message that the socket took only in part is written before anything later."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._lock = threading.Lock()
        self._left = bytearray()  # the rest of a message that the socket took only in part
        # A duplicate, so that it names this socket until `close`, even after the transport closed its own.
        self._descriptor = os.dup(transport.get_extra_info("socket").fileno())

    def send(self, parts: Sequence[bytes]) -> bool:
        """Write `parts` now. Any thread may call it. False: nothing was written."""
        with self._lock:
            if self._descriptor < 0 or self._left or self._transport.get_write_buffer_size():
                return False
            try:
                written = os.writev(self._descriptor, parts)
            except OSError:  # it is full, or the connection is lost; the transport will notice
                return False
            if written < sum(map(len, parts)):
                self._left += b"".join(parts)[written:]
                with contextlib.suppress(RuntimeError):  # the loop is closed
                    self._loop.call_soon_threadsafe(self.write, ())
        return True

    def write(self, parts: Sequence[bytes]) -> None:
        """Write through the transport. Call it in the loop's thread."""
        with self._lock:
            if self._left:
                left, self._left = bytes(self._left), bytearray()
                self._transport.write(left)
            if parts:
                self._transport.writelines(parts)

    def close(self) -> None:
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1


class Incoming(asyncio.Protocol):
    """One connection. It hands direct messages on as they arrive, and keeps everything else until nats-py reads it."""

    def __init__(
        self,
        direct: dict[bytes, Callable[[bytes], None]],
        unheard: dict[bytes, Callable[[str], None]],
        limits: dict[bytes, Callable[[], int]],
    ) -> None:
        self.closed = asyncio.Event()
        self.reads = 0
        self._direct = direct
        self._unheard = unheard
        self._limits = limits
        self._transport: asyncio.Transport | None = None
        self._partial: list[bytes] = []  # the beginning of a line or message, as it arrived: joined once, when the rest is there
        self._partial_bytes = 0
        self._wanted = 0  # bytes that it must have before reading continues
        self._skip = 0  # bytes of a dropped payload that are still to come
        self._rest: deque[bytes] = deque()  # for nats-py
        self._rest_bytes = 0
        self._arrived = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._ended = False
        self._error: Exception | None = None
        self.held = False
        self.short: _Short | None = None  # ends with the connection

    # -- asyncio's side ------------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self.reads += 1
        if self._skip:
            dropped = min(self._skip, len(data))
            self._skip, data = self._skip - dropped, data[dropped:]
        if self._partial:
            self._keep(data)
            if self._partial_bytes < self._wanted:
                return
            data, self._partial, self._partial_bytes = b"".join(self._partial), [], 0
        try:
            left = self._split(data)
        except (ValueError, IndexError):
            log.warning("the NATS server sent %d bytes that are no message", len(data))
            assert self._transport is not None
            self._transport.abort()
            return
        if left < len(data):
            self._keep(data[left:])
        if self._rest:
            self._arrived.set()
            if self._rest_bytes > _READ_AHEAD and not self.held and self._transport is not None:
                self.held = True
                self._transport.pause_reading()

    def eof_received(self) -> bool:
        self._ended = True
        self._arrived.set()
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._ended, self._error = True, error
        if self.short is not None:
            self.short.close()
        self._arrived.set()
        self._writable.set()
        self.closed.set()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    # -- nats-py's side ------------------------------------------------------------------------------------------------

    @property
    def at_eof(self) -> bool:
        return self._ended and not self._rest

    async def read(self) -> bytes:
        """The bytes that are not direct messages and have not been read; b"" at the end of the connection."""
        while not self._rest and not self._ended:
            self._arrived.clear()
            await self._arrived.wait()
        if self._error is not None and not self._rest:
            raise self._error
        taken = self._rest.popleft() if self._rest else b""
        self._rest_bytes -= len(taken)
        if not self._rest:
            self._go_on()
        return taken

    async def readline(self) -> bytes:
        """One line of those bytes; an incomplete line at the end of the connection."""
        while (end := (whole := b"".join(self._rest)).find(_CRLF)) < 0 and not self._ended:
            self._arrived.clear()
            await self._arrived.wait()
        end = len(whole) if end < 0 else end + 2
        self._rest, self._rest_bytes = deque([whole[end:]] if whole[end:] else []), len(whole[end:])
        return whole[:end]

    async def drain(self) -> None:
        if not self._writable.is_set():
            await self._writable.wait()
        if self._error is not None:
            raise self._error
        if self.closed.is_set():
            raise ConnectionResetError("the connection is lost")

    # -- inside --------------------------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        if self.held and self._transport is not None and not self._transport.is_closing():
            self.held = False
            self._transport.resume_reading()

    def _keep(self, data: bytes) -> None:
        self._partial.append(data)
        self._partial_bytes += len(data)

    def _pass_on(self, data: bytes) -> None:
        if data:
            self._rest.append(data)
            self._rest_bytes += len(data)

    def _split(self, data: bytes) -> int:
        """Hand over the whole lines and messages in `data`. Returns where the first incomplete one begins. ValueError and IndexError: the
        bytes are not NATS's."""
        at = passed = 0  # what is nats-py's is passed on in one piece, up to the next message that is not
        self._wanted = 0
        while (end := data.find(_CRLF, at)) >= 0:
            end += 2
            message = data.startswith(b"MSG ", at)
            if message or data.startswith(b"HMSG ", at):
                fields = data[at:end].split()
                size = int(fields[-1])
                if not 0 <= size <= _MOST_MESSAGE:  # a negative one would read the same line for ever
                    raise ValueError("a message without measure")
                headers = 0 if message else int(fields[-2])
                if not 0 <= headers <= size:
                    raise ValueError("headers longer than their message")
                stop = end + size + 2
                limit = self._limits.get(fields[2])
                if limit is not None and size - headers > limit():
                    kept = 0 if headers > _MOST_HEADERS else headers
                    if end + kept > len(data):
                        self._wanted = end + kept - at
                        break
                    self._pass_on(data[passed:at])
                    self._pass_on(_without_payload(fields[1 : -1 if message else -2], data[end : end + kept], size - headers))
                    self._skip = max(stop - len(data), 0)
                    at = passed = min(stop, len(data))
                    continue
                if stop > len(data):
                    self._wanted = stop - at
                    break
                call = self._direct.get(fields[2])
                if call is not None:
                    self._pass_on(data[passed:at])
                    call(data[end + headers : end + size])
                    at = passed = stop
                    continue
                if not message and fields[2] in self._unheard and data.startswith(_UNHEARD, end):
                    self._pass_on(data[passed:at])
                    self._unheard[fields[2]](fields[1].decode())
                    at = passed = stop
                    continue
                end = stop
            at = end
        self._pass_on(data[passed:at])
        if not self._wanted and len(data) - at > _MOST_LINE:
            raise ValueError("a line without end")
        return at


def _without_payload(address: list[bytes], headers: bytes, size: int) -> bytes:
    """What is left of a message: its headers, and its size in one more. `address`: subject, subscription, reply subject if any."""
    unread = f"{UNREAD_HEADER}: {size}\r\n\r\n".encode()
    block = (headers[:-2] if headers.endswith(b"\r\n\r\n") else b"NATS/1.0\r\n") + unread
    return b"HMSG %s %d %d\r\n%s\r\n" % (b" ".join(address), len(block), len(block), block)
