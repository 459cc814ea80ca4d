"""`mesh usage`: what each subject has used at the gateways."""

from __future__ import annotations

import argparse
import sys
from datetime import datetime
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from mesh.client import MeshClient
from mesh.commands.connection import add_connection_arguments, bus_options

__all__ = ["add_parser", "run_command"]

_DESCRIPTION = """\
Show what each subject (the holder of tokens and API keys) has used at all gateways that run: requests, tokens of prompts and answers,
generations that run now, and calls that a limit has refused. Each gateway counts from its start on."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("usage", help="what each subject has used over HTTP", description=_DESCRIPTION)
    parser.add_argument("--subject", metavar="NAME", help="only this subject")
    parser.add_argument("--json", action="store_true", help="print one object {gateways, since_unix_s, omitted, subjects}")
    add_connection_arguments(parser)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Exit code 0 if a gateway has answered, 1 otherwise."""
    with MeshClient(options=bus_options(args)) as client:
        found = client.usage(args.subject)
    if args.json:
        sys.stdout.buffer.write(orjson.dumps(found.document()) + b"\n")
        return 0 if found.gateways else 1
    console = Console()
    if found.since_unix_s is None:
        console.print("no gateway answers")
        return 1
    table = Table(box=None)
    table.add_column("subject")
    for name in ("requests", "prompt tokens", "answer tokens", "batch requests", "batch tokens", "refused", "running"):
        table.add_column(name, justify="right")
    for each in found.subjects:
        values = (each.requests, each.prompt_tokens, each.completion_tokens, each.batch_requests, each.batch_tokens, each.refused)
        table.add_row(each.subject, *(f"{value:,}" for value in (*values, each.sessions)))
    console.print(table)
    since = datetime.fromtimestamp(found.since_unix_s).astimezone().isoformat(timespec="seconds")
    console.print(f"{found.gateways} gateways, since {since}" + (f"; {found.omitted:,} subjects are not shown" if found.omitted else ""))
    return 0
