"""Temporary folders that are always removed: by their owner, or after a SIGKILL of the owner by the next process that makes one.

The owner holds a lock on a file in its folder. The system releases the lock when the process ends, however it ends.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from mesh.host.locks import try_lock

__all__ = ["ScratchFolder"]

_LOCK = ".owner"


class ScratchFolder:
    """A new folder `path` in the system's temporary folder. Call `remove` when done."""

    def __init__(self, prefix: str) -> None:
        """Also removes folders of the same prefix whose owners are gone."""
        _remove_stale(prefix)
        self.path = Path(tempfile.mkdtemp(prefix=prefix))
        self._lock = (self.path / _LOCK).open("w")
        try_lock(self._lock)

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
            with lock.open("r+") as file:  # a folder without the file is still being made
                stale = try_lock(file)
        except OSError:  # another process removed it meanwhile
            continue
        if stale:
            shutil.rmtree(lock.parent, ignore_errors=True)
