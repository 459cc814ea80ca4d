"""`mesh status`: the shards and coordinators of a mesh."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

import orjson
from rich.console import Console

from mesh.client import MeshClient
from mesh.client.read_model import MeshReadModel
from mesh.client.results import MeshStatus
from mesh.commands.connection import bus_options
from mesh.commands.drawing import coordinator_table, headline, shard_table
from mesh.commands.generate import add_mesh_arguments
from mesh.errors import ConfigError
from mesh.telemetry.targets import target_of

__all__ = ["add_parser", "run_command"]


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "status", help="shards and coordinators of a mesh", description="Show the shards and coordinators of a mesh."
    )
    add_mesh_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one object {ready, reason, jetstream, shards, coordinators}")
    parser.add_argument(
        "--prometheus-targets", metavar="FILE", type=Path, help="also write the addresses of all metrics to FILE, for Prometheus' file_sd"
    )
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    """Exit code 0 if the mesh could answer a request now, 1 otherwise."""
    with MeshClient(options=bus_options(args)) as client:
        status, stats, health = client.status(), client.shard_stats(), client.health(args.model)
    if args.prometheus_targets is not None:
        _write(args.prometheus_targets, prometheus_targets(status, args.model))
    if args.json:
        answer = {
            "ready": health.ready,
            "reason": health.reason,
            "jetstream": status.jetstream,
            "shards": [shard.model_dump(mode="json") for shard in status.shards if args.model in (None, shard.model)],
            "coordinators": [c.stats.document() for c in status.coordinators if args.model in (None, c.model)],
        }
        sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
        return 0 if health.ready else 1
    read_model = MeshReadModel()
    read_model.look(status, stats, now=time.monotonic(), unix_s=time.time())
    console = Console()
    for model in read_model.snapshot()["models"]:
        if args.model in (None, model["name"]):
            console.print(headline(model))
            if model["shards"]:
                console.print(shard_table(model["shards"], rates=False, width=console.width))
            if model["coordinators"]:
                console.print()
                console.print(coordinator_table(model["coordinators"], width=console.width))
            console.print()
    if not status.jetstream:
        console.print("JetStream does not answer: tokens flow, but sessions are not written down and batches wait")
    console.print("ready" if health.ready else f"not ready: {health.reason}")
    return 0 if health.ready else 1


def prometheus_targets(status: MeshStatus, model: str | None = None) -> list[dict[str, Any]]:
    """Where the shards and coordinators of a mesh (of `model`, if given) answer their metrics, as Prometheus' file_sd reads it. A process
    that has no metrics port is left out."""
    processes = [("shard", shard.shard, shard.model, shard.metrics) for shard in status.shards]
    processes += [("coordinator", each.stats.coordinator, each.model, each.stats.metrics) for each in status.coordinators]
    return [
        {"targets": [target], "labels": {"role": role, "process": name, "model": served}}
        for role, name, served, url in processes
        if model in (None, served) and (target := target_of(url))
    ]


def _write(path: Path, targets: list[dict[str, Any]]) -> None:
    """Replace the file at once, because Prometheus may read it at any time. ConfigError: it cannot be written."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        new.write_bytes(orjson.dumps(targets, option=orjson.OPT_INDENT_2) + b"\n")
        new.replace(path)
    except OSError as error:
        raise ConfigError(f"--prometheus-targets {path}: {error.strerror}: give a file this user may write") from None
