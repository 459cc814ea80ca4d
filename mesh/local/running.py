"""Where `mesh up` runs on this machine, and the password of its NATS server: how commands find it by themselves.

    up-PORT.json        {"url", "pid", "user", "password_file"} of the mesh whose server listens on that port; for a secure one
                        {"url", "pid", "nkey_seed_file", "inbox_prefix", "tls_ca_file", "tls_cert_file", "tls_key_file"}: paths
    up-PORT.password    the password, in a file that only this user reads

Both are in `stagemesh` in $XDG_RUNTIME_DIR, or in the user's cache folder. A file whose process has ended does not count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

__all__ = ["RunningMesh", "announced", "running_mesh"]

_SETTINGS = ("user", "password_file", "nkey_seed_file", "inbox_prefix", "tls_ca_file", "tls_cert_file", "tls_key_file")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, slots=True)
class RunningMesh:
    """A `mesh up` that runs here. `settings`: keys of the `nats` section with which its operator connects; none where its server asks for
    nothing."""

    url: str
    settings: Mapping[str, str] = field(default_factory=dict)


def running_mesh(url: str | None = None) -> RunningMesh | None:
    """The mesh that was started last, or the one whose server is at `url`; None: there is none."""
    found = []
    try:
        paths = list(_folder().glob("up-*.json"))
    except RuntimeError:  # this user has no home
        return None
    for path in paths:
        try:
            said = json.loads(path.read_text())
            os.kill(int(said["pid"]), 0)
            settings = {key: str(said[key]) for key in _SETTINGS if said.get(key) is not None}
            found.append((path.stat().st_mtime_ns, RunningMesh(str(said["url"]), settings)))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # it has ended, or this is not its file
    found.sort(key=lambda one: one[0])
    matching = [mesh for _, mesh in found if url is None or _same(mesh.url, url)]
    return matching[-1] if matching else None


@contextmanager
def announced(
    url: str, *, user: str | None = None, password: str | None = None, settings: Mapping[str, str | None] | None = None
) -> Iterator[Path | None]:
    """While this context is open, `running_mesh` finds this mesh. `settings`: further keys of the `nats` section, which hold no secret.
    The value is the file that lets a command in: the password's, or else the description of this mesh where it has `settings`. None:
    nothing is needed, or the files cannot be written, and then nobody finds this mesh."""
    folder, name = _folder(), f"up-{urlsplit(url).port}"
    said, secret = folder / f"{name}.json", folder / f"{name}.password"
    mesh = {"url": url, "pid": os.getpid(), "user": user, "password_file": None if password is None else str(secret), **(settings or {})}
    written = False
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if password is not None:
            _write_private(secret, password + "\n")
        _write_private(said, json.dumps(mesh))
        written = True
    except OSError:
        pass
    try:
        yield None if not written else secret if password is not None else said if settings else None
    finally:
        if written:
            for path in (said, secret):
                with suppress(OSError):
                    path.unlink(missing_ok=True)


def _write_private(path: Path, text: str) -> None:
    """Write a new file that only this user reads; one that is there is replaced, and never written through."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _same(one: str, other: str) -> bool:
    """Whether two addresses are the same port of this machine."""
    try:
        ours, theirs = urlsplit(one), urlsplit(other)
        return ours.port == theirs.port is not None and theirs.hostname in _LOOPBACK and theirs.username is None
    except ValueError:
        return False


def _folder() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR") or os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "stagemesh"
