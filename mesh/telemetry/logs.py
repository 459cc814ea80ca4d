"""The log of a process: where it goes, and how a line looks.

On a terminal a line is for people. Everywhere else it is one JSON object, so that a log collector needs no patterns (docs/logging.md has
the fields). `logging.format` decides otherwise.

No line has the text of a prompt or of an answer, a session, a password or a token. Texts of prompts and answers are logged by CONTENT
alone, which says nothing unless `logging.content` is true.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler, WatchedFileHandler
from pathlib import Path
from typing import Any, Final, TextIO

import orjson

from mesh.errors import ConfigError
from mesh.settings.schema import LoggingSection
from mesh.telemetry.log_context import ContextFilter

__all__ = ["CONTENT", "JsonFormatter", "TextFormatter", "readable", "setup_logging"]

CONTENT: Final = logging.getLogger("mesh.content")
"""For the texts of prompts and answers, and nothing else. Ask `CONTENT.isEnabledFor(logging.INFO)` before a text is put together."""
CONTENT.disabled = True

_NOISY = ("jax", "nats", "asyncio", "httpx", "httpcore")
_COLOURS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m", logging.CRITICAL: "\x1b[31;1m", logging.DEBUG: "\x1b[2m"}
_PLAIN = "\x1b[0m"


def setup_logging(section: LoggingSection | None = None, *, role: str, name: str = "") -> None:
    """Log as `section` says (None: by its defaults). `role`: what this process is, such as "shard"; `name`: which one of them. ConfigError
    where the file cannot be written."""
    section = LoggingSection() if section is None else section
    handler = _handler(section)
    terminal = section.file is None and sys.stderr.isatty()
    if section.format == "json" or (section.format == "auto" and not terminal):
        handler.setFormatter(JsonFormatter(role, name))
    else:
        handler.setFormatter(TextFormatter(colours=terminal and "NO_COLOR" not in os.environ))
    handler.addFilter(ContextFilter())
    root = logging.getLogger()
    for old in tuple(root.handlers):
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(getattr(logging, section.level.upper()))
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))
    CONTENT.disabled = not section.content


class _StandardError(logging.StreamHandler[TextIO]):
    """Standard error as it is at the moment: a progress bar puts something in its place that writes above the bar."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def readable(line: str) -> str:
    """A line of a log as a person reads it: a JSON line as text, any other line as it is."""
    try:
        said = orjson.loads(line) if line.startswith("{") else None
    except orjson.JSONDecodeError:
        return line
    if not isinstance(said, dict) or not {"time", "level", "message"} <= said.keys():
        return line
    text = f"{said['level']} {said.get('logger', '')}: {said['message']}"
    return text + (f": {said['error']}" if "error" in said else "")


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON: time, level, logger, message, role, name, pid; trace, request and shard where they are known; the
    fields of the call (`extra={"fields": {...}}`); error, error_type and traceback of an exception."""

    def __init__(self, role: str, name: str = "") -> None:
        super().__init__()
        self._process = {"role": role, **({"name": name} if name else {})}

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        document: dict[str, Any] = {
            "time": at,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._process,
            "pid": record.process,
        }
        document |= {key: value for key, value in _fields_of(record).items() if key not in document}
        if record.exc_info and record.exc_info[1] is not None:
            error = record.exc_info[1]
            document |= {"error_type": type(error).__name__, "error": str(error), "traceback": self.formatException(record.exc_info)}
        return orjson.dumps(document, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


class TextFormatter(logging.Formatter):
    """A record as a line for people, followed by the traceback where there is an exception."""

    def __init__(self, *, colours: bool = False) -> None:
        super().__init__()
        self._colours = colours

    def format(self, record: logging.LogRecord) -> str:
        known = getattr(record, "context", {})
        about = "".join(f" [{key} {known[key]}]" for key in ("request", "shard") if key in known)
        at = datetime.fromtimestamp(record.created).astimezone().strftime("%Y-%m-%d %H:%M:%S")  # the reader's own time
        level = f"{record.levelname:<7}"
        if self._colours and (colour := _COLOURS.get(record.levelno)):
            level = f"{colour}{level}{_PLAIN}"
        line = f"{at}.{record.msecs:03.0f} {level} {record.name}: {record.getMessage()}{about}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info and record.exc_info[1] is not None else line


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    own: Mapping[str, Any] = getattr(record, "fields", {})
    return {**getattr(record, "context", {}), **{key: value for key, value in own.items() if value is not None}}


def _handler(section: LoggingSection) -> logging.Handler:
    """Standard error, or the file. A file that is rotated by another program (max_bytes: 0) is opened anew when that has happened."""
    if section.file is None:
        return _StandardError()
    try:
        Path(section.file).parent.mkdir(parents=True, exist_ok=True)
        if section.max_bytes:
            return RotatingFileHandler(section.file, maxBytes=section.max_bytes, backupCount=section.backups, encoding="utf-8")
        return WatchedFileHandler(section.file, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"logging.file {section.file}: {error.strerror}: give a file this user may write") from None
