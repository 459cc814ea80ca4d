"""Waiting for what a test needs: leases, log records and a process's lines as they come. What nobody announces is asked again: `until`."""

from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from inspect import isawaitable
from typing import Any, TypeVar

from mesh.bus import Bucket, Bus, LeaseTable
from mesh.protocol.status import ShardLease
from mesh.protocol.subjects import KV_SHARDS, LEASE_TTL_S

T = TypeVar("T")
DEADLINE_S = 120.0
_AGAIN_S = 0.02


async def until(ask: Callable[[], Awaitable[T] | T], deadline_s: float = DEADLINE_S) -> T:
    """The first true answer."""
    async with asyncio.timeout(deadline_s):
        while True:
            answer = ask()
            if isawaitable(answer):
                answer = await answer
            if answer:
                return answer
            await asyncio.sleep(_AGAIN_S)


def until_true(ask: Callable[[], T], deadline_s: float = DEADLINE_S) -> T:
    """The same where there is no event loop."""
    deadline = time.monotonic() + deadline_s
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"not within {deadline_s:g} s: {answer}"
        time.sleep(_AGAIN_S)
    return answer


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
    """What is logged in this event loop from now on."""

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

    def __enter__(self) -> Heard:
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
        """Its exit code, all it said being there."""
        code = self.process.wait(deadline_s)
        self._reader.join(deadline_s)
        return code

    def __enter__(self) -> Talking:
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
