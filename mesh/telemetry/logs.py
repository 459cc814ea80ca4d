"""The log of a process."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from mesh.errors import ConfigError

__all__ = ["setup_logging"]

_FORMAT = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def setup_logging(level: str = "info", file: str | None = None) -> None:
    """Log to `file`, or to standard error. ConfigError where the file cannot be written."""
    handler: logging.Handler
    if file is None:
        handler = logging.StreamHandler(sys.stderr)
    else:
        try:
            Path(file).parent.mkdir(parents=True, exist_ok=True)
            handler = logging.FileHandler(file, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"logging.file {file}: {error.strerror}: give a file this user may write") from None
    handler.setFormatter(logging.Formatter(_FORMAT))
    root = logging.getLogger()
    for old in tuple(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(getattr(logging, level.upper()))
    for noisy in ("jax", "nats", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
