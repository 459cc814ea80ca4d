"""`mesh status`: who serves what."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import orjson
from rich.console import Console
from rich.table import Table

from mesh.client import MeshClient, MeshStatus
from mesh.commands.generate import add_mesh_arguments, mesh_options
from mesh.units import format_bytes, format_seconds

__all__ = ["add_parser", "coordinator_table", "run_command", "shard_table"]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("status", help="who serves what", description="Show the shards and coordinators of a mesh.")
    add_mesh_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one object {ready, shards, coordinators}")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Exit code 0 when a request would be generated now, 1 otherwise."""
    with MeshClient(options=mesh_options(args)) as client:
        status, health = client.status(), client.health(args.model)
    shards = [shard for shard in status.shards if args.model in (None, shard.model)]
    coordinators = [c for c in status.coordinators if args.model in (None, c.model)]
    if args.json:
        answer = {
            "ready": health.ready,
            "reason": health.reason,
            "shards": [shard.model_dump(mode="json") for shard in shards],
            "coordinators": [dict(c.counters) for c in coordinators],
        }
        sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
        return 0 if health.ready else 1
    console = Console()
    chosen = MeshStatus(tuple(shards), tuple(coordinators))
    console.print(shard_table(chosen))
    console.print(coordinator_table(chosen))
    console.print("ready" if health.ready else f"not ready: {health.reason}")
    return 0 if health.ready else 1


def shard_table(status: MeshStatus) -> Table:
    table = Table("model", "layers", "shard", "state", "rows in use", "context", "load", "step", "memory", "host", title="shards")
    for shard in status.shards:
        table.add_row(
            shard.model,
            str(shard.layers),
            shard.shard,
            shard.state,
            f"{shard.rows - shard.free_rows} of {shard.rows}",
            str(shard.context),
            f"{shard.load:.0%}",
            format_seconds(shard.step_s) if shard.step_s else "",
            format_bytes(shard.memory_bytes),
            shard.host,
        )
    return table


def coordinator_table(status: MeshStatus) -> Table:
    table = Table("model", "coordinator", "live", "waiting", "finished", "failed", "tokens", "each hop", title="coordinators")
    for c in status.coordinators:
        counts, hop_s = c.counters, c.counters.get("hops", {}).get("hop_s", 0.0)
        table.add_row(
            c.model,
            c.name,
            str(c.live),
            str(c.queued),
            *(str(counts.get(name, "")) for name in ("finished", "failed", "tokens")),
            format_seconds(hop_s) if hop_s else "",
        )
    return table
