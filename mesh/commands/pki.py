"""`mesh pki`: a private authority, and the certificates of servers and clients."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mesh.pki.folder import PkiFolder

__all__ = ["add_parser"]

_DESCRIPTION = """\
A private authority in a folder (--folder), and certificates that it signs. Keys have mode 0600, the folder 0700, and no file is replaced
without --replace. Keep ca.key on one machine; the others need ca.crt and their own NAME.crt and NAME.key. The steps: docs/security.md."""

_ROTATE = """\
Issue certificates anew, with new keys. nats-server takes them on `nats-server --signal reload`; shards, coordinators and clients read their
files at each connection. With --ca a new authority is made, which all trust beside the old one; then `rotate`; then `rotate --finish`. Give
the files out and reload the servers after each of the three."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("pki", help="certificates: a private authority, issue, rotate, show", description=_DESCRIPTION)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    init = actions.add_parser("init", help="make the authority", description=_DESCRIPTION)
    init.add_argument("--name", default="mesh", help="of the authority (default mesh)")
    init.set_defaults(run=init_command)
    issue = actions.add_parser("issue", help="issue a certificate", description=_DESCRIPTION)
    issue.add_argument("name", metavar="NAME", help="of the server or the user; the files are NAME.crt and NAME.key")
    issue.add_argument(
        "--kind", choices=("server", "client", "both"), default="client", help="what it is for (default client); both: a cluster"
    )
    issue.add_argument("--host", action="append", default=[], metavar="HOST,...", help="names and addresses of a server; repeatable")
    issue.add_argument("--replace", action="store_true", help="replace the certificate and key of this name")
    issue.set_defaults(run=issue_command)
    rotate = actions.add_parser("rotate", help="renew certificates, or the authority", description=_ROTATE)
    rotate.add_argument("names", nargs="*", metavar="NAME", help="which (default: all)")
    step = rotate.add_mutually_exclusive_group()
    step.add_argument("--ca", action="store_true", help="make a new authority beside the present one")
    step.add_argument("--finish", action="store_true", help="trust the new authority alone")
    rotate.set_defaults(run=rotate_command)
    show = actions.add_parser("show", help="what expires when, and what to do; exit code 1 if one has expired", description=_DESCRIPTION)
    show.add_argument("--json", action="store_true", help="print a list of objects")
    show.set_defaults(run=show_command)
    for action in (init, issue, rotate, show):
        action.add_argument("--folder", type=Path, default=Path("pki"), metavar="DIR", help="the authority's folder (default ./pki)")
    init.add_argument("--days", type=int, metavar="N", help="how long it lasts (default 3650)")
    issue.add_argument("--days", type=int, metavar="N", help="how long it lasts (default 90)")
    rotate.add_argument("--days", type=int, metavar="N", help="how long they last (default: as long as before)")


def init_command(args: argparse.Namespace) -> int:
    from mesh.pki.certificates import AUTHORITY_DAYS

    folder = _folder(args)
    folder.init(name=args.name, days=args.days or AUTHORITY_DAYS)
    print(f"{folder.ca}: what every process trusts\n{folder.key('ca')}: keep it on this machine alone", file=sys.stderr)
    return 0


def issue_command(args: argparse.Namespace) -> int:
    from mesh.pki.certificates import LEAF_DAYS

    folder = _folder(args)
    hosts = [host.strip() for part in args.host for host in part.split(",") if host.strip()]
    days = LEAF_DAYS if args.days is None else args.days
    folder.issue(args.name, kind=args.kind, hosts=hosts, days=days, replace=args.replace)
    print(f"{folder.certificate(args.name)}, {folder.key(args.name)}: a {args.kind} certificate for {days} days", file=sys.stderr)
    return 0


def rotate_command(args: argparse.Namespace) -> int:
    from mesh.errors import BadRequest
    from mesh.pki.certificates import AUTHORITY_DAYS

    folder = _folder(args)
    if args.names and (args.ca or args.finish):
        raise BadRequest("--ca and --finish are of the authority: they take no names", field="names")
    if args.ca:
        folder.new_authority(days=args.days or AUTHORITY_DAYS)
        print(
            f"{folder.ca} has the new authority and the old one: give it out, reload the servers, then `mesh pki rotate`", file=sys.stderr
        )
    elif args.finish:
        folder.finish()
        print(f"{folder.ca} has the new authority alone: give it out, and reload the servers", file=sys.stderr)
    else:
        names = folder.renew(args.names, days=args.days)
        print(f"renewed {', '.join(names) or 'nothing'}: give the files out, and reload the servers", file=sys.stderr)
    return 0


def show_command(args: argparse.Namespace) -> int:
    import orjson

    shown = _folder(args).show()
    if args.json:
        rows = [
            {
                "file": str(one.file),
                "name": one.facts.name,
                "kind": one.facts.kind,
                "hosts": one.facts.hosts,
                "issuer": one.facts.issuer,
                "ends": one.facts.ends,
                "days": round(one.days, 2),
                "advice": one.advice,
            }
            for one in shown
        ]
        sys.stdout.buffer.write(orjson.dumps(rows, option=orjson.OPT_INDENT_2) + b"\n")
    else:
        for one in shown:
            hosts = f" for {', '.join(one.facts.hosts)}" if one.facts.hosts else ""
            print(f"{one.file}: {one.facts.name}, {one.facts.kind}{hosts}, until {one.facts.ends:%Y-%m-%d} ({one.days:.0f} days)")
            if one.advice:
                print(f"  {one.advice}")
    return 1 if any(one.expired for one in shown) else 0


def _folder(args: argparse.Namespace) -> PkiFolder:
    from mesh.pki.folder import PkiFolder

    return PkiFolder(args.folder)
