"""Files of a model that are still on their way: a thread that loads blocks waits here for each of them."""

from __future__ import annotations

import threading
from collections.abc import Iterable

from mesh.errors import Cancelled, MeshError

__all__ = ["Arrivals"]


class Arrivals:
    """Which files are there. Any thread may call it."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._error: MeshError | None = None
        self._changed = threading.Condition()

    def arrived(self, name: str) -> None:
        """A file is there, whole and right."""
        with self._changed:
            self._names.add(name)
            self._changed.notify_all()

    def fail(self, error: MeshError) -> None:
        """Nothing more will arrive: waiting for it raises `error`."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def stop(self) -> None:
        """The same where nobody wants the rest any more."""
        self.fail(Cancelled("the rest of the model is not fetched: the process ends"))

    def wait(self, names: Iterable[str]) -> None:
        """Return once all of these files are there. Raises the error after which they will not come."""
        wanted = set(names)
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or wanted <= self._names)
            if self._error is not None and not wanted <= self._names:
                raise self._error
