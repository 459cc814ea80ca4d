"""Files that only their owner reads, written whole or not at all."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from mesh.errors import ConfigError

__all__ = ["private_folder", "write_file"]


def private_folder(path: Path) -> Path:
    """The folder at `path`, made if it is not there, which only its owner may enter (0700). ConfigError: it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.chmod(0o700)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: give a folder of your own") from None
    return path


def write_file(path: Path, data: bytes, *, secret: bool) -> None:
    """Write the file: a reader sees the whole old one or the whole new one. `secret`: mode 0600 from the start, otherwise 0644."""
    new = path.with_name(f".{path.name}.new")
    try:
        with suppress(FileNotFoundError):
            new.unlink()
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if not secret:
            new.chmod(0o644)
        new.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: it cannot be written") from None
