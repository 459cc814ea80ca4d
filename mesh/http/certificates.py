"""The certificate of an HTTP listener, read again when its files change: what is renewed is shown from the next connection on.

Python can exchange the certificate of a handshake that has begun, and says when: when the client has named whom it wants (or nobody). A
pair that does not belong together, because one of the two files is still being copied, is left; the certificate before it serves on.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path

from mesh.errors import ConfigError

__all__ = ["renewing"]

log = logging.getLogger("mesh.http")

Stamp = tuple[tuple[int, int, int], ...]


def renewing(make: Callable[[], ssl.SSLContext], files: tuple[str, ...]) -> ssl.SSLContext:
    """A context that makes itself anew with `make` when one of `files` has changed. The errors of `make` the first time."""
    context = make()
    seen = _stamp(files)
    fresh = context

    def choose(connection: ssl.SSLObject | ssl.SSLSocket, name: str | None, started: ssl.SSLContext) -> None:
        nonlocal seen, fresh
        now = _stamp(files)
        if now is not None and now != seen:
            seen = now
            try:
                fresh = make()
                log.info("%s: read again, and shown from now on", files[0])
            except ConfigError as error:
                log.warning("%s; the certificate before it serves on", error)
        connection.context = fresh

    context.sni_callback = choose  # it returns None: the handshake goes on
    return context


def _stamp(files: tuple[str, ...]) -> Stamp | None:
    """What changes with the files; None where one is not there now."""
    try:
        found = [Path(file).stat() for file in files]
    except OSError:
        return None
    return tuple((each.st_mtime_ns, each.st_size, each.st_ino) for each in found)
