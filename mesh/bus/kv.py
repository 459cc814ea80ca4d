"""Small shared state in JetStream key-value buckets, for control only: leases, placement, session records.

A lease is a key that its owner writes again and again. The bucket's TTL deletes it once the owner stops. Readers do not rely on the server
to report that: LeaseTable drops a lease by its own clock when no renewal has come for the TTL. While this process is disconnected,
suspended, or cannot watch the bucket (its server was lost and the cluster elects another leader), it hears no owner at all. That says
nothing about the owners, so the clock stands still.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import nats.errors
import nats.js.api
import nats.js.errors
import nats.js.kv

from mesh.bus.connection import Bus, end_tasks
from mesh.bus.losses import LossWatch
from mesh.bus.mapping import mapped
from mesh.bus.replicas import replicated, spread
from mesh.errors import MeshError, MessageRejected, ServiceError
from mesh.protocol.message import Message

__all__ = ["Bucket", "Entry", "LeaseTable"]

log = logging.getLogger("mesh.bus")

M = TypeVar("M", bound=Message)
T = TypeVar("T")

_NO_STREAM = 10059
WRONG_REVISION = (10071, 10164)  # the server's codes for a compare and set that came too late
_WATCH_RETRY_S = 0.5
_TIMEOUT_S = 2.0  # for one request: a lease that is not renewed within its TTL is lost
_WATCH_CHECK_S = 1.0
WATCH_IDLE_S = 5.0
"""How long the server keeps the consumer of a reader that has stopped. A stream may have a thousand consumers at a time."""


@dataclass(frozen=True, slots=True)
class Entry:
    """The value of a key; None if it was deleted. `revision` grows with every write to the bucket."""

    key: str
    value: bytes | None
    revision: int


class Bucket:
    """A key-value bucket, created if it does not exist. It is in the server's memory unless `durable`; in a cluster on three servers.

    A bucket that was lost (deleted, or with its server's storage) is created again by whatever is done with it next. That is logged, and
    counted in `remade`, by every process that meets it. `secret_keys`: who knows a key has rights by it, so that no error names one.
    """

    def __init__(
        self,
        bus: Bus,
        name: str,
        *,
        ttl_s: float | None = None,
        durable: bool = False,
        max_value_bytes: int = 65536,
        max_bytes: int | None = None,
        secret_keys: bool = False,
    ) -> None:
        self.bus = bus
        self.name = name
        self.ttl_s = ttl_s
        self._durable = durable
        self._max_value_bytes = max_value_bytes
        self._max_bytes = max_bytes
        self._secret_keys = secret_keys
        self._losses = LossWatch(f"the bucket {name}")
        self._kv: nats.js.kv.KeyValue | None = None
        self._opening = asyncio.Lock()

    @property
    def remade(self) -> int:
        """How often the bucket was lost and made again."""
        return self._losses.remade

    async def open(self) -> None:
        """Create the bucket if it does not exist."""
        with mapped(f"opening {self.name}"):
            await self._open()

    async def check(self) -> None:
        """Find out whether the bucket is still there, and make it again if it was lost."""
        with mapped(f"looking for {self.name}"):
            self._kv = None
            await self._open()

    async def put(self, key: str, value: bytes) -> int:
        """Write a value; returns the new revision."""
        return await self._do(key, lambda kv: kv.put(key, value))

    async def update(self, key: str, value: bytes, *, revision: int) -> int | None:
        """Compare and set: write if the revision of the key is still `revision` (0: there is no such key). Returns the new revision, or
        None if it is not."""

        async def write(kv: nats.js.kv.KeyValue) -> int | None:
            try:
                return await (kv.update(key, value, last=revision) if revision else kv.create(key, value))
            except nats.js.errors.KeyWrongLastSequenceError:
                return None
            except nats.js.errors.APIError as error:
                if error.err_code in WRONG_REVISION:
                    return None
                raise

        return await self._do(key, write)

    async def get(self, key: str) -> Entry | None:
        async def read(kv: nats.js.kv.KeyValue) -> Entry | None:
            try:
                entry = await kv.get(key)
            except nats.js.errors.NotFoundError as error:
                if _is_lost(error):
                    raise
                return None
            return Entry(key, entry.value, entry.revision or 0)

        return await self._do(key, read)

    async def delete(self, key: str, *, revision: int | None = None) -> bool:
        """Delete a key. False: its revision is no longer `revision`, and it stays (None: delete any revision)."""

        async def remove(kv: nats.js.kv.KeyValue) -> bool:
            try:
                await kv.delete(key, last=revision)
            except nats.js.errors.APIError as error:
                if error.err_code in WRONG_REVISION:
                    return False
                raise
            return True

        return await self._do(key, remove)

    async def entries(self, keys: str = ">") -> list[Entry]:
        """All entries whose keys match a NATS pattern."""
        found = []
        async for entry in self._watch(keys):
            if entry is None:
                break
            if entry.value is not None:
                found.append(entry)
        return found

    async def _do(self, key: str, work: Callable[[nats.js.kv.KeyValue], Awaitable[T]]) -> T:
        """Do something with the bucket; once more, with a new bucket, where the old one was lost."""
        with mapped(self.name if self._secret_keys else f"{self.name}/{key}"):
            kv = await self._open()
            try:
                return await work(kv)
            except Exception as error:
                if not _is_lost(error):
                    raise
                if self._kv is kv:  # no other task has opened it again
                    self._kv = None
                return await work(await self._open())

    async def _open(self) -> nats.js.kv.KeyValue:
        async with self._opening:
            if self._kv is None:
                self._kv = await self._find_or_make()
            return self._kv

    async def _find_or_make(self) -> nats.js.kv.KeyValue:
        js = self.bus.client.jetstream(timeout=_TIMEOUT_S)
        try:
            kv = await js.key_value(self.name)
        except nats.js.errors.NotFoundError:
            storage = nats.js.api.StorageType.FILE if self._durable else nats.js.api.StorageType.MEMORY
            # a second process finds the same configuration, which is no error
            kv = await replicated(
                self.bus,
                lambda replicas: js.create_key_value(
                    bucket=self.name,
                    ttl=self.ttl_s,
                    history=1,
                    storage=storage,
                    replicas=replicas,
                    max_value_size=self._max_value_bytes,
                    max_bytes=self._max_bytes,
                ),
            )
        else:
            await spread(self.bus, f"KV_{self.name}")
        self._losses.found((await js.stream_info(f"KV_{self.name}")).created)
        return kv

    async def _watch(self, keys: str = ">") -> AsyncIterator[Entry | None]:
        """The present entries, then None, then entries as they change. Ends with an error when the server is lost."""
        with mapped(f"watching {self.name}"):
            kv = await self._open()
            try:
                watcher = await kv.watch(keys, inactive_threshold=WATCH_IDLE_S)
            except Exception as error:
                if not _is_lost(error):
                    raise
                if self._kv is kv:
                    self._kv = None
                watcher = await (await self._open()).watch(keys, inactive_threshold=WATCH_IDLE_S)
        begun = early = False
        try:
            while True:
                try:
                    update = await watcher.updates(timeout=_WATCH_CHECK_S)
                except TimeoutError:
                    # A watch ends with its bucket or its server, and does not report that.
                    with mapped(f"watching {self.name}"):
                        await watcher._sub.consumer_info()  # type: ignore[union-attr]  # set since it was made
                    continue
                if update is None:
                    # nats-py reports an empty bucket if the server's count arrives before the entries that it has sent
                    early = not begun and await self._has_sent(watcher)
                    if not early:
                        yield None
                    continue
                begun = True
                gone = update.operation in (nats.js.kv.KV_DEL, nats.js.kv.KV_PURGE)
                yield Entry(update.key, None if gone else update.value or b"", update.revision or 0)
                if early and not update.delta:  # nothing more is pending
                    early = False
                    yield None
        finally:
            with suppress(Exception):  # the watch ends in any case
                await watcher.stop()

    async def _has_sent(self, watcher: nats.js.kv.KeyValue.KeyWatcher) -> bool:
        with mapped(f"watching {self.name}"):
            info = await watcher._sub.consumer_info()  # type: ignore[union-attr]  # set since it was made
        return anything_sent(info)


def _is_lost(error: Exception) -> bool:
    """Whether the bucket's stream is not there any more, as far as the server's answer tells."""
    if isinstance(error, (nats.errors.NoRespondersError, nats.js.errors.NoStreamResponseError)):
        return True
    # nats-py says of a key without a stream that the key is not found, and why only in the error before
    return any(getattr(each, "err_code", None) == _NO_STREAM for each in (error, error.__context__))


def anything_sent(info: nats.js.api.ConsumerInfo) -> bool:
    """Whether a consumer has delivered or could deliver anything, by the server's own count. A delivery may still be on its way."""
    return bool(info.num_pending or (info.delivered and info.delivered.consumer_seq))


class LeaseTable(Generic[M]):
    """The live leases of a bucket, followed for ever. `leases` maps key to message.

    on_change(key, lease or None) is called in the event loop for each lease that is new, changed or gone.

    No value ends the table. A value that is no lease is counted in `rejected`, and leaves the lease that was there to its own TTL. An
    error of `on_change`, or of the watch itself, is logged and counted in `failed`.
    """

    def __init__(self, bucket: Bucket, kind: type[M], on_change: Callable[[str, M | None], None] = lambda key, lease: None) -> None:
        if bucket.ttl_s is None:
            raise ValueError("leases are of a bucket with a TTL")
        self._bucket = bucket
        self._kind = kind
        self._on_change = on_change
        self._ttl_s = bucket.ttl_s
        self._leases: dict[str, M] = {}
        self._seen: dict[str, float] = {}
        self._synced = asyncio.Event()
        self._blind = False  # the bucket cannot be watched
        self._tasks: list[asyncio.Task[None]] = []
        self.rejected = 0
        self.failed = 0

    @property
    def leases(self) -> Mapping[str, M]:
        return self._leases

    async def start(self, *, timeout_s: float = 10.0) -> None:
        """Follow the bucket; returns once the present leases are known. Unavailable or DeadlineExceeded: it cannot be watched."""
        self._tasks = [
            self._bucket.bus.keep(self._follow, f"watching {self._bucket.name}"),
            self._bucket.bus.keep(self._expire, f"expiring {self._bucket.name}"),
        ]
        try:
            with mapped(f"reading {self._bucket.name}"):
                await asyncio.wait_for(self._synced.wait(), timeout_s)
        except MeshError:
            await self.stop()
            raise

    async def stop(self) -> None:
        await end_tasks(*self._tasks)

    def forget(self, key: str) -> None:
        """Drop a lease whose owner is known to be gone. If the owner renews it after all, that counts as a new lease."""
        self._seen.pop(key, None)
        self._leases.pop(key, None)

    async def _follow(self) -> None:
        while True:
            try:
                async for entry in self._bucket._watch():
                    if entry is None:
                        self._blind = False
                        self._synced.set()
                    else:
                        self._take(entry)
            except ServiceError as error:
                log.warning("%s; trying again", error)
            except Exception:
                self.failed += 1
                log.exception("watching %s; trying again", self._bucket.name)
            self._blind = True
            self._bucket._kv = None
            await asyncio.sleep(_WATCH_RETRY_S)

    def _take(self, entry: Entry) -> None:
        if entry.value is None:
            self._drop(entry.key)
            return
        try:
            lease = self._kind.parse(entry.value)
        except MessageRejected as error:  # written by another version or another program: not a lease
            self.rejected += 1
            log.warning("%s/%s: %s", self._bucket.name, entry.key, error)
            return
        self._seen[entry.key] = asyncio.get_running_loop().time()
        if self._leases.get(entry.key) != lease:
            self._leases[entry.key] = lease
            self._tell(entry.key, lease)

    def _drop(self, key: str) -> None:
        self._seen.pop(key, None)
        if self._leases.pop(key, None) is not None:
            self._tell(key, None)

    def _tell(self, key: str, lease: M | None) -> None:
        try:
            self._on_change(key, lease)
        except Exception:
            self.failed += 1
            log.exception("%s/%s: taking note of a change", self._bucket.name, key)

    async def _expire(self) -> None:
        before = asyncio.get_running_loop().time()
        while True:
            await asyncio.sleep(self._ttl_s / 10)
            now = asyncio.get_running_loop().time()
            suspended, before = now - before > self._ttl_s / 2, now
            if suspended or self._blind or not self._bucket.bus.connected:
                self._seen = dict.fromkeys(self._seen, now)
            oldest = now - self._ttl_s
            for key in [key for key, seen in self._seen.items() if seen < oldest]:
                self._drop(key)
