"""The instance of a process: one life of it. A restart is a new instance of the same name.

An instance begins with the time of its start, in milliseconds, in hexadecimal digits. So of two instances of one name the one that sorts
later began later. It is the one that counts: the other process was suspended or cut off while it was replaced.
"""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from typing import Final

__all__ = ["new_instance"]

_TIME_DIGITS: Final = 12


def new_instance(after: str = "") -> str:
    """An instance that sorts after `after`, whatever the clock of the machine on which that one began said."""
    now_ms = time.time_ns() // 1_000_000
    with suppress(ValueError):  # not an instance of this kind
        now_ms = max(now_ms, int(after[:_TIME_DIGITS], 16) + 1)
    return f"{now_ms:0{_TIME_DIGITS}x}{secrets.token_hex(3)}"
