"""`mesh doctor`: what is well, what is not, and what to do."""

from __future__ import annotations

import argparse
import asyncio
import sys
from typing import TYPE_CHECKING, Any

import orjson
from rich.console import Console
from rich.text import Text

from mesh.commands.connection import bus_options
from mesh.commands.generate import add_mesh_arguments
from mesh.settings.defaults import DEFAULT_HTTP_PORT, DEFAULT_NATS_URL

if TYPE_CHECKING:
    from mesh.bus import BusOptions
    from mesh.doctor import DoctorOptions, Finding
    from mesh.protocol.rights import Binding

__all__ = ["add_parser", "run_command"]

_DESCRIPTION = """\
Look at this machine, at the NATS servers and at the mesh, and say what is well, what is not, and what to do. Every subject that the role
needs is tried, and one token goes through every replica of every layer range. No mesh has to run: then this machine alone is looked at.

Exit code 0: no error (there may be warnings); 1: something is wrong; 2: no NATS server can be reached."""

_MARKS = {"ok": ("ok", "green"), "skipped": ("--", "dim"), "warning": ("!!", "yellow"), "error": ("XX", "red")}


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="what is well, what is not, and what to do",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_mesh_arguments(parser)
    parser.add_argument(
        "--role",
        choices=("client", "gateway", "coordinator", "shard", "monitor", "provisioner", "operator"),
        help="whose subjects are tried (default: that of the user's name, else operator)",
    )
    parser.add_argument("--shard", metavar="SHARD", help="with --role shard: the name to which this user is bound")
    parser.add_argument("--layers", metavar="A-B", help="with --shard: the range to which this user is bound")
    parser.add_argument("--nats-monitor", metavar="URL", help="monitoring address of nats-server, such as http://127.0.0.1:8222")
    parser.add_argument(
        "--http-port", type=int, default=DEFAULT_HTTP_PORT, metavar="PORT", help="port that HTTP would take here (default 8080)"
    )
    parser.add_argument("--no-generate", action="store_true", help="send no token through the mesh")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="SECONDS", help="the longest wait for a token (default 30)")
    parser.add_argument("--json", action="store_true", help="print one object {well, findings}")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Exit code: see the description."""
    from mesh.doctor import DoctorOptions

    connection = _connection(args)
    role = args.role or _role(connection)
    options = DoctorOptions(
        connection,
        role,
        model=args.model,
        http_port=args.http_port,
        monitor=args.nats_monitor,
        generate=not args.no_generate,
        step_timeout_s=args.timeout,
        bound=_bound(args),
    )
    findings, reached = asyncio.run(_examine(options, show=not args.json))
    if args.json:
        found = [{"section": section, **finding.document()} for section, finding in findings]
        well = all(finding.level != "error" for _, finding in findings)
        sys.stdout.buffer.write(orjson.dumps({"well": well, "findings": found}, option=orjson.OPT_INDENT_2) + b"\n")
    if not reached:
        return 2
    return 1 if any(finding.level == "error" for _, finding in findings) else 0


def _connection(args: argparse.Namespace) -> BusOptions | None:
    """None: no server was named, and none is known on this machine."""
    from mesh.bus import BusOptions
    from mesh.local.running import running_mesh

    options = bus_options(args)
    named = args.nats or options.urls != (DEFAULT_NATS_URL,) or running_mesh() is not None
    return options if named or _listens(BusOptions().urls[0]) else None


def _listens(url: str) -> bool:
    """Whether some program listens there, on this machine."""
    import socket
    from urllib.parse import urlsplit

    at = urlsplit(url)
    try:
        socket.create_connection((at.hostname or "127.0.0.1", at.port or 4222), 0.5).close()
    except OSError:
        return False
    return True


def _role(connection: BusOptions | None) -> Any:
    from mesh.doctor.needs import ROLES

    user = None if connection is None else connection.user or connection.inbox_prefix.rpartition(".")[2]
    return next((role for role in ROLES if user == role or str(user).startswith(f"{role}-")), "operator")


def _bound(args: argparse.Namespace) -> Binding:
    from mesh.planner.from_config import parse_range
    from mesh.protocol.rights import Binding

    return Binding(shard=args.shard, layers=None if args.layers is None else parse_range(args.layers))


async def _examine(options: DoctorOptions, *, show: bool) -> tuple[list[tuple[str, Finding]], bool]:
    """Every finding with its section, shown as they come; and whether a NATS server was reached."""
    from mesh.doctor import examine

    console, progress = Console(highlight=False), Console(stderr=True)
    found: list[tuple[str, Finding]] = []
    with progress.status("looking at this machine") as status:
        async for section, finding in examine(options):
            if finding is None:
                status.update(f"looking at {section}")
                if show:
                    console.print(Text(("\n" if found else "") + section, style="bold"))
                continue
            found.append((section, finding))
            if show:
                _print(console, finding)
    if show:
        _summary(console, [finding for _, finding in found])
    return found, any(section == "permissions" for section, _ in found)


def _print(console: Console, finding: Finding) -> None:
    mark, style = _MARKS[finding.level]
    console.print(Text.assemble("  ", (mark, style), f" {finding.check}: {finding.found}"), soft_wrap=True)
    if finding.advice:
        console.print(Text.assemble("     ", ("-> ", style), finding.advice), soft_wrap=True)


def _summary(console: Console, findings: list[Finding]) -> None:
    counts = {level: sum(finding.level == level for finding in findings) for level in _MARKS}
    text = f"{counts['error']} errors, {counts['warning']} warnings, {counts['ok']} well, {counts['skipped']} not looked at"
    style = "red" if counts["error"] else "yellow" if counts["warning"] else "green"
    console.print(Text("\n" + text, style=style))
