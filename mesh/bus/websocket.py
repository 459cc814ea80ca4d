"""NATS over a WebSocket (RFC 6455), for sites whose proxies let nothing else out: ws:// and wss:// servers.

The protocol inside is the one of transport.py, with its short path for frames. Each write becomes one binary message. What a message holds
is handed on as its bytes come. Nothing is compressed.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import secrets
import ssl
import struct
from collections.abc import Sequence
from typing import Any, Final, cast
from urllib.parse import ParseResult

from mesh.bus.transport import DirectTransport, Incoming

__all__ = ["WebSocketTransport"]

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_MOST_ANSWER: Final = 16 * 1024
"""Bytes of the answer to the handshake."""
_CONTINUATION, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x2, 0x8, 0x9, 0xA
_PORTS: Final = {"ws": 80, "wss": 443}


class WebSocketTransport(DirectTransport):
    """One for the life of a connection, reconnections included."""

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        await self._open(uri, None, connect_timeout)

    async def connect_tls(self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int) -> None:
        if not isinstance(uri, str):  # otherwise the server wants TLS, and the connection has it already
            await self._open(uri, ssl_context, connect_timeout)

    async def _open(self, uri: ParseResult, tls: ssl.SSLContext | None, timeout_s: float) -> None:
        assert uri.hostname is not None
        loop = asyncio.get_running_loop()
        inner = Incoming(self.direct, self.unheard, self.limits)
        port = uri.port or _PORTS[uri.scheme]
        named = f"[{uri.hostname}]" if ":" in uri.hostname else uri.hostname
        async with asyncio.timeout(timeout_s):
            socket, protocol = await loop.create_connection(
                lambda: _WebSocket(inner, f"{named}:{port}", uri.path or "/"), uri.hostname, port, ssl=tls
            )
            try:
                await protocol.agreed
            except BaseException:
                socket.abort()
                raise
        self._socket, self._protocol = socket, inner

    def _write(self, payload: Sequence[bytes]) -> None:
        if self._socket is not None:
            self._socket.write(_message(_BINARY, b"".join(payload)))


class _WebSocket(asyncio.Protocol):
    """The handshake, then the messages of the server. `inner` gets what is in them. `agreed` is done after the handshake."""

    def __init__(self, inner: Incoming, host: str, path: str) -> None:
        self.agreed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inner = inner
        self._host = host
        self._path = path
        self._key = base64.b64encode(secrets.token_bytes(16))
        self._transport: asyncio.Transport | None = None
        self._begun = bytearray()  # the answer to the handshake, or the beginning of a message's head
        self._left = 0  # bytes of the present message that have not come
        self._opcode = _BINARY
        self._control = bytearray()  # of a message that is not NATS's

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._inner.connection_made(transport)
        head = (
            f"GET {self._path} HTTP/1.1\r\nHost: {self._host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {self._key.decode()}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        self._transport.write(head.encode())

    def data_received(self, data: bytes) -> None:
        try:
            self._take(data)
        except ValueError as error:
            self._refuse(str(error))

    def eof_received(self) -> Any:
        return self._inner.eof_received()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.agreed.done():
            self.agreed.set_exception(ConnectionError("the server closed the connection during the WebSocket handshake"))
            self.agreed.exception()  # whoever waited may be gone
        self._inner.connection_lost(error)

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _take(self, data: bytes) -> None:
        if not self.agreed.done():
            self._begun += data
            end = self._begun.find(b"\r\n\r\n")
            if end < 0:
                if len(self._begun) > _MOST_ANSWER:
                    raise ValueError("the server's answer to the WebSocket handshake is too long")
                return
            self._check(bytes(self._begun[:end]))
            data, self._begun = bytes(self._begun[end + 4 :]), bytearray()
            self.agreed.set_result(None)
        at = 0
        while at < len(data):
            if self._left == 0:
                at = self._head(data, at)
                continue
            part = data[at : at + self._left]
            at += len(part)
            self._left -= len(part)
            if self._opcode in (_BINARY, _CONTINUATION):
                self._inner.data_received(part)
            else:
                self._control += part
                if self._left == 0:
                    self._end_control()

    def _check(self, answer: bytes) -> None:
        """ValueError: the server does not speak WebSocket here."""
        status, *lines = answer.split(b"\r\n")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(b":") for line in lines)}
        if status.split(b" ")[1:2] != [b"101"]:
            raise ValueError(f"the server answers {status[:100].decode('latin-1')!r} to a WebSocket handshake: give its websocket port")
        if headers.get(b"sec-websocket-accept") != base64.b64encode(hashlib.sha1(self._key + _GUID).digest()):
            raise ValueError("the server's answer to the WebSocket handshake is to another request: a proxy may have kept it")

    def _head(self, data: bytes, at: int) -> int:
        """Read the head of a message, as far as it has come; where the data goes on after it."""
        while at < len(data):
            self._begun.append(data[at])
            at += 1
            if len(self._begun) < 2:
                continue
            if self._begun[0] & 0x70 or self._begun[1] & 0x80:
                raise ValueError("the server sent a WebSocket message that was not agreed on")
            short = self._begun[1]
            more = {126: 2, 127: 8}.get(short, 0)
            if len(self._begun) < 2 + more:
                continue
            self._opcode = self._begun[0] & 0x0F
            self._left = int.from_bytes(self._begun[2:]) if more else short
            if self._opcode not in (_CONTINUATION, _BINARY, _CLOSE, _PING, _PONG) or (self._opcode >= _CLOSE and self._left > 125):
                raise ValueError("the server sent a WebSocket message of an unknown kind")
            self._begun = bytearray()
            if self._left == 0 and self._opcode >= _CLOSE:
                self._end_control()
            return at
        return at

    def _end_control(self) -> None:
        assert self._transport is not None
        if self._opcode == _PING:
            self._transport.write(_message(_PONG, bytes(self._control)))
        elif self._opcode == _CLOSE:
            self._transport.write(_message(_CLOSE, bytes(self._control[:2])))
            self._transport.close()
        self._control = bytearray()

    def _refuse(self, why: str) -> None:
        assert self._transport is not None
        if not self.agreed.done():
            self.agreed.set_exception(ConnectionError(why))
        self._transport.abort()


def _message(opcode: int, data: bytes) -> bytes:
    """A message from a client: whole, and masked, so that nothing in between takes its bytes for something else."""
    size, mask = len(data), secrets.token_bytes(4)
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
    elif size < 65536:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size)
    key = (mask * (size // 4 + 1))[:size]
    masked = (int.from_bytes(data, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")
    return b"".join((head, mask, masked))
