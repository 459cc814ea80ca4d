"""API keys: bearer tokens that need no signature, because a file lists the hash of each one.

    mesh_3f0c9a1b22d4_Vw3...    mesh_ID_SECRET; ID finds the entry, SECRET has 256 random bits

The file holds no secret: an entry has the SHA-256 of the whole key. A fast hash is enough, because nobody can try 2**256 secrets. The file
is a list in YAML, so that a new key is appended and comments stay:

    - id: 3f0c9a1b22d4
      subject: team-a
      sha256: 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
      scopes: [generate, batch]
      requests_per_minute: 60        # and the other limits of Quota
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError

from mesh.errors import ConfigError, Denied
from mesh.http.tokens import MAX_SUBJECT, Checks, Claims, Quota, check_scopes
from mesh.settings.files import Section

__all__ = ["Credentials", "KeyFile", "add_key"]

log = logging.getLogger("mesh.http")

_KEY = re.compile(r"mesh_([0-9a-f]{12})_([A-Za-z0-9_-]{43})")
_PREFIX = "mesh_"
_LOOK_S = 1.0
"""How often the file is looked at, at most."""
_MOST_BYTES = 16 * 1024 * 1024
_NO_HASH = "0" * 64
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml's reads 10,000 keys in less than a second, Python's in seven."""

Count = Annotated[int, Field(ge=1)]


class _Entry(Section):
    """One key of the file."""

    id: Annotated[str, Field(pattern="^[0-9a-f]{12}$")]
    subject: Annotated[str, Field(min_length=1, max_length=MAX_SUBJECT)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    scopes: Annotated[list[Literal["generate", "batch", "admin"]], Field(min_length=1)]
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    concurrent_sessions: Count | None = None
    requests_per_batch: Count | None = None

    names: ClassVar = ("requests_per_minute", "tokens_per_minute", "concurrent_sessions", "requests_per_batch")

    @property
    def claims(self) -> Claims:
        return Claims(self.subject, frozenset(self.scopes), Quota(**{name: getattr(self, name) for name in self.names}))


_ENTRIES = TypeAdapter(list[_Entry])


def _in_a_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, name="API keys", daemon=True).start()


class KeyFile:
    """The keys of a file. A changed file is noticed within a second, and read in a thread. While it cannot be read, or is wrong, the keys
    of before stay valid, and the log says so; an empty file has no keys."""

    def __init__(
        self,
        path: str | Path,
        clock: Callable[[], float] = time.monotonic,
        beside: Callable[[Callable[[], None]], None] = _in_a_thread,
    ) -> None:
        """ConfigError: the file cannot be read, or is wrong. `beside`: runs what waits for the file."""
        self._path = Path(path).expanduser()
        self._clock = clock
        self._beside = beside
        self._reading = False
        self._seen = _stamp(self._path)
        self._looked_at = clock()
        self._keys = _read(self._path)

    def verify(self, key: str) -> Claims:
        """The claims of a key. Denied: it is not in the file. The comparison takes the same time wherever the hashes differ."""
        self._look()
        match = _KEY.fullmatch(key)
        entry = self._keys.get(match[1]) if match is not None else None
        digest = hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
        same = hmac.compare_digest(digest, _NO_HASH if entry is None else entry.sha256)
        if entry is None or not same:
            raise Denied("there is no such API key: it was removed, or never made (see `mesh token key`)")
        return entry.claims

    def _look(self) -> None:
        now = self._clock()
        if now - self._looked_at < _LOOK_S or self._reading:
            return
        self._looked_at, self._reading = now, True
        self._beside(self._read_again)

    def _read_again(self) -> None:
        try:
            stamp = _stamp(self._path)
            if stamp == self._seen:
                return
            self._seen = stamp
            self._keys = _read(self._path)
            log.info("read %d API keys", len(self._keys))
        except ConfigError as error:
            log.error("%s; the API keys of before stay valid", error)
        finally:
            self._reading = False


class Credentials:
    """Checks API keys and JSON Web Tokens. None: there are none of that kind."""

    def __init__(self, tokens: Checks | None, keys: KeyFile | None) -> None:
        self._tokens = tokens
        self._keys = keys

    def verify(self, token: str) -> Claims:
        if token.startswith(_PREFIX) and self._keys is not None:
            return self._keys.verify(token)
        if self._tokens is None:
            raise Denied("this is no API key: one begins with mesh_ (see `mesh token key`)")
        return self._tokens.verify(token)


def add_key(path: str | Path, subject: str, scopes: Iterable[str], quota: Quota) -> str:
    """Append a new key to the file, which is made if it does not exist, readable by its owner alone. Returns the key, which is kept
    nowhere. ConfigError: the file is wrong, or cannot be written."""
    path = Path(path).expanduser()
    if path.exists():
        _read(path)
    id, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
    key = f"{_PREFIX}{id}_{secret}"
    entry: dict[str, Any] = {
        "id": id,
        "subject": subject,
        "sha256": hashlib.sha256(key.encode()).hexdigest(),
        "scopes": check_scopes(scopes),
        **{name: limit for name, limit in asdict(quota).items() if limit is not None},
    }
    _checked([entry], path)
    text = yaml.safe_dump([entry], sort_keys=False, allow_unicode=True)
    try:
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if before and not before.endswith("\n"):
            before += "\n"
        new = path.with_name(f".{path.name}.{os.getpid()}")
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            file.write(before + text)
        if path.exists():
            new.chmod(path.stat().st_mode & 0o777)
        new.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: give a file this user may write") from None
    return key


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        found = path.stat()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: give a file of API keys; `mesh token key` makes one") from None
    return found.st_mtime_ns, found.st_size, found.st_ino


def _read(path: Path) -> dict[str, _Entry]:
    """The entries by their ids."""
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            raise ConfigError(f"{path} has more than {_MOST_BYTES:,} bytes: remove keys that nobody uses")
        content = _LOADER(data).get_single_data()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: give a file of API keys; `mesh token key` makes one") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError):
        raise ConfigError(f"{path}: unreadable: write a list of keys in YAML, as `mesh token key` does") from None
    return _checked([] if content is None else content, path)


def _checked(content: Any, path: Path) -> dict[str, _Entry]:
    try:
        entries = _ENTRIES.validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {where or 'content'}: {first['msg']}: write a list of keys, as `mesh token key` does") from None
    found: dict[str, _Entry] = {}
    for entry in entries:
        if entry.id in found:
            raise ConfigError(f"{path}: the id {entry.id} is there twice: keep one")
        found[entry.id] = entry
    return found
