"""A line between a process and its server that can be cut in one direction, as a network may be."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

__all__ = ["Line"]


class Line:
    """`url` is where the process connects. What the server sends is dropped while `deaf`; what the process sends arrives."""

    def __init__(self, port: int) -> None:
        self.url = ""
        self.deaf = False
        self._port = port
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def to(cls, port: int) -> AsyncIterator[Line]:
        line = cls(port)
        listening = await asyncio.start_server(line._connected, "127.0.0.1", 0)
        line.url = f"nats://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        try:
            yield line
        finally:
            listening.close()
            for task in line._tasks:
                task.cancel()
            await asyncio.gather(*line._tasks, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._port)
        for work in (self._pass(reader, back, deaf=False), self._pass(there, writer, deaf=True)):
            task = asyncio.create_task(work)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pass(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, deaf: bool) -> None:
        try:
            while data := await source.read(65536):
                if deaf and self.deaf:
                    continue
                target.write(data)
                await target.drain()
        except OSError:
            pass
        finally:
            target.close()
