"""Where files of known content are on this host, so that no process fetches what another one has.

    FOLDER/<sha256>         a symbolic link to a file that had this content when it was noted; it may be gone, or changed, since
    FOLDER/<sha256>.lock    locked by the process that fetches this content; it names the file that grows meanwhile

One folder serves the processes of one user. Without a folder that can be written, nothing is known and every claim succeeds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from pathlib import Path
from typing import IO

from mesh.host.locks import try_lock

__all__ = ["Claim", "KnownFiles"]

log = logging.getLogger("mesh.host")

_MOST_PATH = 4096


class Claim:
    """That this process fetches a content, until `release`."""

    def __init__(self, file: IO[bytes] | None = None) -> None:
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()


class KnownFiles:
    """See the module's docstring. `folder` is made if it is not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        with contextlib.suppress(OSError):  # found out at each use
            folder.mkdir(parents=True, exist_ok=True)

    def find(self, sha256: str) -> Path | None:
        """A file that may have this content; whoever uses it compares."""
        try:
            path = (self._folder / sha256).readlink()
        except OSError:
            return None
        return path if path.is_file() else None

    def note(self, sha256: str, path: Path) -> None:
        """`path` has this content."""
        fresh = self._folder / f".{sha256}.{secrets.token_hex(4)}"
        target = path.absolute()
        if self.find(sha256) == target:
            return
        try:
            fresh.symlink_to(target)
            fresh.replace(self._folder / sha256)
        except OSError as error:
            log.debug("not noted where %s is: %s", path, error)

    def claim(self, sha256: str, grows: Path) -> Claim | None:
        """Claim the content, which will grow in the file `grows`. None: another pull has claimed it."""
        with contextlib.ExitStack() as unless_claimed:
            try:
                file = unless_claimed.enter_context(self._lock_path(sha256).open("a+b", buffering=0))
                if not try_lock(file):
                    return None
                file.truncate(0)
                file.write(os.fsencode(grows.absolute()))
            except OSError as error:
                log.debug("fetching without a lock: %s", error)
                return Claim()
            unless_claimed.pop_all()
        return Claim(file)

    def grown(self, sha256: str) -> int:
        """The bytes that the process which has claimed this content has so far."""
        try:
            with self._lock_path(sha256).open("rb") as file:
                return Path(os.fsdecode(file.read(_MOST_PATH))).stat().st_size
        except (OSError, ValueError):
            return 0

    def _lock_path(self, sha256: str) -> Path:
        return self._folder / f"{sha256}.lock"
