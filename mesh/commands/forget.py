"""`mesh forget`: remove what the mesh still has of a shard that is gone."""

from __future__ import annotations

import argparse
import asyncio
from typing import Any

from mesh.commands.connection import add_connection_arguments, bus_options

__all__ = ["add_forget_parser"]

_DESCRIPTION = """\
Remove the lease of a shard that is gone, and its claim to a range of layers. A shard that is alive is refused, because it would be back
within a second: stop it with `mesh drain`."""


def add_forget_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("forget", help="remove what is left of a shard that is gone", description=_DESCRIPTION)
    parser.add_argument("shard", metavar="SHARD", help="its name, such as shard-1, or its shard_id")
    parser.add_argument("--force", action="store_true", help="even if it is still connected")
    add_connection_arguments(parser)
    parser.set_defaults(run=forget_command)


def forget_command(args: argparse.Namespace) -> int:
    from mesh.bus import Bus
    from mesh.protocol.subjects import check_token
    from mesh.shard.forget import forget

    name = check_token(f"shard-{args.shard}" if args.shard.isdigit() else args.shard, "shard")

    async def work() -> None:
        async with await Bus.connect(bus_options(args), name="mesh-forget") as bus:
            gone = await forget(bus, name, force=args.force)
        what = [] if gone.lease is None else [f"its lease of layers {gone.lease.layers} of {gone.lease.model}"]
        what += [f"its claim to layers of {model}" for model in gone.claims]
        print(f"{name} is forgotten: {', '.join(what) or 'a lease of another version'}")

    asyncio.run(work())
    return 0
