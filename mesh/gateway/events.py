"""Server-sent events. Each is sent as soon as it exists. The response ends when the client leaves.

Nothing is sent before the first event, so that an error before it still has a status of its own. But after `keep_alive_s` without an
event the response begins all the same, with a comment, so that the client sees that the gateway lives.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mesh.errors import MeshError

__all__ = ["STREAM", "ClientGone", "EventStream", "event", "named_event", "until_gone"]

STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}
"""What a route that may answer with a stream says of its responses."""

_WAITING = b": waiting\n\n"


def event(data: Any, id: str | None = None) -> bytes:
    """One event of JSON data. `id`: with which the client may ask for what comes after it."""
    body = b"data: " + orjson.dumps(data) + b"\n\n"
    return body if id is None else b"id: " + id.encode() + b"\n" + body


def named_event(data: dict[str, Any], id: str | None = None) -> bytes:
    """One event of the name that is its type, as clients of Anthropic's API and of OpenAI's responses read them."""
    return b"event: " + data["type"].encode() + b"\n" + event(data, id)


class EventStream(Response):
    """`events`: whole events, as `event` makes them. `failed` makes the event for an error that comes after the first one."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        failed: Callable[[MeshError], bytes],
        *,
        keep_alive_s: float,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(headers={"x-accel-buffering": "no"})  # tells nginx not to buffer the response
        del self.headers["content-length"]
        self._events = events
        self._failed = failed
        self._keep_alive_s = keep_alive_s
        self._started = False
        self._sent_at = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._sent_at = time.monotonic()
        producing = asyncio.create_task(self._produce(send))
        leaving = asyncio.create_task(_gone(receive))
        try:
            while not producing.done():
                done, _ = await asyncio.wait({producing, leaving}, timeout=self._keep_alive_s, return_when=asyncio.FIRST_COMPLETED)
                if leaving in done:
                    break
                if not done and time.monotonic() - self._sent_at >= self._keep_alive_s:
                    await self._send(send, _WAITING)
            if producing.done():
                producing.result()
        finally:
            for task in (producing, leaving):
                task.cancel()
            await asyncio.gather(producing, leaving, return_exceptions=True)

    async def _produce(self, send: Send) -> None:
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    await self._send(send, data)
        except MeshError as error:
            if not self._started:
                raise
            await self._send(send, self._failed(error))
        await self._start(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        await self._start(send)
        self._sent_at = time.monotonic()
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def _start(self, send: Send) -> None:
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})


class ClientGone(Exception):
    """The client has left, so no one waits for the answer."""


async def until_gone(receive: Receive, work: Any) -> Any:
    """The result of the coroutine `work`. ClientGone: the client left before, and `work` was cancelled."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    """Wait until the client has left. The body must have been read."""
    while True:
        message: Message = await receive()
        if message["type"] == "http.disconnect":
            return
