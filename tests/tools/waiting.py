"""Waiting for what a test needs. Leases, log records and the lines of a process are events; `until` polls what has no event."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from inspect import isawaitable
from typing import Any, Self, TypeVar, overload

from mesh.bus import Bucket, Bus, LeaseTable
from mesh.bus.kv import Entry
from mesh.protocol.status import ShardLease
from mesh.protocol.subjects import KV_SHARDS, LEASE_TTL_S

T = TypeVar("T")
DEADLINE_S = 120.0
_AGAIN_S = 0.02


@overload
async def until(ask: Callable[[], Awaitable[T | None]], *, because: str, deadline_s: float = DEADLINE_S) -> T: ...
@overload
async def until(ask: Callable[[], T | None], *, because: str, deadline_s: float = DEADLINE_S) -> T: ...
async def until(ask: Callable[[], Any], *, because: str, deadline_s: float = DEADLINE_S) -> Any:
    """Ask again and again until the answer is true, and return it. `because` says why no event can be awaited instead."""
    try:
        async with asyncio.timeout(deadline_s):
            while True:
                answer = ask()
                if isawaitable(answer):
                    answer = await answer
                if answer:
                    return answer
                await asyncio.sleep(_AGAIN_S)  # the caller has said why
    except TimeoutError:
        raise AssertionError(f"not within {deadline_s:g} s (asked again and again because {because})") from None


def until_true(ask: Callable[[], T | None], *, because: str, deadline_s: float = DEADLINE_S) -> T:
    """The same where there is no event loop."""
    deadline = time.monotonic() + deadline_s
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"not within {deadline_s:g} s: {answer} (asked again and again because {because})"
        time.sleep(_AGAIN_S)  # likewise
    return answer


async def entry(bucket: Bucket, key: str, hold: Callable[[Entry | None], T | None], *, deadline_s: float = DEADLINE_S) -> T:
    """The first true answer of `hold`, asked of the key's entry as it is and after each change; None where the key has no value."""
    async with asyncio.timeout(deadline_s):
        found: Entry | None = None
        known = False
        async for change in bucket._watch(key):
            known = known or change is None  # what there was has been read
            if change is not None:
                found = change if change.value is not None else None
            if known and (answer := hold(found)):
                return answer
    raise AssertionError(f"the watch of {key} ended")


async def leases(bus: Bus, hold: Callable[[Mapping[str, ShardLease]], bool], deadline_s: float = DEADLINE_S) -> dict[str, ShardLease]:
    """The shards' leases by name, once `hold` is true of them. Each change is looked at as it comes."""
    changed = asyncio.Event()
    table = LeaseTable(Bucket(bus, KV_SHARDS, ttl_s=LEASE_TTL_S), ShardLease, lambda name, lease: changed.set())
    await table.start()
    try:
        async with asyncio.timeout(deadline_s):
            while not hold(table.leases):
                changed.clear()
                await changed.wait()
        return dict(table.leases)
    finally:
        await table.stop()


class Heard(logging.Handler):
    """Collects what is logged from now on, and awaits a line of it."""

    def __init__(self, logger: str) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self._news = asyncio.Event()
        self._logger = logging.getLogger(logger)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())
        self._news.set()

    async def wait(self, text: str, deadline_s: float = DEADLINE_S) -> None:
        async with asyncio.timeout(deadline_s):
            while not any(text in line for line in self.lines):
                self._news.clear()
                await self._news.wait()

    def __enter__(self) -> Self:
        self._logger.addHandler(self)
        return self

    def __exit__(self, *exception: object) -> None:
        self._logger.removeHandler(self)


class Talking:
    """A process whose output is read line by line, as it comes. Killed with the block, if it has not ended."""

    def __init__(self, command: Sequence[str], **options: Any) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
        )
        self._lines: list[str] = []
        self._over = False
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, name="output")
        self._reader.start()

    @property
    def said(self) -> str:
        return "".join(self._lines)

    def wait(self, pattern: str, deadline_s: float = 2 * DEADLINE_S) -> re.Match[str]:
        """The first line with it."""

        def found() -> re.Match[str] | None:
            return next((match for line in self._lines if (match := re.search(pattern, line))), None)

        with self._news:
            self._news.wait_for(lambda: found() or self._over, deadline_s)
            match = found()
        assert match, f"it did not say {pattern}: {self.said}"
        return match

    def ended(self, deadline_s: float = 2 * DEADLINE_S) -> int:
        """Its exit code; all its output has been read then."""
        code = self.process.wait(deadline_s)
        self._reader.join(deadline_s)
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.ended()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with self._news:
                    self._lines.append(line)
                    self._news.notify_all()
        with self._news:
            self._over = True
            self._news.notify_all()
