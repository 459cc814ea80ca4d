"""Where NATS is, and which user connects."""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mesh.errors import ConfigError
from mesh.settings.defaults import DEFAULT_INBOX_PREFIX, DEFAULT_NATS_URL

__all__ = ["BusOptions", "without_password"]


@dataclass(frozen=True, slots=True)
class BusOptions:
    """The servers, and the user that connects. `credentials`: a .creds file (JWT and seed). `nkey_seed`: a file with a seed. `tls_*`: PEM
    files; with `tls_ca` alone the server's certificate is checked, with `tls_cert` and `tls_key` this side shows one as well.
    `inbox_prefix`: the subjects on which answers come back."""

    urls: tuple[str, ...] = (DEFAULT_NATS_URL,)
    credentials: str | None = None
    nkey_seed: str | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    tls_ca: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    inbox_prefix: str = DEFAULT_INBOX_PREFIX

    @property
    def wants_tls(self) -> bool:
        """Whether this side talks over TLS alone. A WebSocket has its TLS below NATS."""
        return (self.tls_ca is not None or self.tls_cert is not None or any(url.startswith("tls://") for url in self.urls)) and not any(
            url.startswith("ws") for url in self.urls
        )

    def ssl_context(self) -> ssl.SSLContext | None:
        """The TLS context of the connection; None: a tls:// server is checked against the system's authorities. ConfigError: a file is
        wrong."""
        if self.tls_ca is None and self.tls_cert is None:
            return None
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("a TLS certificate and its key belong together: give both or neither")
        for path, what in ((self.tls_ca, "the authority's certificate"), (self.tls_cert, "a certificate"), (self.tls_key, "a key")):
            if path is not None:
                _require_readable(path, f"a PEM file with {what}")
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH)
        try:
            if self.tls_ca is not None:
                context = ssl.create_default_context(cafile=self.tls_ca)
        except ssl.SSLError:
            raise ConfigError(f"{self.tls_ca}: no certificate in it: give the PEM file of the authority that signed the server's") from None
        try:
            if self.tls_cert is not None:
                context.load_cert_chain(self.tls_cert, self.tls_key, password=_no_passphrase)
        except ssl.SSLError:
            raise ConfigError(
                f"{self.tls_cert} and {self.tls_key} are not a certificate and its own, unencrypted key in PEM form"
            ) from None
        return context

    def arguments(self) -> dict[str, Any]:
        """The arguments for nats-py. ConfigError: a file does not exist."""
        if self.credentials is not None:
            _require_readable(self.credentials, "a .creds file")
        if self.nkey_seed is not None:
            _require_readable(self.nkey_seed, "a file with an nkey seed")
        return {
            "servers": list(self.urls),
            "tls": self.ssl_context(),
            "user": self.user,
            "password": self.password,
            "token": self.token,
            "user_credentials": self.credentials,
            "nkeys_seed": self.nkey_seed,
            "inbox_prefix": self.inbox_prefix,
        }


def _require_readable(path: str, what: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: give the path of {what}") from None


def _no_passphrase() -> str:
    """The passphrase callback for encrypted keys: without it OpenSSL would ask on the terminal."""
    return ""


def without_password(url: str) -> str:
    """A server's address without its password, for messages."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
