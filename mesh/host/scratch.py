"""Temporary folders that somebody removes: their owner in the orderly case, and after a SIGKILL whoever makes the next one.

A folder is its owner's for as long as the owner holds the lock on the file in it; the system lets go of the lock with the process.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import IO

__all__ = ["ScratchFolder"]

_LOCK = ".owner"


class ScratchFolder:
    """A new folder `path` below the system's temporary one. `remove` it."""

    def __init__(self, prefix: str) -> None:
        """Folders of the same prefix whose owners are gone are removed."""
        _remove_stale(prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self._lock = (self.path / _LOCK).open("w")
        _take(self._lock)

    def remove(self) -> None:
        """Idempotent."""
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)


def _remove_stale(prefix: str) -> None:
    if sys.platform == "win32":
        return
    for lock in Path(tempfile.gettempdir()).glob(f"{prefix}*/{_LOCK}"):
        try:
            if lock.lstat().st_uid != os.getuid():
                continue
            with lock.open("r+") as file:  # a folder without the file is one that is being made
                stale = _take(file)
        except OSError:  # it went meanwhile
            continue
        if stale:
            shutil.rmtree(lock.parent, ignore_errors=True)


def _take(file: IO[str]) -> bool:
    """Lock it, unless another process has."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
