"""What is written down of a session, so that another coordinator can go on with it: KV `mesh_sessions`, key MODEL.SESSION.

Theory of operation. A record holds the request in tokens, the tokens generated so far, how many of these were delivered to the client,
and which coordinator owns the session. Only the owner writes the record, by compare and set on the key's revision. Another coordinator
takes the session over in the same way, with the next epoch. The former owner, if it lives after all, learns that at its next write and
drops the session.

No frame waits for a write. The client of a stream is told that its request is accepted, and given its first tokens, once the first write
is done, which goes on beside the prefill; where writes fail or are slow, it is told without. After that nothing waits. A session that
changes is marked, and one task writes what is marked: each record at most every EVERY_S seconds; less often where the record is large;
and less often where there are many, RECORDS_PER_S in all, but at least every RARELY_S. Tokens that were generated after the last write are
generated again, with the same seed, and so they are the same tokens.

A record counts a token as delivered only if the token's document was handed to the connection before the record was. NATS keeps the order
of a connection. So a coordinator that takes over may repeat a document, but never skips one.

The record of a session that has ended keeps its answer for KEPT_S, for a client that asks again. Then it is deleted, at the latest by the
bucket. So does the record of a session whose client has left (`parked`) keep its tokens: it goes on when the client asks again, and not
before.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Final

import orjson
from pydantic import AfterValidator, Field

from mesh.bus import Bucket, Bus, end_tasks
from mesh.errors import MeshError, MessageRejected
from mesh.protocol import subjects
from mesh.protocol.generation import Generate, public_id
from mesh.protocol.message import AnswerEpoch, Label, Message, Natural, Subject, Token, TokenIds
from mesh.telemetry.seldom import Seldom

__all__ = ["Recorder", "SessionRecord", "digest_of", "new_epoch", "sessions_bucket"]

log = logging.getLogger("mesh.coordinator")
seldom = Seldom(log)

EVERY_S: Final = 0.5
RECORDS_PER_S: Final = 32
RARELY_S: Final = 2.0
BYTES_PER_S: Final = 128 * 1024  # of one session's record
REFRESH_S: Final = 40.0  # a record that does not change is written again, or the bucket would forget it
CHECK_S: Final = 5.0  # so often it is looked whether the bucket is still there, while sessions are written down
KEPT_S: Final = 60.0
KEPT: Final = 256
WRITERS: Final = 8
WAITING: Final = 8192
_TTL_S: Final = 150.0
_MAX_BYTES: Final = 256 * 1024 * 1024
_MAX_RECORD: Final = 1024 * 1024  # bytes
_HEADERS_BYTES: Final = 1024
_PAUSE_S: Final = 1.0  # after a write that failed


def _inbox(reply: str) -> str:
    if not subjects.is_inbox(reply):
        raise ValueError("answers go to inboxes alone")
    return reply


class SessionRecord(Message):
    """message: the request, with its prompt in tokens and its seed drawn. digest: of the request as it arrived. owner: the instance of the
    coordinator that has the session; None: any coordinator may take it. given: the tokens generated so far. told: how many of them were
    delivered. answer: the last document of a session that has ended. parked: the client has left; the session goes on if it asks again."""

    limit_bytes: ClassVar[int] = _MAX_RECORD

    session: Token
    model_hash: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    owner: Token | None
    epoch: AnswerEpoch
    digest: Label
    message: Generate
    reply: Annotated[Subject, AfterValidator(_inbox)]
    given: TokenIds = ()
    told: Natural = 0
    answer: Annotated[str, Field(max_length=_MAX_RECORD)] | None = None
    parked: bool = False


def sessions_bucket(bus: Bus) -> Bucket:
    return Bucket(
        bus,
        subjects.KV_SESSIONS,
        ttl_s=_TTL_S,
        durable=True,
        max_value_bytes=SessionRecord.limit_bytes,
        max_bytes=_MAX_BYTES,
        secret_keys=True,
    )


def digest_of(message: Generate) -> str:
    """The same for two requests that ask for the same generation, whichever attempt they are and whatever tokens they have already."""
    values = message.model_dump(mode="json", exclude={"attempt", "given", "stream", "epoch", "waited_s", "traceparent"})
    return hashlib.sha256(orjson.dumps(values, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def new_epoch(*seen: int | None) -> int:
    """An epoch for a session that this coordinator begins or takes over: later than those `seen`, and than any before it of which nothing
    is known any more. A client drops the documents of lower epochs than it has seen."""
    return max(time.time_ns() // 1_000_000, *(epoch + 1 for epoch in seen if epoch is not None), 0)


@dataclass(slots=True)
class PendingWrite:
    """A session whose record is kept up to date. dirty: there is something to write, since `dirty_at`. revision: of the last write; 0
    before any."""

    snapshot: Callable[[], SessionRecord]
    revision: int
    dirty: bool = True
    dirty_at: float = field(default_factory=time.monotonic)
    due_at: float = 0.0
    written_at: float = 0.0
    writing: bool = False
    ended: SessionRecord | None = None  # what to write last; where that is None and `over` is set, the record is deleted
    over: bool = False
    on_first: Callable[[bool], None] | None = None  # called after the first write: whether the record is there
    unwritable: bool = False  # it is too large, even without the tokens generated so far


class Recorder:
    """Writes the records of one coordinator's sessions. `on_lost(session, record)` is called where another coordinator has the session now.

    counters: written, failed, too_large, lost, remade (the bucket was lost and made again), not_resumed, and rejected (records that cannot
    be read). `answering`: false after a write that failed or was slow, until one succeeds.
    """

    def __init__(self, bucket: Bucket, model: str, instance: str, on_lost: Callable[[str, SessionRecord], None]) -> None:
        self.bucket = bucket
        self.instance = instance
        self.counters: Counter[str] = Counter()
        self.answering = True
        self._prefix = subjects.token(model)
        self._on_lost = on_lost
        self._pending: dict[str, PendingWrite] = {}
        self._finished: OrderedDict[str, tuple[float, int]] = OrderedDict()  # session -> (when, revision)
        self._wake = asyncio.Event()
        self._slots = asyncio.Semaphore(WRITERS)
        self._paused_until = 0.0
        self._failing = False
        self._remade = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = self.bucket.bus.keep(self._run, "session records")

    async def stop(self) -> None:
        if self._task is not None:
            await end_tasks(self._task)

    def __contains__(self, session: str) -> bool:
        return session in self._pending

    def lag(self) -> tuple[int, float]:
        """(records that have changed since they were written, seconds for which the first of these has waited)."""
        now = time.monotonic()
        dirty = [pending.dirty_at for pending in self._pending.values() if pending.dirty]
        return len(dirty), max(now - min(dirty, default=now), 0.0)

    @property
    def writable(self) -> bool:
        """Whether the last write succeeded in time."""
        return self.answering and not self._failing

    def key(self, session: str) -> str:
        return f"{self._prefix}.{session}"

    # -- what changes -------------------------------------------------------------------------------------------------

    def keep(
        self, session: str, snapshot: Callable[[], SessionRecord], *, revision: int = 0, on_first: Callable[[bool], None] | None = None
    ) -> None:
        """Write the session down from now on. `snapshot` is called when its record is written; `on_first`, once, after the first write: is
        the record there?"""
        self._pending[session] = PendingWrite(snapshot, revision, on_first=on_first)
        self._finished.pop(session, None)
        self._wake.set()

    def touch(self, session: str) -> None:
        """The session has changed."""
        pending = self._pending.get(session)
        if pending is not None and not pending.dirty:
            pending.dirty, pending.dirty_at = True, time.monotonic()
            self._wake.set()

    def touch_all(self) -> None:
        """Write every record now: that shows whether the sessions are still this coordinator's."""
        for pending in self._pending.values():
            pending.dirty, pending.due_at = True, 0.0
        self._wake.set()

    def slow(self) -> None:
        """A first write has taken too long."""
        self.answering = False

    def end(self, session: str, last: SessionRecord | None) -> None:
        """The session has ended: write `last`, which has its answer, or delete the record."""
        pending = self._pending.get(session)
        if pending is None:
            return
        unwritten = last is None and not pending.revision and not pending.writing
        if unwritten or len(self._pending) > WAITING:  # too many have ended while nothing could be written: the bucket forgets them
            del self._pending[session]
            return
        pending.dirty, pending.over, pending.ended, pending.due_at = True, True, last, 0.0
        self._wake.set()

    def forget(self, session: str) -> None:
        """The session belongs to another coordinator."""
        self._pending.pop(session, None)

    async def release(self, timeout_s: float) -> set[str]:
        """Leave every session to any coordinator that takes it. Returns the sessions whose records say so."""
        await self.stop()
        written: set[str] = set()

        async def one(session: str, pending: PendingWrite) -> None:
            try:
                if pending.over:
                    await self._write_once(session, pending)
                    return
                record = pending.snapshot().model_copy(update={"owner": None})
                if await self.bucket.update(self.key(session), record.to_bytes(), revision=pending.revision) is not None:
                    written.add(session)
            except MeshError as error:
                log.warning("handing over request %s: %s", public_id(session), error)
            except Exception as error:  # the others are handed over all the same
                seldom.error(f"handing over request {public_id(session)}", error)

        try:
            async with asyncio.timeout(timeout_s):
                for _ in range(WRITERS):  # wait for the writes under way
                    await self._slots.acquire()
                await asyncio.gather(*(one(session, pending) for session, pending in list(self._pending.items())))
        except TimeoutError:
            log.warning("handing over sessions: not all were written down within %g s", timeout_s)
        return written

    # -- reading and taking over ---------------------------------------------------------------------------------------

    async def read(self, session: str) -> tuple[SessionRecord, int] | None:
        """(record, revision); None where there is no record, or none that can be parsed."""
        entry = await self.bucket.get(self.key(session))
        return None if entry is None else self._parse(entry.value, entry.revision)

    async def all(self) -> list[tuple[SessionRecord, int]]:
        """(record, revision) of every session of this model."""
        found = [self._parse(entry.value, entry.revision) for entry in await self.bucket.entries(f"{self._prefix}.>")]
        return [item for item in found if item is not None]

    async def take_over(self, record: SessionRecord, revision: int, *, seen: int | None = None) -> tuple[SessionRecord, int] | None:
        """Make the session this coordinator's, with a later epoch, also later than the one that its client has `seen`: (record, revision).
        None where another coordinator was faster."""
        mine = record.model_copy(update={"owner": self.instance, "epoch": new_epoch(record.epoch, seen), "parked": False})
        now = await self.bucket.update(self.key(record.session), mine.to_bytes(), revision=revision)
        return None if now is None else (mine, now)

    # -- writing -------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        check_at = 0.0
        while True:
            self._wake.clear()  # before anything is looked at: what changes meanwhile is looked at next
            now = time.monotonic()
            wait_s = CHECK_S if self._pending else REFRESH_S
            if self._pending and now >= check_at:
                check_at = now + CHECK_S
                self.bucket.bus.spawn(self._check(), "looking for the session records")
            if now >= self._paused_until:
                for session, pending in list(self._pending.items()):
                    due_at = pending.due_at if pending.dirty else pending.written_at + REFRESH_S
                    if pending.writing or (pending.unwritable and not pending.over):
                        continue
                    if due_at > now:
                        wait_s = min(wait_s, due_at - now)
                        continue
                    await self._slots.acquire()
                    pending.writing, pending.dirty = True, False
                    self.bucket.bus.spawn(self._write(session, pending), "writing a session record")
            else:
                wait_s = self._paused_until - now
            await self._clear_finished(now)
            if self.bucket.remade != self._remade:  # with the bucket every record was lost
                self._remade = self.counters["remade"] = self.bucket.remade
                self.touch_all()
            try:
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _check(self) -> None:
        try:
            await self.bucket.check()
        except MeshError as error:  # what cannot be written says so
            log.debug("%s", error)
        self._wake.set()

    async def _write(self, session: str, pending: PendingWrite) -> None:
        try:
            await self._write_once(session, pending)
            if self._failing:
                self._failing = False
                log.info("sessions are written down again")
        except MeshError as error:
            self.counters["failed"] += 1
            if not self._failing:
                self._failing = True
                log.warning("sessions cannot be written down, and are lost if this coordinator dies before they can: %s", error)
            pending.dirty = True
            self.answering = False
            self._paused_until = time.monotonic() + _PAUSE_S
        except Exception as error:  # a defect, of this session alone: it goes on, and its record is tried again rarely
            self.counters["failed"] += 1
            pending.written_at = time.monotonic()
            pending.dirty, pending.due_at = True, pending.written_at + REFRESH_S
            seldom.error(f"the session record of request {public_id(session)}", error)
        finally:
            pending.writing = False
            tell, pending.on_first = pending.on_first, None
            if tell is not None and self._pending.get(session) is pending:
                tell(pending.revision > 0)
            self._slots.release()
            self._wake.set()

    async def _write_once(self, session: str, pending: PendingWrite) -> None:
        over = pending.over
        record = pending.ended if over else pending.snapshot()
        data = b"" if record is None else record.to_bytes()
        most = min(SessionRecord.limit_bytes, self.bucket.bus.max_payload - _HEADERS_BYTES)
        if len(data) > most and record is not None and record.answer is None:  # the tokens can be generated again
            record = record.model_copy(update={"given": ()})
            data = record.to_bytes()
        if len(data) > most:
            self.counters["too_large"] += 1
            if not over:
                pending.unwritable = True
                return
            record = None
        now = time.monotonic()
        pending.written_at = now
        pending.due_at = now + max(EVERY_S, min(len(self._pending) / RECORDS_PER_S, RARELY_S), len(data) / BYTES_PER_S)
        if record is None:
            if pending.revision:
                await self.bucket.delete(self.key(session), revision=pending.revision)
            self._done(session, pending)
            return
        revision = await self.bucket.update(self.key(session), data, revision=pending.revision)
        if revision is None:
            await self._conflict(session, pending)
            return
        pending.revision = revision
        self.answering = True
        self.counters["written"] += 1
        if over:
            self._done(session, pending)
            self._finished[session] = (now, revision)

    async def _conflict(self, session: str, pending: PendingWrite) -> None:
        """The record is not as this coordinator left it: its server lost it, the answer to an earlier write was lost, or another
        coordinator has the session."""
        found = await self.read(session)
        if found is None:
            pending.revision, pending.dirty, pending.due_at = 0, True, 0.0
        elif found[0].owner == self.instance or (found[0].answer is not None and pending.over):
            pending.revision, pending.dirty, pending.due_at = found[1], True, 0.0
        elif self._pending.get(session) is pending:
            del self._pending[session]
            self.counters["lost"] += 1
            self._on_lost(session, found[0])

    def _done(self, session: str, pending: PendingWrite) -> None:
        if self._pending.get(session) is pending and pending.over:
            del self._pending[session]

    async def _clear_finished(self, now: float) -> None:
        """Delete answers that are too old. A newer record of the same name, by another coordinator, stays."""
        while self._finished and self.bucket.bus.connected:
            oldest, _ = next(iter(self._finished.values()))
            if len(self._finished) <= KEPT and now - oldest <= KEPT_S:
                break
            session, (_, revision) = self._finished.popitem(last=False)
            try:
                await self.bucket.delete(self.key(session), revision=revision)
            except MeshError as error:
                log.debug("deleting the session record of request %s: %s", public_id(session), error)

    def _parse(self, value: bytes | None, revision: int) -> tuple[SessionRecord, int] | None:
        try:
            return (SessionRecord.parse(value), revision) if value else None
        except MessageRejected as error:
            self.counters["rejected"] += 1
            log.warning("a session record that cannot be read: %s", error)
            return None
