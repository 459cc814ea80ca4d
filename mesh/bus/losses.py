"""Whether a stream is still the one that was there before: it may have been deleted, or lost with its server's storage."""

from __future__ import annotations

import logging
from datetime import datetime

__all__ = ["LossWatch"]

log = logging.getLogger("mesh.bus")


class LossWatch:
    """Of one stream, or of the bucket on it. `remade`: how often it was lost and made again, by whichever process."""

    def __init__(self, what: str) -> None:
        self.remade = 0
        self._what = what
        self._created: datetime | None = None

    def found(self, created: datetime | None) -> None:
        """The stream is there, made at this time as the server says."""
        if self._created not in (None, created):
            self.remade += 1
            log.warning("%s was lost with everything in it, and has been made again", self._what)
        self._created = created
