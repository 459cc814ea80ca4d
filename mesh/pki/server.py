"""The configuration of a nats-server for a mesh: TLS, JetStream, and users with the rights of their roles.

The account MESH has the mesh; the account SYS has the servers' own reports, of which coordinators hear one: that a connection has ended.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mesh.errors import BadRequest, ConfigError
from mesh.pki.users import User
from mesh.protocol.rights import Rights
from mesh.protocol.roles import ROLES
from mesh.settings.units import parse_seconds

__all__ = ["Cluster", "ServerOptions", "TlsFiles", "accounts_with_passwords", "server_config"]

MAX_ANSWERS: Final = 1
LEAST_LAME_DUCK_S: Final = 30
ANSWER_WITHIN: Final = "30m"
"""How long a shard may take to answer: loading another range waits for its sessions to end."""

_COMMON: Final = """\
# A frame of 256 prompt tokens is 256 * hidden size * 4 bytes; coordinators size their prefill chunks to this.
max_payload: 8MB
write_deadline: "10s"
max_pending: 128MB
ping_interval: "5s"
ping_max: 2
"""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. `ca`: who signs the certificates of the other side."""

    cert: Path
    key: Path
    ca: Path


@dataclass(frozen=True, slots=True)
class Cluster:
    """`listen`: HOST:PORT for the other servers. `routes`: their addresses."""

    name: str
    listen: str
    routes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """`tls`: required where `host` or the cluster's is not loopback; each side then shows a certificate. `store`: JetStream's folder.
    `sync_interval`: how long JetStream may wait before it writes to the disk; "always" is before each answer. `monitor`: HOST:PORT of its
    health and figures over plain HTTP. `lame_duck`: the time in which a server that is to stop gives its clients to the others."""

    name: str = "mesh"
    host: str = "127.0.0.1"
    port: int = 4222
    tls: TlsFiles | None = None
    store: str = "./jetstream"
    max_file: str = "100GB"
    max_memory: str = "256MB"
    sync_interval: str | None = None
    cluster: Cluster | None = None
    monitor: str | None = None
    lame_duck: str | None = None


def server_config(options: ServerOptions, users: Sequence[User]) -> str:
    """The text of the file. ConfigError: others could reach the server without TLS. BadRequest: a value is wrong."""
    _require_tls(options)
    if options.sync_interval not in (None, "always"):
        parse_seconds(str(options.sync_interval))
    parts = [
        "# Made by `mesh nats config`: make it again rather than change it. `nats-server --signal reload` takes a new one.\n",
        f"server_name: {_text(options.name)}\nlisten: {_text(_address(options.host, options.port))}\n\n{_COMMON}",
        _jetstream(options),
    ]
    if options.monitor is not None:
        parts.append(f"http: {_text(options.monitor)}\n")
    if options.lame_duck is not None:
        parts.append(_lame_duck(options.lame_duck))
    if options.tls is not None:
        parts.append(_tls(options.tls))
    if options.cluster is not None:
        routes = ", ".join(_text(route) for route in options.cluster.routes)
        inner = f"  name: {_text(options.cluster.name)}\n  listen: {_text(options.cluster.listen)}\n  routes: [{routes}]\n"
        parts.append(f"cluster {{\n{inner}{'' if options.tls is None else _indented(_tls(options.tls))}}}\n")
    parts.append(_accounts([(f"nkey: {user.public}", user) for user in users]))
    return "\n".join(parts)


def accounts_with_passwords() -> str:
    """nats/accounts.conf: one user for each role, whose password comes from the environment of nats-server."""
    head = """\
# One account for the mesh, one user for each role, and no more than each needs. Included by secure.conf.
#
# Made by `python -m mesh.pki.server` from mesh/protocol/rights.py; a test compares them. Passwords come from the environment of
# nats-server. Each role has an inbox of its own (nats.inbox_prefix or --nats-inbox-prefix: _INBOX.ROLE), so that none can listen to the
# answers of another role. `mesh nats users` makes users with keys instead of passwords, as many as there are processes.

"""
    users = [(f"user: {role}, password: $MESH_{role.upper()}_PASSWORD", User(role, role, "")) for role in ROLES]
    return head + _accounts(users)


def _accounts(users: Sequence[tuple[str, User]]) -> str:
    mesh = "".join(_user(who, user) for who, user in users if user.role != "system")
    system = "".join(f"      {{ {who} }}\n" for who, user in users if user.role == "system")
    return f"""\
accounts {{
  SYS {{
    exports: [ {{ stream: "$SYS.ACCOUNT.*.DISCONNECT", account_token_position: 3 }} ]
    users: [
{system}    ]
  }}
  MESH {{
    jetstream: enabled
    imports: [ {{ stream: {{ account: SYS, subject: "$SYS.ACCOUNT.MESH.DISCONNECT" }} }} ]
    users: [
{mesh}    ]
  }}
}}
system_account: SYS
"""


def _user(who: str, user: User) -> str:
    if user.role == "operator":
        return f"      {{ {who} }}  # {user.name}: everything in this account\n"
    rights: Rights = user.rights
    lines = [f"      # {user.name}\n      {{\n        {who}\n        permissions {{\n"]
    for key, subjects in (("subscribe", rights.subscribe), ("publish", rights.publish)):
        lines.append(f"          {key}: [\n" + "".join(f"            {_text(subject)}\n" for subject in subjects) + "          ]\n")
    if rights.answers:
        lines.append(f'          allow_responses: {{ max: {MAX_ANSWERS}, expires: "{ANSWER_WITHIN}" }}\n')
    return "".join([*lines, "        }\n      }\n"])


def _jetstream(options: ServerOptions) -> str:
    sync = "" if options.sync_interval is None else f"  sync_interval: {_text(options.sync_interval)}\n"
    return (
        f"jetstream {{\n  store_dir: {_text(options.store)}\n  max_memory_store: {options.max_memory}\n"
        f"  max_file_store: {options.max_file}\n{sync}}}\n"
    )


def _lame_duck(time: str) -> str:
    if parse_seconds(time) < LEAST_LAME_DUCK_S:
        raise ConfigError(f"a lame duck of {time}: nats-server takes {LEAST_LAME_DUCK_S} s or more; it ends sooner where few are connected")
    return f'lame_duck_duration: {_text(time)}\nlame_duck_grace_period: "2s"  # so long its clients may leave by themselves\n'


def _tls(files: TlsFiles) -> str:
    return (
        f"tls {{\n  cert_file: {_text(str(files.cert))}\n  key_file: {_text(str(files.key))}\n  ca_file: {_text(str(files.ca))}\n"
        "  verify: true  # the other side shows a certificate as well\n  timeout: 5\n}\n"
    )


def _require_tls(options: ServerOptions) -> None:
    open_to_others = [options.host] if not _is_loopback(options.host) else []
    if options.cluster is not None and not _is_loopback(options.cluster.listen.rpartition(":")[0]):
        open_to_others.append(options.cluster.listen)
    if open_to_others and options.tls is None:
        raise ConfigError(
            f"{' and '.join(open_to_others)} can be reached from other machines, which takes TLS: make certificates with "
            "`mesh pki init` and `mesh pki issue`, and give --pki FOLDER"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _address(host: str, port: int) -> str:
    if not 0 < port <= 65535 and port != -1:
        raise BadRequest(f"port {port}: give 1 to 65535", field="port")
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _text(value: str) -> str:
    """A quoted text of the configuration. BadRequest: it has characters that no name, path or address needs."""
    if any(character in value for character in '"\n\r\\') or not value.isprintable():
        raise BadRequest(f"{value!r}: quotes, backslashes and line ends cannot stand in a server's configuration", field="value")
    return json.dumps(value, ensure_ascii=False)


def _indented(text: str) -> str:
    return "".join(f"  {line}\n" for line in text.splitlines())


if __name__ == "__main__":
    print(accounts_with_passwords(), end="")
