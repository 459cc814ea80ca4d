"""Which NATS servers a command connects to, and as which user: its flags, over a file's `nats` section, over the environment."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.errors import ConfigError

if TYPE_CHECKING:
    from mesh.bus import BusOptions
    from mesh.settings.schema import NatsSection

__all__ = ["add_connection_arguments", "add_metrics_argument", "bus_options", "repeated_flags"]

# flag -> key of the nats section
_FLAGS = {
    "nats": "urls",
    "nats_creds": "credentials_file",
    "nats_nkey": "nkey_seed_file",
    "nats_user": "user",
    "nats_password_file": "password_file",
    "nats_token_file": "token_file",
    "nats_inbox_prefix": "inbox_prefix",
    "nats_ca": "tls_ca_file",
    "nats_cert": "tls_cert_file",
    "nats_key": "tls_key_file",
}
_WHO = ("credentials_file", "nkey_seed_file", "user", "password", "password_file", "token", "token_file")


def add_connection_arguments(
    parser: argparse.ArgumentParser,
    *,
    nats: str = "NATS servers (default: $MESH_NATS_URLS, else the `mesh up` of this machine, else the context that `nats context select` "
    "has chosen, else nats://127.0.0.1:4222)",
) -> None:
    """Add --nats, with `nats` as its help, and the flags of credentials and TLS."""
    group = parser.add_argument_group("connection", "also from the environment: MESH_NATS_URLS, MESH_NATS_USER, MESH_NATS_PASSWORD ...")
    group.add_argument("--nats", metavar="URL,...", help=nats)
    group.add_argument("--nats-context", metavar="NAME", help="a context of the nats command (default: $NATS_CONTEXT)")
    group.add_argument("--nats-creds", metavar="FILE", help="credentials of a NATS user (.creds)")
    group.add_argument("--nats-nkey", metavar="FILE", help="nkey seed of a NATS user")
    group.add_argument("--nats-user", metavar="NAME", help="with --nats-password-file or $MESH_NATS_PASSWORD")
    group.add_argument("--nats-password-file", metavar="FILE", help="file whose first line is the password of --nats-user")
    group.add_argument("--nats-token-file", metavar="FILE", help="file whose first line is a NATS token")
    group.add_argument("--nats-inbox-prefix", metavar="SUBJECT", help="subjects of answers to requests (default: _INBOX)")
    group.add_argument("--nats-ca", metavar="FILE", help="PEM file of the authority that signed the server's certificate")
    group.add_argument("--nats-cert", metavar="FILE", help="certificate to show to the server, with --nats-key")
    group.add_argument("--nats-key", metavar="FILE", help="private key of --nats-cert")


def add_metrics_argument(parser: argparse.ArgumentParser) -> None:
    """Add --metrics-port."""
    parser.add_argument(
        "--metrics-port",
        type=port,
        metavar="PORT",
        help="port of GET /metrics; 0 is a free one (default: metrics.port, or 9091, or a free one)",
    )


def port(text: str) -> int:
    """A port number of a flag, 0 for a free one."""
    number = int(text)
    if not 0 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port: give 0 to 65535")
    return number


def bus_options(args: argparse.Namespace, section: NatsSection | None = None) -> BusOptions:
    """The connection that the flags give, over a context of the nats command, over `section` (None: over the environment). Where none says
    which servers, it is the `mesh up` that runs on this machine, else the context that is selected. What lets a command into a `mesh up`
    is found in any case. ConfigError: they contradict each other."""
    from pydantic import ValidationError

    from mesh.bus import BusOptions
    from mesh.settings.files import load_environment
    from mesh.settings.schema import ConnectionConfig, NatsSection

    base = section or load_environment(ConnectionConfig).nats
    values = _found(_given(args, {key: getattr(base, key) for key in base.model_fields_set}))
    try:
        made = NatsSection(**values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = "".join(f".{part}" for part in first["loc"])
        raise ConfigError(f"nats{where}: {first['msg'].removeprefix('Value error, ')}") from None
    if made.user is None and (made.password is not None or made.password_file is not None):
        raise ConfigError("nats: a password is of a user: add nats.user, or --nats-user")
    return BusOptions(
        urls=made.urls,
        credentials=_path(made.credentials_file),
        nkey_seed=_path(made.nkey_seed_file),
        user=made.user,
        password=_secret(made.password_file) if made.password is None else made.password.get_secret_value(),
        token=_secret(made.token_file) if made.token is None else made.token.get_secret_value(),
        tls_ca=_path(made.tls_ca_file),
        tls_cert=_path(made.tls_cert_file),
        tls_key=_path(made.tls_key_file),
        inbox_prefix=made.inbox_prefix,
    )


def _given(args: argparse.Namespace, values: dict[str, Any]) -> dict[str, Any]:
    """Keys of the `nats` section: those of the flags, over those of the context that a flag names, over `values`."""
    from mesh.settings.nats_context import read_context, server_urls

    if (name := getattr(args, "nats_context", None)) is not None:
        values = read_context(name)
    given = {key: getattr(args, flag) for flag, key in _FLAGS.items() if getattr(args, flag, None)}
    if given.keys() & {"credentials_file", "nkey_seed_file", "user", "token_file"}:  # another user than the section's
        kept = ("password", "password_file") if given.keys() & {"user"} else ()
        values = {key: value for key, value in values.items() if key not in _WHO or key in kept}
    if "password_file" in given:
        values.pop("password", None)
    if "@" in given.get("urls", ""):
        raise ConfigError("--nats: other users of this machine see a password on a command line: give --nats-user and --nats-password-file")
    if "urls" in given:
        given["urls"] = server_urls(given["urls"])
    return values | given


def _found(values: dict[str, Any]) -> dict[str, Any]:
    """`values`; where they do not say which servers, with those of the `mesh up` of this machine or of the context that is selected; and
    with what lets a command into that `mesh up`."""
    from mesh.local.running import running_mesh
    from mesh.settings.nats_context import read_context, selected_context

    named = None if "NATS_CONTEXT" not in os.environ else selected_context()
    if "urls" not in values and named is None and (running := running_mesh()) is not None:
        values = {**values, "urls": (running.url,)}
    if "urls" not in values and (name := selected_context()) is not None:
        values = {**read_context(name), **values}
    urls = values.get("urls", ())
    if len(urls) == 1 and not any(values.get(key) for key in _WHO) and (running := running_mesh(urls[0])) is not None:
        values = {**running.settings, **values}
    return values


def repeated_flags(args: argparse.Namespace) -> str:
    """The connection flags that were given, to be written behind another command; they begin with a blank."""
    given = [(flag, getattr(args, flag)) for flag in ("nats_context", *_FLAGS) if getattr(args, flag, None)]
    return "".join(f" --{flag.replace('_', '-')} {shlex.quote(str(value))}" for flag, value in given)


def _path(path: str | None) -> str | None:
    return None if path is None else str(Path(path).expanduser())


def _secret(path: str | None) -> str | None:
    """The first line of a file that holds a secret."""
    if path is None:
        return None
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or 'not text'}: give a file whose first line is the secret") from None
    if not lines or not lines[0].strip():
        raise ConfigError(f"{path} is empty: its first line should be the secret")
    return lines[0].strip()
