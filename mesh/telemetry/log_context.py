"""What every log line of some work has in common: the trace and the public id of its request, and the shard.

    with log_context(request="3f...", trace="0af7..."):
        log.info("taken")  # the line has both

The values are those of the task or thread that logs; a task that is started within the block has them too. A session is a secret and is
never among them: its public id (mesh/protocol/generation.py) stands for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["ContextFilter", "context_fields", "log_context", "note"]

_fields: ContextVar[dict[str, str]] = ContextVar("log_fields")


@contextmanager
def log_context(**fields: str | None) -> Iterator[None]:
    """Add `fields` to every line that is logged within the block; those that are None stay as they are outside of it."""
    token = _fields.set({**_fields.get({}), **_known(fields)})
    try:
        yield
    finally:
        _fields.reset(token)


def note(**fields: str | None) -> None:
    """Add `fields` to the block of `log_context` that this runs in, also where this is another task that was started within it. Does
    nothing outside of a block."""
    _fields.get({}).update(_known(fields))


def context_fields() -> Mapping[str, str]:
    """The fields of this task or thread."""
    return _fields.get({})


class ContextFilter(logging.Filter):
    """Gives each record the fields of the task or thread that logs it (`record.context`). It drops nothing."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.context = _fields.get({})
        return True


def _known(fields: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in fields.items() if value is not None}
