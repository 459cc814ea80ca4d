"""`mesh top`: `mesh status`, live."""

from __future__ import annotations

import argparse
import time
from typing import Any

from rich.console import Group
from rich.live import Live
from rich.text import Text

from mesh.client import MeshClient
from mesh.commands.generate import add_mesh_arguments, mesh_options
from mesh.commands.status import coordinator_table, shard_table
from mesh.errors import MeshError

__all__ = ["add_parser", "run_command"]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("top", help="who serves what, live", description="Show shards and coordinators until Ctrl-C.")
    add_mesh_arguments(parser)
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="between looks (default 1)")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    before: dict[str, tuple[float, int]] = {}
    with MeshClient(options=mesh_options(args)) as client, Live(screen=True, auto_refresh=False) as live:
        while True:
            try:
                status = client.status()
            except MeshError as error:  # a server that restarts: it is shown as soon as it is back
                live.update(Text(str(error)), refresh=True)
            else:
                now = time.monotonic()
                rate = 0.0
                for coordinator in status.coordinators:
                    tokens = int(coordinator.counters.get("tokens", 0))
                    at, count = before.get(coordinator.name, (now, tokens))
                    if now > at:
                        rate += (tokens - count) / (now - at)
                    before[coordinator.name] = (now, tokens)
                live.update(Group(shard_table(status), coordinator_table(status), Text(f"{rate:.1f} tokens/s")), refresh=True)
            time.sleep(args.interval)
