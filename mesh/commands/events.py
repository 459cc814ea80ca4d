"""`mesh events`: what happened in the mesh."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from datetime import datetime
from typing import Any

from mesh.commands.connection import add_connection_arguments, bus_options
from mesh.settings.units import parse_seconds

__all__ = ["add_events_parser"]

_DESCRIPTION = """\
Show what happened in the mesh: which shards and coordinators joined, became ready, drained, left or were suspected, and which sessions
moved. The NATS server keeps a week of it."""


def add_events_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("events", help="what happened in the mesh", description=_DESCRIPTION)
    parser.add_argument("--last", type=int, default=50, metavar="N", help="show the last N (default 50; 0 with --follow: only new ones)")
    parser.add_argument("--since", metavar="TIME", help="show those of the last TIME instead, such as 90s, 15m or 2h")
    parser.add_argument("--follow", "-f", action="store_true", help="then show new ones, until Ctrl-C")
    parser.add_argument("--json", action="store_true", help="one object a line")
    add_connection_arguments(parser)
    parser.set_defaults(run=events_command)


def events_command(args: argparse.Namespace) -> int:
    from mesh.client import AsyncMeshClient
    from mesh.errors import BadRequest

    if args.last < 0:
        raise BadRequest(f"--last {args.last}: give 0 or more", field="last")
    since = None if args.since is None else time.time() - parse_seconds(args.since)

    async def work() -> None:
        async with AsyncMeshClient(options=bus_options(args)) as client:
            async for event in client.events(last=args.last, since_unix_s=since, follow=args.follow):
                if args.json:
                    sys.stdout.buffer.write(event.to_bytes() + b"\n")
                    sys.stdout.buffer.flush()
                else:
                    at = datetime.fromtimestamp(event.at_unix_s).strftime("%Y-%m-%d %H:%M:%S")
                    print(f"{at}  {event.kind.replace('_', ' '):18}  {event.who:20}  {event.model}  {event.detail}".rstrip(), flush=True)

    asyncio.run(work())
    return 0
