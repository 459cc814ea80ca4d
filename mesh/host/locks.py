"""A lock on an open file. The system releases it when the process ends, however it ends."""

from __future__ import annotations

import sys
from typing import IO, Any

__all__ = ["try_lock"]


def try_lock(file: IO[Any]) -> bool:
    """Lock the file until it is closed. False if it is locked already, by this process or by another one."""
    if sys.platform == "win32":
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
