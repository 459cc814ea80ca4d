"""What happens in the mesh: messages on mesh.v1.events.KIND, kept for a week in the stream `mesh_events`.

An event is published like any other message and delays nothing: the stream listens as a monitor would. Beyond MAX_BYTES the oldest events
are dropped.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any, Final

import nats.aio.msg
import nats.js.api
import nats.js.client
import nats.js.errors

from mesh.bus.connection import Bus
from mesh.bus.kv import WATCH_IDLE_S, anything_sent
from mesh.bus.losses import LossWatch
from mesh.bus.mapping import mapped
from mesh.bus.replicas import replicated, spread
from mesh.errors import MeshError, MessageRejected, ServiceError, Unavailable, short
from mesh.protocol import subjects, topics
from mesh.protocol.events import Event, EventKind
from mesh.protocol.message import MAX_LINE

__all__ = ["EventLog", "announce", "keep_events"]

log = logging.getLogger("mesh.bus")

MAX_AGE_S: Final = 7 * 86400.0
MAX_BYTES: Final = 64 * 1024 * 1024
_TIMEOUT_S: Final = 2.0
_CHECK_S: Final = 1.0
_RETRY_S: Final = 0.5


async def announce(bus: Bus, kind: EventKind, who: str, *, model: str = "", detail: str = "", **data: Any) -> None:
    """Publish an event. Never raises: a lost event must not disturb the work that it is about."""
    event = Event(kind=kind, who=who, model=model, at_unix_s=time.time(), detail=short(detail, MAX_LINE), data=data)
    try:
        await bus.send(topics.EVENTS.at(kind), event)
    except MeshError as error:
        log.debug("an event could not be published: %s", error)


async def keep_events(events: EventLog) -> None:
    """Create the stream if it does not exist. Never raises: without JetStream there is no history."""
    try:
        await events.open()
    except MeshError as error:
        log.warning("%s", error)


class EventLog:
    """The stream of events. `events` reads it."""

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self._losses = LossWatch(f"the stream {subjects.STREAM_EVENTS}")

    @property
    def remade(self) -> int:
        """How often the stream was lost and made again."""
        return self._losses.remade

    async def open(self) -> None:
        """Create the stream if it does not exist."""
        with mapped(f"opening {subjects.STREAM_EVENTS}"):
            try:
                info = await self._js.stream_info(subjects.STREAM_EVENTS)
            except nats.js.errors.NotFoundError:
                info = await replicated(self._bus, self._make)
            else:
                await spread(self._bus, subjects.STREAM_EVENTS)
            self._losses.found(info.created)

    async def events(self, *, last: int | None = None, since_unix_s: float | None = None, follow: bool = False) -> AsyncIterator[Event]:
        """The events that are kept, oldest first: the `last` so many, or those since a time, or all. `follow`: then also new ones, for
        ever, across reconnections. Unavailable: there is no stream yet."""
        seen: int | None = None
        while True:
            try:
                async for event, sequence in self._read(last, since_unix_s, seen, follow):
                    seen = sequence
                    if event is not None:
                        yield event
                if not follow:
                    return
            except ServiceError as error:
                if not follow:
                    raise
                log.debug("%s; trying again", error)
            await asyncio.sleep(_RETRY_S)

    async def _read(
        self, last: int | None, since_unix_s: float | None, after: int | None, follow: bool
    ) -> AsyncIterator[tuple[Event | None, int]]:
        """Events with their sequence numbers; None for a message that is no event."""
        with mapped(f"reading {subjects.STREAM_EVENTS}"):
            try:
                state = (await self._js.stream_info(subjects.STREAM_EVENTS)).state
            except nats.js.errors.NotFoundError:
                raise Unavailable("no events are kept here yet: a coordinator or a shard keeps them from its start on") from None
            if after is not None and after > state.last_seq:  # the stream was created again
                after = None
            config = _start(last, since_unix_s, after, state.last_seq)
            config.inactive_threshold = WATCH_IDLE_S
            messages: asyncio.Queue[nats.aio.msg.Msg] = asyncio.Queue()
            subscription = await self._js.subscribe(
                topics.EVENTS.any().subject, stream=subjects.STREAM_EVENTS, ordered_consumer=True, config=config, cb=messages.put
            )
        try:
            with mapped(f"reading {subjects.STREAM_EVENTS}"):
                info = await subscription.consumer_info()
                if not follow and not anything_sent(info):
                    return
            while True:
                try:
                    async with asyncio.timeout(_CHECK_S):
                        message = await messages.get()
                except TimeoutError:
                    with mapped(f"reading {subjects.STREAM_EVENTS}"):
                        await subscription.consumer_info()  # a subscription does not report that its server is gone
                    continue
                metadata = message.metadata
                yield _parse(message.data), metadata.sequence.stream
                if not follow and not metadata.num_pending:
                    return
        finally:
            with suppress(Exception):
                await subscription.unsubscribe()

    @property
    def _js(self) -> nats.js.client.JetStreamContext:
        return self._bus.client.jetstream(timeout=_TIMEOUT_S)

    async def _make(self, replicas: int) -> nats.js.api.StreamInfo:
        return await self._js.add_stream(
            name=subjects.STREAM_EVENTS,
            subjects=[topics.EVENTS.any().subject],
            max_age=MAX_AGE_S,
            max_bytes=MAX_BYTES,
            max_msg_size=Event.limit_bytes,
            discard=nats.js.api.DiscardPolicy.OLD,
            storage=nats.js.api.StorageType.FILE,
            num_replicas=replicas,
        )


def _start(last: int | None, since_unix_s: float | None, after: int | None, end: int) -> nats.js.api.ConsumerConfig:
    policy = nats.js.api.DeliverPolicy
    if after is not None:
        return nats.js.api.ConsumerConfig(deliver_policy=policy.BY_START_SEQUENCE, opt_start_seq=after + 1)
    if since_unix_s is not None:
        since = datetime.datetime.fromtimestamp(since_unix_s, datetime.UTC)
        return nats.js.api.ConsumerConfig(deliver_policy=policy.BY_START_TIME, opt_start_time=since)
    if last is not None:
        return nats.js.api.ConsumerConfig(deliver_policy=policy.BY_START_SEQUENCE, opt_start_seq=max(end - last + 1, 1))
    return nats.js.api.ConsumerConfig(deliver_policy=policy.ALL)


def _parse(data: bytes) -> Event | None:
    try:
        return Event.parse(data)
    except MessageRejected as error:  # written by another version or another program
        log.debug("an event that cannot be read: %s", error)
        return None
