"""The chunks of one object of the object store, at the speed of the network.

nats-py reads an object through a consumer that pushes, and waits for the server's flow control at each chunk. Here a consumer hands out
chunks on request and wants no acknowledgement, and the next ones are asked for while earlier ones are handled:

    CONSUMER.CREATE    over the object's own subject, in the server's memory, which forgets it if it is not used
    MSG.NEXT           so many chunks ahead that the network is busy, and no more than WINDOW_BYTES

A consumer counts what it has sent and not what has arrived. After a lost connection a new one begins where the chunks ended.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import orjson

from mesh.bus.connection import Bus
from mesh.bus.jetstream import API, ApiRefused, ask_api, passing_consumer
from mesh.errors import CorruptModel, DeadlineExceeded, MeshError, Unavailable

__all__ = ["WINDOW_BYTES", "Chunks", "StoredObject", "missing_chunks", "reading"]

WINDOW_BYTES: Final = 4 * 1024 * 1024
_SILENCE_S: Final = 5.0
_API_S: Final = 5.0
_REQUEST_S: Final = 20.0
_FORGOTTEN_S: Final = 30.0
_NS: Final = 1_000_000_000
_NOT_FOUND: Final = 404

Pace = Callable[[int], Awaitable[None]]
"""Returns when so many bytes more may be asked for."""


@dataclass(frozen=True, slots=True)
class StoredObject:
    """An object: its stream, the subject of its chunks, how many there are, and the size of each but the last."""

    name: str
    stream: str
    subject: str
    chunks: int
    chunk_bytes: int


class Chunks:
    """The chunks of an object in their order. Made by `reading`."""

    def __init__(self, bus: Bus, next_subject: str, left: int, skip: int, chunk_bytes: int, window: int, pace: Pace) -> None:
        """`left`: how many `take` is to return. `skip`: how many come before these. `window`: how many may be asked for ahead."""
        self._bus = bus
        self._next_subject = next_subject
        self._left = left + skip  # chunks that have not come
        self._skip = skip
        self._chunk_bytes = chunk_bytes
        self._window = window
        self._pace = pace
        self._asked = 0  # of those that have not come
        self._arrived: asyncio.Queue[bytes] = asyncio.Queue()
        self._connection = _connection(bus)
        self.inbox = bus.new_inbox()

    def put(self, chunk: bytes) -> None:
        """A chunk has arrived."""
        self._arrived.put_nowait(chunk)

    async def take(self) -> list[bytes]:
        """The chunks that have arrived, at least one; none after the last. Unavailable, DeadlineExceeded: read on with a new consumer."""
        while self._left:
            found = await self._next()
            self._left -= len(found)
            self._asked -= len(found)
            wanted, self._skip = found[self._skip :], max(0, self._skip - len(found))
            if wanted:
                return wanted
        return []

    async def _next(self) -> list[bytes]:
        await self._ask()
        try:
            async with asyncio.timeout(_SILENCE_S):
                found = [await self._arrived.get()]
        except TimeoutError:
            raise DeadlineExceeded(f"no chunk came for {_SILENCE_S:g} s") from None
        while not self._arrived.empty():
            found.append(self._arrived.get_nowait())
        if self._connection != _connection(self._bus):
            raise Unavailable("the connection was lost, and perhaps chunks with it")
        if b"" in found:  # a status without a chunk: the request or the consumer has ended
            raise Unavailable("the server has ended the reading")
        return found

    async def _ask(self) -> None:
        """Keep between half a window and a whole one asked for."""
        count = min(self._window, self._left) - self._asked
        if count <= 0 or self._asked > self._window // 2:
            return
        await self._pace(count * self._chunk_bytes)
        request = {"batch": count, "expires": round(_REQUEST_S * _NS)}
        await self._bus.publish(self._next_subject, orjson.dumps(request), reply=self.inbox)
        self._asked += count


def _connection(bus: Bus) -> int:
    """How many connections there were before the present one."""
    return int(bus.client.stats["reconnects"])


@asynccontextmanager
async def reading(bus: Bus, object_: StoredObject, first: int, *, window_bytes: int, pace: Pace) -> AsyncIterator[Chunks]:
    """The chunks of an object from number `first` on. CorruptModel: the store does not have all of them."""
    consumer = secrets.token_hex(8)
    skip = await _begin(bus, object_, consumer, first)
    window = max(1, window_bytes // object_.chunk_bytes)
    next_subject = f"{API}.CONSUMER.MSG.NEXT.{object_.stream}.{consumer}"
    chunks = Chunks(bus, next_subject, object_.chunks - first, skip, object_.chunk_bytes, window, pace)
    subscription = await bus.subscribe_direct(chunks.inbox, chunks.put)
    try:
        yield chunks
    finally:
        await subscription.stop()
        with suppress(MeshError):
            await bus.publish(f"{API}.CONSUMER.DELETE.{object_.stream}.{consumer}", b"")


async def missing_chunks(bus: Bus, object_: StoredObject) -> int:
    """How many of its chunks the store has not."""
    consumer = secrets.token_hex(8)
    there = await _create(bus, object_, consumer, 0)
    await bus.publish(f"{API}.CONSUMER.DELETE.{object_.stream}.{consumer}", b"")
    return object_.chunks - there


async def _begin(bus: Bus, object_: StoredObject, consumer: str, first: int) -> int:
    """Make the consumer. Returns how many chunks it hands out before number `first`."""
    start = 0 if first == 0 else await _first_sequence(bus, object_) + first
    there = await _create(bus, object_, consumer, start)
    skip = there - (object_.chunks - first)
    if skip < 0:
        raise CorruptModel(f"{object_.name}: {-skip} of its {object_.chunks} chunks are not in the object store: push the model again")
    return skip


async def _create(bus: Bus, object_: StoredObject, consumer: str, start: int) -> int:
    """Make a consumer of the chunks from sequence `start` on. Returns how many there are."""
    since = {"deliver_policy": "by_start_sequence", "opt_start_seq": start} if start else {}
    config = passing_consumer(consumer, _FORGOTTEN_S, filter_subject=object_.subject, **since)
    made = await _call(
        bus,
        f"CONSUMER.CREATE.{object_.stream}.{consumer}.{object_.subject}",
        {"stream_name": object_.stream, "config": config},
    )
    return int(made["num_pending"])


async def _first_sequence(bus: Bus, object_: StoredObject) -> int:
    found = await _call(bus, f"STREAM.MSG.GET.{object_.stream}", {"seq": 1, "next_by_subj": object_.subject})
    return int(found["message"]["seq"])


async def _call(bus: Bus, what: str, body: dict[str, Any]) -> dict[str, Any]:
    try:
        return await ask_api(bus, what, body, timeout_s=_API_S)
    except ApiRefused as error:
        if error.status == _NOT_FOUND:
            raise CorruptModel(f"{error}: push the model again") from None
        raise
