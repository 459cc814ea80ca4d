"""What the fixture `run` is, for annotations."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Run(Protocol):
    """Runs a coroutine to its end, within a deadline, and returns its result."""

    def __call__(self, work: Coroutine[Any, Any, T], /) -> T: ...
