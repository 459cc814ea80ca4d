"""Addresses, ports and numbers that processes use when no file, variable or flag gives one."""

from __future__ import annotations

from typing import Final

__all__ = ["DEFAULT_HTTP_PORT", "DEFAULT_INBOX_PREFIX", "DEFAULT_METRICS_PORT", "DEFAULT_NATS_URL", "DEFAULT_ROWS", "INBOX_ROOT"]

DEFAULT_NATS_URL: Final = "nats://127.0.0.1:4222"
DEFAULT_INBOX_PREFIX: Final = "_INBOX"
INBOX_ROOT: Final = r"_INBOX(_[A-Za-z0-9_-]+)?"
"""The first token of every inbox: `_INBOX`, or `_INBOX_` and a name. Answers go to subjects below it and nowhere else."""
DEFAULT_HTTP_PORT: Final = 8080
DEFAULT_METRICS_PORT: Final = 9091
DEFAULT_ROWS: Final = 8
"""Sessions at once in a shard."""
