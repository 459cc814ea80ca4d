"""`mesh nats`: users of NATS with the rights of their roles, the configuration of a server that knows them, and backups of JetStream."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.commands.connection import add_connection_arguments, bus_options
from mesh.commands.progress import progress_bar
from mesh.errors import BadRequest, ConfigError

if TYPE_CHECKING:
    from mesh.pki.server import ServerOptions, TlsFiles
    from mesh.protocol.roles import Role
    from mesh.types import LayerRange

__all__ = ["add_parser"]

_DESCRIPTION = """\
Users and server configuration from the subjects of the mesh: each role may do what it needs, and nothing else. docs/security.md has the
table of roles and the steps."""

_USERS = """\
Make users, each with a key pair: NAME.nk is its seed (mode 0600), for that process alone. Without a name there is one of each role. A shard
may be bound to its name (--shard) and to a range of layers (--layers): then it hears no other shard's requests and frames."""

_CONFIG = """\
Write the configuration of a nats-server with those users. A listener that other machines can reach takes TLS, and asks clients for a
certificate (--pki, made by `mesh pki`, or --cert, --key and --ca of your own authority)."""

_BACKUP = """\
Write JetStream's streams into a folder: batches and their results, models, claims, events. Leases and the records of running sessions are
left out: they are said anew. Connect as an operator. The folder holds requests and answers, so keep it as you keep those."""

_RESTORE = """\
Bring the streams of a folder back, after all of JetStream's data was lost. Streams that are there and empty make room, events that are
there stay, and other streams with messages are replaced only with --replace. Coordinators and shards may run meanwhile. Connect as an
operator."""

_ROLES = ("coordinator", "shard", "gateway", "client", "monitor", "provisioner", "operator", "system")


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("nats", help="users and configuration of NATS servers, by role", description=_DESCRIPTION)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    users = actions.add_parser("users", help="make users with keys", description=_USERS)
    users.add_argument("name", nargs="?", metavar="NAME", help="of one user (default: the shard's name, else one of each role)")
    users.add_argument("--role", choices=_ROLES, help="of that user")
    users.add_argument("--shard", metavar="SHARD", help="the shard that it is, such as shard-1")
    users.add_argument("--layers", metavar="A-B", help="the only range that this shard serves, such as 0-10")
    users.add_argument("--mirror", action="store_true", help="this shard mirrors the other replicas of its range")
    users.add_argument("--replace", action="store_true", help="a new key for a user that is there")
    users.set_defaults(run=users_command)
    config = actions.add_parser("config", help="write the configuration of a server", description=_CONFIG)
    config.add_argument("--out", type=Path, metavar="FILE", help="the file (default: standard output)")
    config.add_argument("--replace", action="store_true", help="replace the file if it is there")
    config.add_argument("--name", default="mesh", help="of the server (default mesh)")
    config.add_argument("--listen", default="127.0.0.1:4222", metavar="HOST:PORT", help="where clients connect (default 127.0.0.1:4222)")
    config.add_argument("--pki", type=Path, metavar="DIR", help="folder of `mesh pki` with the certificate --server")
    config.add_argument("--server", default="server", metavar="NAME", help="the certificate in that folder (default server)")
    config.add_argument("--cert", type=Path, metavar="FILE", help="the server's certificate, of your own authority")
    config.add_argument("--key", type=Path, metavar="FILE", help="its private key")
    config.add_argument("--ca", type=Path, metavar="FILE", help="the authority that signs the certificates of clients")
    config.add_argument("--there", action="store_true", help="these files lie on the server's machine: they are not looked for here")
    config.add_argument("--store", default="./jetstream", metavar="DIR", help="JetStream's folder (default ./jetstream)")
    config.add_argument("--sync-interval", metavar="TIME", help="how long JetStream may wait before it writes to the disk, or `always`")
    config.add_argument("--max-file", default="100GB", metavar="SIZE", help="the most that JetStream keeps on the disk (default 100GB)")
    config.add_argument("--monitor", metavar="HOST:PORT", help="where the server says how it is (/healthz, /varz); not encrypted")
    config.add_argument("--lame-duck", metavar="TIME", help="how long a server that is to stop moves its clients to the others")
    config.add_argument("--cluster", metavar="HOST:PORT", help="where the other servers of the cluster connect")
    config.add_argument("--routes", default="", metavar="URL,...", help="the servers of the cluster, such as nats://a:6222,nats://b:6222")
    config.set_defaults(run=config_command)
    rights = actions.add_parser("rights", help="print the subjects of a role as JSON, for other tools (nsc)", description=_DESCRIPTION)
    rights.add_argument("role", choices=_ROLES, help="whose")
    rights.add_argument("--name", metavar="NAME", help="of the user, for its inboxes (default: the role)")
    rights.add_argument("--shard", metavar="SHARD", help="as for users")
    rights.add_argument("--layers", metavar="A-B", help="as for users")
    rights.add_argument("--mirror", action="store_true", help="as for users")
    rights.set_defaults(run=rights_command)
    backup = actions.add_parser("backup", help="write JetStream's streams into a folder", description=_BACKUP)
    backup.add_argument("--without-models", action="store_true", help="leave out the models, which can be pushed again")
    backup.set_defaults(run=backup_command)
    restore = actions.add_parser("restore", help="bring JetStream's streams back", description=_RESTORE)
    restore.add_argument("--replace", action="store_true", help="lose what is in the streams that are there")
    restore.set_defaults(run=restore_command)
    for action in (backup, restore):
        action.add_argument("into", metavar="DIR", type=Path, help="the folder of the backup")
        action.add_argument("--quiet", action="store_true", help="no progress bar")
        add_connection_arguments(action)
    for action in (users, config):
        action.add_argument("--folder", type=Path, default=Path("users"), metavar="DIR", help="folder of the users (default ./users)")


def users_command(args: argparse.Namespace) -> int:
    from mesh.pki.users import UserFolder
    from mesh.protocol.roles import ROLES

    folder = UserFolder(args.folder)
    name = args.name or args.shard
    if name is None:
        if args.role is not None or args.layers is not None or args.mirror or args.replace:
            raise BadRequest("--role, --layers, --mirror and --replace are of one user: give its name", field="name")
        there = {user.name for user in folder.users()}
        made = [folder.add(role, role) for role in ROLES if role not in there]
    else:
        role: Role | None = args.role or ("shard" if args.shard is not None else None)
        if role is None:
            raise BadRequest(f"give the role of {name} with --role", field="role")
        layers = _layers(args.layers)
        made = [folder.add(name, role, shard=args.shard, layers=layers, mirror=args.mirror, replace=args.replace)]
    for user in made:
        print(f"{user.name} ({user.role}): --nats-nkey {folder.seed(user.name)} --nats-inbox-prefix {user.inbox}")
    if made:
        print("give the server its configuration anew: `mesh nats config --out nats.conf --replace`, and reload it", file=sys.stderr)
    return 0


def config_command(args: argparse.Namespace) -> int:
    from mesh.pki.private import write_file
    from mesh.pki.server import server_config
    from mesh.pki.users import UserFolder

    users = UserFolder(args.folder).users()
    if not users:
        raise ConfigError(f"{args.folder} has no users: make them with `mesh nats users`")
    text = server_config(_server(args), users)
    if args.out is None:
        sys.stdout.write(text)
        return 0
    if args.out.exists() and not args.replace:
        raise ConfigError(f"{args.out} is there already: nothing was written. Give --replace")
    write_file(args.out.absolute(), text.encode(), secret=False)
    print(f"{args.out}: {len(users)} users. nats-server -c {args.out}", file=sys.stderr)
    return 0


def rights_command(args: argparse.Namespace) -> int:
    import orjson

    from mesh.protocol.rights import Binding, inbox_prefix, rights_of

    if args.layers is not None and args.shard is None:
        raise BadRequest("layers are of one shard: give its name with --shard", field="layers")
    bound = Binding(inbox_prefix(args.name or args.shard or args.role), args.shard, _layers(args.layers), args.mirror)
    sys.stdout.buffer.write(orjson.dumps(rights_of(args.role, bound), option=orjson.OPT_INDENT_2) + b"\n")
    return 0


def backup_command(args: argparse.Namespace) -> int:
    from mesh.bus import Bus
    from mesh.bus.backup import save_streams
    from mesh.settings.units import format_bytes

    async def work() -> None:
        async with await Bus.connect(bus_options(args), name="mesh-backup") as bus:
            with progress_bar(quiet=args.quiet) as progress:
                backup = await save_streams(bus, args.into, models=not args.without_models, progress=progress)
        for stream in backup.streams:
            print(f"{stream.name}: {stream.messages} messages, {format_bytes(stream.bytes)}")

    asyncio.run(work())
    return 0


def restore_command(args: argparse.Namespace) -> int:
    from mesh.bus import Bus
    from mesh.bus.backup import restore_streams

    async def work() -> None:
        async with await Bus.connect(bus_options(args), name="mesh-restore") as bus:
            with progress_bar(quiet=args.quiet) as progress:
                names = await restore_streams(bus, args.into, replace=args.replace, progress=progress)
        print(f"restored {', '.join(names)}")

    asyncio.run(work())
    return 0


def _server(args: argparse.Namespace) -> ServerOptions:
    from mesh.pki.server import Cluster, ServerOptions

    host, _, port = args.listen.rpartition(":")
    if not host or not port.isdigit():
        raise BadRequest(f"--listen {args.listen}: give HOST:PORT", field="listen")
    routes = tuple(route.strip() for route in args.routes.split(",") if route.strip())
    cluster = None if args.cluster is None else Cluster("mesh", args.cluster, routes)
    return ServerOptions(
        args.name,
        host.strip("[]"),
        int(port),
        _tls(args),
        args.store,
        max_file=args.max_file,
        sync_interval=args.sync_interval,
        cluster=cluster,
        monitor=args.monitor,
        lame_duck=args.lame_duck,
    )


def _tls(args: argparse.Namespace) -> TlsFiles | None:
    from mesh.pki.folder import PkiFolder
    from mesh.pki.server import TlsFiles

    given = (args.cert, args.key, args.ca)
    if args.pki is not None:
        if any(given):
            raise ConfigError("--pki and --cert, --key, --ca say the same: give one or the other")
        pki = PkiFolder(args.pki)
        given = (pki.certificate(args.server), pki.key(args.server), pki.ca)
    if not any(given):
        return None
    if not all(given):
        raise ConfigError("--cert, --key and --ca belong together: give all three")
    for file in given:
        if args.there and not file.is_absolute():
            raise ConfigError(f"{file}: with --there give the whole path on the server's machine, such as /etc/mesh-nats/{file.name}")
        if not args.there and not file.is_file():
            raise ConfigError(
                f"{file} is not there: make it with `mesh pki init` and `mesh pki issue {args.server} --kind server --host HOST`"
            )
    return TlsFiles(*(file.absolute() for file in given))


def _layers(text: str | None) -> LayerRange | None:
    from mesh.planner.from_config import parse_range

    return None if text is None else parse_range(text)
