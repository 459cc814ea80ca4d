"""Failures that may repeat at any speed, in a log that stays readable: each place says what failed once in a few seconds."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from typing import Final

__all__ = ["Seldom"]

_EVERY_S: Final = 5.0
_PLACES: Final = 256


class Seldom:
    """Logs errors to `log`, each kind at most once in `every_s` seconds. The next line says how many were left out."""

    def __init__(self, log: logging.Logger, *, every_s: float = _EVERY_S) -> None:
        self._log = log
        self._every_s = every_s
        self._seen: OrderedDict[tuple[object, ...], tuple[float, int]] = OrderedDict()  # kind -> (when it was said, left out since)

    def error(self, what: str, error: BaseException) -> None:
        """Log `error` with its traceback. Errors are of one kind where the same line of code raised the same type."""
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        kind = (type(error), None if place is None else (place.tb_frame.f_code, place.tb_lineno))
        now = time.monotonic()
        said_at, left_out = self._seen.pop(kind, (float("-inf"), 0))
        if now - said_at < self._every_s:
            self._seen[kind] = (said_at, left_out + 1)
            return
        self._seen[kind] = (now, 0)
        while len(self._seen) > _PLACES:
            self._seen.popitem(last=False)
        more = f" ({left_out} more like it since the last line)" if left_out else ""
        self._log.error("%s%s", what, more, exc_info=error)
