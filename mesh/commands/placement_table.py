"""A placement as a table for people."""

from __future__ import annotations

import sys
from typing import IO

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mesh.planner.placement import Placement
from mesh.settings.units import format_bytes, format_count, format_seconds

__all__ = ["print_placement"]

_WIDTH_OFF_TERMINAL = 160  # a pipe or a file has no width of its own


def print_placement(placement: Placement, file: IO[str] | None = None) -> None:
    """Write what is placed where, then whether it fits: to standard output, or `file`."""
    file = file or sys.stdout
    console = Console(file=file, width=None if file.isatty() else _WIDTH_OFF_TERMINAL, highlight=False, markup=False, soft_wrap=True)
    console.print(_headline(placement))
    console.print(_table(placement))
    for note in placement.notes:
        console.print(Text(f"Note: {note}.", style="dim"))
    if placement.spare_nodes:
        console.print(f"Spare: {', '.join(placement.spare_nodes)}.")
    if placement.fits:
        slowest = max(placement.shards, key=lambda shard: shard.step_s)
        console.print(
            Text("Fits.", style="bold green"),
            f"The slowest stage is {slowest.layers} on {slowest.node}, about {format_seconds(slowest.step_s, 2)} a decode step.",
        )
        return
    console.print(Text(f"{placement.problem}.", style="bold red"))
    if placement.remedies:
        console.print("What would fit:")
        for remedy in placement.remedies:
            console.print(f"  - {remedy.text}")


def _headline(placement: Placement) -> str:
    replicas = f" x {placement.replication_factor} replicas" if placement.replication_factor > 1 else ""
    overlap = f", overlap {placement.overlap_layers}" if placement.overlap_layers else ""
    rows = "1 row" if placement.batch_size == 1 else f"{placement.batch_size} rows"
    cache = "" if placement.enable_kv_cache else ", no KV cache"
    return (
        f"{placement.model}: {placement.total_layers} layers, {format_count(placement.total_parameters)} parameters, "
        f"{format_bytes(placement.weights_bytes)} at {placement.quantization_bits} bits\n"
        f"{len(placement.ranges)} layer {'range' if len(placement.ranges) == 1 else 'ranges'}{replicas}, {placement.strategy}{overlap}; "
        f"{rows} of {placement.max_sequence_length:,} tokens{cache}"
    )


def _table(placement: Placement) -> Table:
    table = Table(box=box.SIMPLE, pad_edge=False)
    table.add_column("shard", justify="right", no_wrap=True)
    for name in ("layers", "holds", "node"):
        table.add_column(name, no_wrap=True)
    for name in ("weights", "KV cache", "workspace", "process", "total", "memory", "used", "step"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fits", no_wrap=True)
    for shard in placement.shards:
        blocks = [name for name, there in (("embed", shard.embed), (str(shard.held), True), ("head", shard.head)) if there]
        sizes = (shard.weights_bytes, shard.cache_bytes, shard.workspace_bytes, shard.process_bytes, shard.total_bytes, shard.memory_bytes)
        used = sum(other.total_bytes for other in placement.shards if other.node == shard.node)
        table.add_row(
            str(shard.shard_id),
            str(shard.layers),
            " + ".join(blocks),
            shard.node,
            *map(format_bytes, sizes),
            f"{100 * used / shard.memory_bytes:.0f} %",
            format_seconds(shard.step_s, 2),
            Text("yes", style="green") if shard.fits else Text("no", style="bold red"),
        )
    return table
