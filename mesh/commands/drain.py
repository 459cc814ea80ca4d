"""`mesh drain`."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from mesh.commands.connection import add_connection_arguments, bus_options
from mesh.units import parse_seconds

__all__ = ["add_drain_parser"]


def add_drain_parser(subparsers: Any) -> None:
    text = "Let a shard take no new sessions, wait until its open ones have ended or moved, and stop it."
    parser = subparsers.add_parser("drain", help="stop a shard without losing a session", description=text)
    parser.add_argument("shard", metavar="SHARD", help="its name, such as shard-1, or its shard_id")
    parser.add_argument("--timeout", default="30s", metavar="TIME", help="stop after this long in any case (default 30s)")
    parser.add_argument("--keep", action="store_true", help="leave it running when it is empty")
    add_connection_arguments(parser)
    parser.set_defaults(run=drain_command)


def drain_command(args: argparse.Namespace) -> int:
    from mesh import subjects
    from mesh.bus import Bus
    from mesh.messages import Drain, Drained

    name = f"shard-{args.shard}" if args.shard.isdigit() else args.shard
    message = Drain(timeout_s=parse_seconds(args.timeout), stop=not args.keep)

    async def work() -> None:
        async with await Bus.connect(bus_options(args), name="mesh-drain") as bus:
            drained = await bus.request(subjects.control(name, "drain"), message, Drained, timeout_s=10)
        then = "it stays" if args.keep else "then it stops"
        print(f"{drained.shard} is draining {drained.sessions} sessions, for {args.timeout} at most; {then}")

    asyncio.run(work())
    return 0
