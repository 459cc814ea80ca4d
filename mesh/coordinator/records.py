"""What is written down of a session, so that another coordinator can go on with it: KV `mesh_sessions`, key MODEL.SESSION.

Theory of operation. A record holds the request in tokens, the tokens generated so far, how many of these the client was told, and
who owns the session. Only its owner writes it, by compare and set on the key's revision. Another coordinator takes it over the same
way, with the next epoch; the former owner, should it live after all, finds that out at its next write and drops the session.

Nothing on the way of a token waits for a write. A session that changes is marked; one task writes what is marked, each record at
most every EVERY_S seconds, less often where it is large, and less often where there are many, RECORDS_PER_S of them together up to
RARELY_S: what was generated since is generated again, with the same seed and so the same tokens. A record counts as told only what
was handed to the connection before the record was, and NATS keeps the order of a connection: whoever takes over may repeat a
document, and never skips one.

A record that has ended keeps its answer for KEPT_S, for a client that asks again; then it is deleted, at the latest by the bucket.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Final

import orjson
from pydantic import Field

from mesh.bus import Bucket, Bus, end_tasks
from mesh.errors import MeshError, MessageRejected
from mesh.protocol import subjects
from mesh.protocol.generation import Generate
from mesh.protocol.message import Epoch, Message, Natural, Token, TokenId

__all__ = ["Recorder", "SessionRecord", "digest_of", "sessions_bucket"]

log = logging.getLogger("mesh.coordinator")

EVERY_S: Final = 0.5
RECORDS_PER_S: Final = 32
RARELY_S: Final = 2.0
BYTES_PER_S: Final = 128 * 1024  # of one session's record
REFRESH_S: Final = 40.0  # one that does not change is written again, or the bucket would forget it
KEPT_S: Final = 60.0
KEPT: Final = 256
WRITERS: Final = 8
WAITING: Final = 8192
_TTL_S: Final = 150.0
_MAX_BYTES: Final = 256 * 1024 * 1024
_HEADERS_BYTES: Final = 1024
_PAUSE_S: Final = 1.0  # after a write that failed


class SessionRecord(Message):
    """`message`: the request, its prompt in tokens and its seed drawn. `digest`: of the request as it was asked. `owner`: the instance
    of the coordinator that has it; None: whoever takes it. `answer`: the last document, of a session that has ended."""

    limit_bytes: ClassVar[int] = 1024 * 1024

    session: Token
    model_hash: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    owner: Token | None
    epoch: Epoch
    digest: str
    message: Generate
    reply: str
    given: tuple[TokenId, ...] = ()
    told: Natural = 0
    answer: str | None = None


def sessions_bucket(bus: Bus) -> Bucket:
    return Bucket(bus, subjects.KV_SESSIONS, ttl_s=_TTL_S, durable=True, max_value_bytes=SessionRecord.limit_bytes, max_bytes=_MAX_BYTES)


def digest_of(message: Generate) -> str:
    """The same for two requests that ask for the same generation, however often and from which token on."""
    values = message.model_dump(mode="json", exclude={"attempt", "given", "stream"})
    return hashlib.sha256(orjson.dumps(values, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


@dataclass(slots=True)
class _Kept:
    """A session's record as it is kept here. `revision` 0: not written yet."""

    snapshot: Callable[[], SessionRecord]
    revision: int
    dirty: bool = True
    due_at: float = 0.0
    written_at: float = 0.0
    writing: bool = False
    ended: SessionRecord | None = None  # what to write last; None with `over`: nothing, delete it
    over: bool = False


class Recorder:
    """Writes the records of the sessions of one coordinator. `on_lost(session, record)`: another one has it now.

    counters: written, failed, too_large, lost.
    """

    def __init__(self, bucket: Bucket, model: str, instance: str, on_lost: Callable[[str, SessionRecord], None]) -> None:
        self.bucket = bucket
        self.instance = instance
        self.counters: Counter[str] = Counter()
        self._prefix = subjects.token(model)
        self._on_lost = on_lost
        self._kept: dict[str, _Kept] = {}
        self._finished: OrderedDict[str, tuple[float, int]] = OrderedDict()  # session -> (when, revision)
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(WRITERS)
        self._paused_until = 0.0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = self.bucket.bus.spawn(self._run(), "session records")

    async def stop(self) -> None:
        if self._task is not None:
            await end_tasks(self._task)

    def __contains__(self, session: str) -> bool:
        return session in self._kept

    def key(self, session: str) -> str:
        return f"{self._prefix}.{session}"

    # -- what the coordinator says -------------------------------------------------------------------------------------

    def keep(self, session: str, snapshot: Callable[[], SessionRecord], *, revision: int = 0) -> None:
        """Write it down from now on. `snapshot` is called when it is written."""
        self._kept[session] = _Kept(snapshot, revision)
        self._finished.pop(session, None)
        self._wake.set()

    def touch(self, session: str) -> None:
        """It has changed."""
        kept = self._kept.get(session)
        if kept is not None and not kept.dirty:
            kept.dirty = True
            self._wake.set()

    def touch_all(self) -> None:
        """See at once whether they are still ours."""
        for kept in self._kept.values():
            kept.dirty, kept.due_at = True, 0.0
        self._wake.set()

    def end(self, session: str, last: SessionRecord | None) -> None:
        """It has ended: write `last`, which has its answer, or delete it."""
        kept = self._kept.get(session)
        if kept is None:
            return
        unwritten = last is None and not kept.revision and not kept.writing
        if unwritten or len(self._kept) > WAITING:  # more than that have ended while nothing could be written: the bucket forgets them
            del self._kept[session]
            return
        kept.dirty, kept.over, kept.ended, kept.due_at = True, True, last, 0.0
        self._wake.set()

    def forget(self, session: str) -> None:
        """It is another's."""
        self._kept.pop(session, None)

    async def release(self, timeout_s: float) -> set[str]:
        """Give every session to whoever takes it: those that are written down so."""
        await self.stop()
        written: set[str] = set()

        async def one(session: str, kept: _Kept) -> None:
            try:
                if kept.over:
                    await self._write_once(session, kept)
                    return
                record = kept.snapshot().model_copy(update={"owner": None})
                if await self.bucket.update(self.key(session), record.to_bytes(), revision=kept.revision) is not None:
                    written.add(session)
            except MeshError as error:
                log.warning("handing over session %s: %s", session, error)

        try:
            async with asyncio.timeout(timeout_s):
                for _ in range(WRITERS):  # those that are being written
                    await self._slots.acquire()
                await asyncio.gather(*(one(session, kept) for session, kept in list(self._kept.items())))
        except TimeoutError:
            log.warning("handing over sessions: not all were written down within %g s", timeout_s)
        return written

    # -- reading and taking over ---------------------------------------------------------------------------------------

    async def read(self, session: str) -> tuple[SessionRecord, int] | None:
        """The record and its revision; None where there is none that can be read."""
        entry = await self.bucket.get(self.key(session))
        return None if entry is None else _parse(entry.value, entry.revision)

    async def all(self) -> list[tuple[SessionRecord, int]]:
        """Every record of this model."""
        found = [_parse(entry.value, entry.revision) for entry in await self.bucket.entries(f"{self._prefix}.>")]
        return [item for item in found if item is not None]

    async def take_over(self, record: SessionRecord, revision: int, *, epoch: int = 0) -> tuple[SessionRecord, int] | None:
        """The record as ours, with a later epoch, and its new revision; None where another was first."""
        mine = record.model_copy(update={"owner": self.instance, "epoch": max(record.epoch + 1, epoch)})
        now = await self.bucket.update(self.key(record.session), mine.to_bytes(), revision=revision)
        return None if now is None else (mine, now)

    # -- writing -------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            now = time.monotonic()
            wait_s = REFRESH_S
            if now >= self._paused_until:
                for session, kept in list(self._kept.items()):
                    due_at = kept.due_at if kept.dirty else kept.written_at + REFRESH_S
                    if kept.writing:
                        continue
                    if due_at > now:
                        wait_s = min(wait_s, due_at - now)
                        continue
                    await self._slots.acquire()
                    kept.writing, kept.dirty = True, False
                    self.bucket.bus.spawn(self._write(session, kept), "writing a session record")
            else:
                wait_s = self._paused_until - now
            await self._clear_finished(now)
            self._wake.clear()
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _write(self, session: str, kept: _Kept) -> None:
        try:
            await self._write_once(session, kept)
        except MeshError as error:
            self.counters["failed"] += 1
            log.debug("session record %s: %s", session, error)
            kept.dirty = True
            self._paused_until = time.monotonic() + _PAUSE_S
        finally:
            kept.writing = False
            self._slots.release()
            self._wake.set()

    async def _write_once(self, session: str, kept: _Kept) -> None:
        over = kept.over
        record = kept.ended if over else kept.snapshot()
        data = b"" if record is None else record.to_bytes()
        if len(data) > min(SessionRecord.limit_bytes, self.bucket.bus.max_payload - _HEADERS_BYTES):
            self.counters["too_large"] += 1
            if not over:
                kept.due_at = float("inf")
                return
            record = None
        now = time.monotonic()
        kept.written_at = now
        kept.due_at = now + max(EVERY_S, min(len(self._kept) / RECORDS_PER_S, RARELY_S), len(data) / BYTES_PER_S)
        if record is None:
            if kept.revision:
                await self.bucket.delete(self.key(session), revision=kept.revision)
            self._done(session, kept)
            return
        revision = await self.bucket.update(self.key(session), data, revision=kept.revision)
        if revision is None:
            await self._conflict(session, kept)
            return
        kept.revision = revision
        self.counters["written"] += 1
        if over:
            self._done(session, kept)
            self._finished[session] = (now, revision)

    async def _conflict(self, session: str, kept: _Kept) -> None:
        """The key is not as this side left it: gone with its server, written by a write whose answer was lost, or another's."""
        found = await self.read(session)
        if found is None:
            kept.revision, kept.dirty, kept.due_at = 0, True, 0.0
        elif found[0].owner == self.instance or (found[0].answer is not None and kept.over):
            kept.revision, kept.dirty, kept.due_at = found[1], True, 0.0
        elif self._kept.get(session) is kept:
            del self._kept[session]
            self.counters["lost"] += 1
            self._on_lost(session, found[0])

    def _done(self, session: str, kept: _Kept) -> None:
        if self._kept.get(session) is kept and kept.over:
            del self._kept[session]

    async def _clear_finished(self, now: float) -> None:
        """Delete answers nobody asked for again. Another's newer record of the same name is left."""
        while self._finished and self.bucket.bus.connected:
            oldest, _ = next(iter(self._finished.values()))
            if len(self._finished) <= KEPT and now - oldest <= KEPT_S:
                break
            session, (_, revision) = self._finished.popitem(last=False)
            try:
                await self.bucket.delete(self.key(session), revision=revision)
            except MeshError as error:
                log.debug("deleting session record %s: %s", session, error)


def _parse(value: bytes | None, revision: int) -> tuple[SessionRecord, int] | None:
    try:
        return (SessionRecord.parse(value), revision) if value else None
    except MessageRejected as error:
        log.warning("a session record that cannot be read: %s", error)
        return None
