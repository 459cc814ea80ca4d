"""One look at the mesh for all viewers: once a second while the page has viewers, however many there are.

Viewers wait for a shared round. Each takes the newest snapshot and the events that it has not seen. So a slow viewer misses snapshots and
delays no other. An event is passed on at once, and a look follows it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress

import orjson

from mesh.bus import Subscription
from mesh.client import AsyncMeshClient
from mesh.client.read_model import MeshReadModel
from mesh.errors import MeshError
from mesh.protocol.events import Event

__all__ = ["Watch"]

log = logging.getLogger("mesh.dashboard")

INTERVAL_S = 1.0
LINGER_S = 5.0
"""The looks go on for this time after the last viewer left, so that a page that is reloaded has a series without a gap."""
SETTLE_S = 0.15
"""The time from an event to the look that follows it; events come in bunches."""
LOOK_TIMEOUT_S = 5.0
REMEMBERED = 30
"""The number of past events that a page begins with."""
VIEWERS = 64


class Watch:
    """`stream` serves one viewer, `snapshot` one request. `end` ends all streams; `close` also waits for the look to stop."""

    def __init__(self, client: AsyncMeshClient, *, interval_s: float = INTERVAL_S) -> None:
        self.read_model = MeshReadModel()
        self.viewers = 0
        self.looks = 0
        self._client = client
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None
        self._subscription: Subscription | None = None
        self._soon = asyncio.Event()
        self._round = asyncio.Event()  # set, and replaced, whenever there is something new
        self._document = b""
        self._idle_since = 0.0
        self._broken = False
        self._ended = False

    def end(self) -> None:
        """End every viewer's stream, so that an open page does not keep the process from stopping."""
        self._ended = True
        self._wake()

    async def close(self) -> None:
        self.end()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            with suppress(MeshError):
                await subscription.stop()

    @property
    def full(self) -> bool:
        """Whether there are as many viewers as are allowed."""
        return self.viewers >= VIEWERS

    async def snapshot(self) -> bytes:
        """The newest snapshot; at most two intervals old."""
        self._start()
        while self._document == b"":
            await self._round.wait()
        return self._document

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events: `history` once, then `snapshot` after each look, and each `event` as it comes. Not while `full`."""
        self.viewers += 1
        try:
            self._start()
            while not self._document and not self._ended:  # the first look also fetches the past events
                await self._round.wait()
            yield _sse("history", orjson.dumps(self.read_model.history()))
            sent, said = b"", self.read_model.event_number
            while not self._ended:
                following = self._round
                for number, event in list(self.read_model.events):
                    if number > said:
                        said = number
                        yield _sse("event", orjson.dumps(event))
                if self._document is not sent and self._document:
                    sent = self._document
                    yield _sse("snapshot", sent)
                await following.wait()
        finally:
            self.viewers -= 1
            self._idle_since = time.monotonic()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self._idle_since = time.monotonic()
        if self._task is None or self._task.done():
            self._document = b""  # the last snapshot is old
            self._task = asyncio.get_running_loop().create_task(self._run(), name="dashboard")

    async def _run(self) -> None:
        while True:
            began = time.monotonic()
            await self._look()
            if not self.viewers and time.monotonic() - self._idle_since >= LINGER_S:
                return
            self._soon.clear()
            left_s = self._interval_s - (time.monotonic() - began)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._soon.wait(), max(left_s, SETTLE_S))
                await asyncio.sleep(SETTLE_S)

    async def _look(self) -> None:
        self.looks += 1
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S):
                if not self._client.connected:
                    raise _unreachable()
                if self._subscription is None:
                    self._subscription = await self._client.watch_events(self._on_event)
                    await self._remember()
                status, stats = await asyncio.gather(self._client.status(), self._client.shard_stats())
            self.read_model.look(status, stats, now=time.monotonic(), unix_s=time.time())
            self._broken = False
        except (MeshError, TimeoutError) as error:
            reason = str(error) if isinstance(error, MeshError) else str(_unreachable())
            self.read_model.failed(reason, now=time.monotonic(), unix_s=time.time())
        except Exception:  # a defect here must not end the page for all viewers
            if not self._broken:  # once, not each second
                log.exception("looking at the mesh")
            self._broken = True
            self.read_model.failed(
                "The gateway could not read the mesh's state; its log says why.", now=time.monotonic(), unix_s=time.time()
            )
        self._document = orjson.dumps(self.read_model.snapshot())
        self._wake()

    async def _remember(self) -> None:
        """Fetch the past events. If the mesh keeps none, the page shows only new ones."""
        try:
            async with asyncio.timeout(LOOK_TIMEOUT_S / 2):
                for event in [event async for event in self._client.events(last=REMEMBERED)]:
                    self.read_model.happened(event)
        except (MeshError, TimeoutError) as error:
            log.info("no events of the past: %s", error)

    def _on_event(self, event: Event) -> None:
        self.read_model.happened(event)
        self._soon.set()
        self._wake()

    def _wake(self) -> None:
        done, self._round = self._round, asyncio.Event()
        done.set()


def _sse(event: str, data: bytes) -> bytes:
    return b"event: " + event.encode() + b"\ndata: " + data + b"\n\n"


def _unreachable() -> MeshError:
    return MeshError("The NATS server does not answer. This page goes on by itself when it is back.")
