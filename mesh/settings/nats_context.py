"""Contexts of the `nats` command: files that say where a server is and who connects, under $XDG_CONFIG_HOME/nats or ~/.config/nats.

context/NAME.json    one context
context.txt          the name of the one that `nats context select` has chosen
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

import orjson

from mesh.errors import ConfigError

__all__ = ["read_context", "selected_context", "server_urls"]

# key of a context -> key of the `nats` section
_KEYS: Final = {
    "user": "user",
    "password": "password",
    "token": "token",
    "creds": "credentials_file",
    "nkey": "nkey_seed_file",
    "ca": "tls_ca_file",
    "cert": "tls_cert_file",
    "key": "tls_key_file",
    "inbox_prefix": "inbox_prefix",
}
_NEEDED: Final = ("nsc", "socks_proxy", "tls_first", "user_jwt", "user_seed")
"""Keys without which the server would not be reached as was meant."""


def selected_context() -> str | None:
    """The name in $NATS_CONTEXT, else the one that `nats context select` has chosen; None: there is none."""
    if named := os.environ.get("NATS_CONTEXT"):
        return named
    try:
        return (_folder() / "context.txt").read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError, RuntimeError):  # RuntimeError: this user has no home
        return None


def read_context(name: str) -> dict[str, Any]:
    """The keys of the `nats` section that a context gives. ConfigError: there is no such context, or it asks for what is not supported."""
    if "/" in name or name.startswith("."):
        raise ConfigError(f"{name!r} is no name of a context: `nats context ls` lists them")
    path = Path("context") / f"{name}.json"
    try:
        path = _folder() / path
        said = orjson.loads(path.read_bytes())
    except RuntimeError:
        raise ConfigError("this user has no home, and so no NATS contexts: set XDG_CONFIG_HOME") from None
    except OSError as error:
        raise ConfigError(f"there is no NATS context {name} ({path}: {error.strerror}): `nats context ls` lists them") from None
    except orjson.JSONDecodeError:
        raise ConfigError(f"{path} is no NATS context: it does not read as JSON") from None
    if not isinstance(said, dict):
        raise ConfigError(f"{path} is no NATS context: it is no JSON object")
    for key in _NEEDED:
        if said.get(key):
            raise ConfigError(f"the NATS context {name} has {key}, which is not supported here: give --nats and a file of credentials")
    values = {ours: said[theirs] for theirs, ours in _KEYS.items() if said.get(theirs)}
    if said.get("url"):
        values["urls"] = server_urls(str(said["url"]))
    return values


def server_urls(text: str) -> tuple[str, ...]:
    """Servers as the `nats` command takes them too: comma separated, where HOST:PORT is nats://HOST:PORT."""
    return tuple(url if "://" in url else f"nats://{url}" for part in text.split(",") if (url := part.strip()))


def _folder() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "nats"
