"""A model, or a part of it, on its way from the object store into a directory.

    1. The files are taken in the order of the layers, FILES_AT_ONCE at a time, so that the first blocks can be loaded while others come.
    2. A file that is there and right is left as it is. One that another pull of this host has fetched, or fetches now, is copied.
    3. Any other is fetched (mesh/bus/chunks.py) into `.NAME.HASH.part`. Its checksum is computed as it arrives; it gets its name if that is
       right. A part that an earlier pull has left is continued.
    4. The manifest is written last.

Errors of the network are waited out as long as something arrives every PATIENCE_S; what has arrived stays.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from mesh.bus.chunks import WINDOW_BYTES, StoredObject, reading
from mesh.bus.connection import Bus, end_tasks
from mesh.bus.pace import Estimate, RateLimit
from mesh.bus.part_file import PartFile, size_of, writing
from mesh.errors import ConfigError, CorruptModel, Denied, MeshError, Unavailable
from mesh.host.known_files import Claim, KnownFiles
from mesh.host.locks import try_lock
from mesh.model.arrivals import Arrivals
from mesh.model.manifest import FileInfo, Manifest, check_file
from mesh.settings.units import format_bytes
from mesh.types import Progress, no_progress

__all__ = ["FILES_AT_ONCE", "PATIENCE_S", "FindObject", "Pull"]

log = logging.getLogger("mesh.bus")

T = TypeVar("T")

FILES_AT_ONCE: Final = 3
PATIENCE_S: Final = 60.0
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 2.0
_LOOK_S: Final = 0.1
_STALLED_S: Final = 15.0
_SAY_S: Final = 5.0
_PACED_S: Final = 0.25
"""So many seconds' worth of chunks are asked for ahead where the rate is limited."""

FindObject = Callable[[FileInfo], Awaitable[StoredObject]]
"""The object of a file. CorruptModel: the store has none, or another one."""


class Pull:
    """See the module's docstring. `run` does it all; `start` does so in the background, for a shard that loads meanwhile."""

    def __init__(
        self,
        bus: Bus,
        find: FindObject,
        manifest: Manifest,
        files: list[FileInfo],
        directory: Path,
        known: KnownFiles,
        *,
        bytes_per_s: float | None = None,
        progress: Progress = no_progress,
    ) -> None:
        """`bytes_per_s`: at most so fast (None: no limit)."""
        self.manifest = manifest
        self.directory = directory
        self.arrivals = Arrivals()
        self.fetched_bytes = 0  # over the network
        self._bus = bus
        self._find = find
        self._files = files
        self._known = known
        self._limit = None if bytes_per_s is None else RateLimit(bytes_per_s)
        self._progress = progress
        self._estimate = Estimate(sum(file.bytes for file in files))
        self._done = dict.fromkeys((file.name for file in files), 0)
        self._said_at = time.monotonic()
        self._stalls: dict[str, tuple[int, float]] = {}  # of files that others fetch: size, since when it has not grown
        self._heard_at = time.monotonic()
        self._task: asyncio.Task[None] | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Bring every file. CorruptModel: one differs from the manifest. Unavailable and others: nothing came for PATIENCE_S; what has
        arrived stays, and another pull goes on from there. ConfigError: the directory has no room, or cannot be written."""
        try:
            await self._run()
        except MeshError as error:
            self.arrivals.fail(error)
            raise
        finally:
            self.arrivals.stop()

    def start(self) -> None:
        """Run in the background. Errors reach those who wait for `arrivals`."""
        self._task = asyncio.create_task(self._in_background(), name="pull")

    async def wait(self) -> None:
        """Return when it has ended, well or not."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def stop(self) -> None:
        """End it. Idempotent. What has arrived stays."""
        if self._task is not None:
            await end_tasks(self._task)

    async def _in_background(self) -> None:
        with contextlib.suppress(MeshError):
            await self.run()

    async def _run(self) -> None:
        self._heard_at = time.monotonic()
        await asyncio.to_thread(self._prepare)
        left = list(self._files)
        async with contextlib.AsyncExitStack() as stack:
            workers = [asyncio.create_task(self._work(left), name="pull files") for _ in range(FILES_AT_ONCE)]
            stack.push_async_callback(end_tasks, *workers)
            await asyncio.gather(*workers)
        with writing(self.directory):
            await asyncio.to_thread(self.manifest.save, self.directory)
        log.info("fetched %s, %s of them over the network", self._estimate, format_bytes(self.fetched_bytes))

    def _prepare(self) -> None:
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.directory).free
        missing = sum(file.bytes - size_of(self.directory / file.name) - size_of(self._part(file)) for file in self._files)
        if missing > free:
            raise ConfigError(
                f"{self.directory} has {format_bytes(free)} free and {format_bytes(missing)} are to come: "
                "make room, or give another directory"
            )

    async def _work(self, left: list[FileInfo]) -> None:
        """Bring files until none is left. Those that another pull brings go to the end of the list."""
        passed = 0
        while left:
            file = left.pop(0)
            if await self._bring(file):
                passed = 0
                self._arrived(file)
                continue
            left.append(file)
            passed += 1
            if passed >= len(left):
                passed = 0
                await asyncio.sleep(_LOOK_S)

    # -- one file ------------------------------------------------------------------------------------------------------

    async def _bring(self, file: FileInfo) -> bool:
        """Whether it is there now; False: another pull brings it."""
        path = self.directory / file.name
        if await asyncio.to_thread(_is_there, path, file):
            self._known.note(file.sha256, path)
            return True
        claim, part = self._claim(file)
        if part is None:
            return False
        try:
            with PartFile(part, file) as growing:
                if await asyncio.to_thread(_is_there, path, file):  # the pull that had the claim was of this directory
                    Path(part.name).unlink(missing_ok=True)
                else:
                    await self._fill(file, growing)
                    with writing(path):
                        await _thread(os.replace, part.name, path)
        except CorruptModel:
            Path(part.name).unlink(missing_ok=True)
            raise
        finally:
            claim.release()
        self._known.note(file.sha256, path)
        return True

    def _claim(self, file: FileInfo) -> tuple[Claim, IO[bytes] | None]:
        """Both for this pull, or no file to write to: another pull fetches it."""
        path = self._part(file)
        claim = self._known.claim(file.sha256, path)
        with writing(path):
            part = path.open("a+b") if claim is not None else None
            if part is not None and try_lock(part):
                return claim or Claim(), part
            if part is not None:
                part.close()
            if claim is not None:
                claim.release()
            if not self._is_stalled(file):
                return Claim(), None
            log.warning("%s: the process that fetches it does not go on; fetching it here as well", file.name)
            return Claim(), path.with_suffix(f".{secrets.token_hex(4)}.part").open("a+b")

    def _is_stalled(self, file: FileInfo) -> bool:
        """Whether what another pull of this host fetches has not grown for a while."""
        now, size = time.monotonic(), max(self._known.grown(file.sha256), size_of(self._part(file)))
        before, since = self._stalls.get(file.name, (-1, now))
        self._stalls[file.name] = (size, since if size == before else now)
        return size == before and now - since > _STALLED_S

    def _part(self, file: FileInfo) -> Path:
        return self.directory / f".{file.name}.{file.sha256[:16]}.part"

    async def _fill(self, file: FileInfo, part: PartFile) -> None:
        """Get the whole content into `part`. CorruptModel: what the store has is another content."""
        neighbour = self._known.find(file.sha256)
        if neighbour is not None and await _thread(part.copy, neighbour):
            self._note(file, file.bytes)
            return
        await self._fetch(file, part)
        if await _thread(part.is_right):
            return
        log.warning("%s arrived damaged: fetching it again", file.name)
        await _thread(part.keep, 0)
        await self._fetch(file, part)
        if not await _thread(part.is_right):
            raise CorruptModel(f"{file.name} of the object store does not match the manifest: push the model again")

    async def _fetch(self, file: FileInfo, part: PartFile) -> None:
        """Append the chunks that `part` lacks."""
        pause_s, object_, taken = _FIRST_PAUSE_S, None, 0
        while True:
            try:
                if object_ is None:
                    object_ = await self._find(file)
                    taken = _whole_chunks(object_, file, part.size)
                    await _thread(part.keep, min(file.bytes, taken * object_.chunk_bytes))
                    self._note(file, part.size)
                if taken >= object_.chunks:
                    return
                async with reading(self._bus, object_, taken, window_bytes=self._window(object_), pace=self._pace) as chunks:
                    while found := await chunks.take():
                        await _thread(part.append, found)
                        taken += len(found)
                        self.fetched_bytes += sum(map(len, found))
                        self._heard_at, pause_s = time.monotonic(), _FIRST_PAUSE_S
                        self._note(file, part.size)
            except MeshError as error:
                if not error.retryable or isinstance(error, Denied):
                    raise
                if time.monotonic() - self._heard_at > PATIENCE_S:
                    raise Unavailable(
                        f"{file.name}: nothing has arrived for {PATIENCE_S:g} s ({error}): pull again, it goes on where this ended; "
                        "`mesh doctor` says whether this user may pull"
                    ) from None
                log.debug("%s: %s; reading on from chunk %d", file.name, error, taken)
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _window(self, object_: StoredObject) -> int:
        if self._limit is None:
            return WINDOW_BYTES
        return min(WINDOW_BYTES, max(object_.chunk_bytes, round(self._limit.bytes_per_s * _PACED_S)))

    async def _pace(self, count: int) -> None:
        if self._limit is not None:
            await asyncio.sleep(self._limit.delay_s(count, time.monotonic()))
            self._heard_at = time.monotonic()

    # -- progress ------------------------------------------------------------------------------------------------------

    def _arrived(self, file: FileInfo) -> None:
        self._note(file, file.bytes)
        self.arrivals.arrived(file.name)

    def _note(self, file: FileInfo, done: int) -> None:
        self._done[file.name] = done
        now, whole = time.monotonic(), sum(self._done.values())
        self._estimate.note(whole, now)
        self._progress(file.name, whole, self._estimate.total)
        if now - self._said_at > _SAY_S:
            self._said_at = now
            log.info("fetching %s: %s", self.manifest.name, self._estimate)


def _whole_chunks(object_: StoredObject, file: FileInfo, size: int) -> int:
    """How many chunks are in the first `size` bytes of a file."""
    if object_.chunks != -(-file.bytes // object_.chunk_bytes):  # they are of different sizes
        return 0
    return object_.chunks if size >= file.bytes else size // object_.chunk_bytes


def _is_there(path: Path, file: FileInfo) -> bool:
    try:
        check_file(path, file, checksum=True)
    except CorruptModel:
        return False
    return True


async def _thread(work: Callable[..., T], *arguments: Any) -> T:
    """Run `work` in a thread. Where this task is cancelled, it ends after the thread: no other pull gets a file that is still written."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(running)
    finally:
        while not running.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([running])
