"""No connection of the HTTP listener is held for nothing: whatever a client sends or leaves out, a timer ends it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from mesh.http.listener import Listener, ListenerOptions

Run = Callable[[Any], Any]

SHORT = ListenerOptions(port=0, head_timeout_s=1.0, idle_timeout_s=1.0, write_timeout_s=1.0, max_connections=4)
LONGEST_S = 10.0


async def refuse(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers without reading the body."""
    await send({"type": "http.response.start", "status": 404, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": b"no"})


async def listening(options: ListenerOptions, work: Callable[[Listener], Awaitable[None]]) -> None:
    listener = Listener.bind(options)
    serving = asyncio.create_task(listener.serve(refuse))
    try:
        await work(listener)
    finally:
        listener.stop(now=True)
        await serving


async def until_closed(port: int, first: bytes, drip: bytes, every_s: float = 0.05) -> bytes:
    """Send `first`, then `drip` again and again until the listener ends the connection; what it said meanwhile."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(first)

    async def dripping() -> None:
        while drip:
            writer.write(drip)
            await writer.drain()
            await asyncio.sleep(every_s)  # the client's own pace

    sending = asyncio.create_task(dripping())
    said = bytearray()
    try:
        async with asyncio.timeout(LONGEST_S):
            # Half-closed counts as open: a client that still sends must find its connection gone.
            while not sending.done() or drip == b"":
                part = await reader.read(1000)
                said += part
                if not part:
                    if drip:
                        await asyncio.wait({sending})
                    break
    except (ConnectionResetError, BrokenPipeError):
        pass
    finally:
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        writer.close()
    return bytes(said)


POST = b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"


@pytest.mark.parametrize(
    ("first", "drip"),
    [
        (POST, b"a"),  # a body that trickles after the answer
        (POST, b""),  # and one that never comes
        (POST.replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n"), b""),
        (b"POST /x HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
        (b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n", b"\r\n"),  # empty lines between requests begin none
        (b"GET /x HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n", b"x"),
        (b"GET /x HTTP/1.1\r\nhost: x\r\n", b"a: b\r\n"),  # a head without an end
        (b"", b"\r\n"),
        (b"", b""),
    ],
    ids=["trickle", "no body", "expect", "chunked", "empty lines", "upgrade", "head", "nothing but lines", "nothing"],
)
def test_a_connection_that_asks_nothing_whole_is_ended(run: Run, first: bytes, drip: bytes) -> None:
    async def work(listener: Listener) -> None:
        began = time.monotonic()
        said = await until_closed(listener.port, first, drip)
        assert time.monotonic() - began < LONGEST_S
        if b"\r\n\r\n" in first:
            assert said.startswith(b"HTTP/1.1 404"), said

    run(listening(SHORT, work))


def test_connections_that_were_answered_early_do_not_count(run: Run) -> None:
    """Many clients without a token, each with a body that does not end: the next client is served at once."""

    async def work(listener: Listener) -> None:
        held = []
        for _ in range(40):
            reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
            writer.write(POST + b"a" * 1000)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 404")
            held.append(writer)
        assert listener.connections == 0
        for writer in held:
            writer.close()

    run(listening(SHORT, work))


def test_a_client_that_sends_its_body_after_the_answer_uses_the_connection_again(run: Run) -> None:
    async def work(listener: Listener) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", listener.port)
        for _ in range(3):
            writer.write(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 404")
            assert await reader.readexactly(2) == b"no"
            writer.write(b"hello")
        writer.close()

    run(listening(SHORT, work))


@pytest.mark.parametrize(
    ("host", "words"),
    [
        ("127.0.0.1", r"http://127\.0\.0\.1:\d+"),
        ("0.0.0.0", r"http://127\.0\.0\.1:(\d+) \(listening on 0\.0\.0\.0, port \1\)"),
    ],
)
def test_the_log_names_the_address_that_is_listened_on(host: str, words: str) -> None:
    listener = Listener.bind(ListenerOptions(host, 0))
    assert re.fullmatch(words, listener.where)
    listener.stop(now=True)
