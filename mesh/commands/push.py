"""`mesh push` and `mesh pull`: models in the mesh's object store."""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

from mesh.commands.connection import add_connection_arguments, bus_options
from mesh.commands.progress import progress_bar
from mesh.commands.signing import add_signature_argument, signers_of
from mesh.commands.sources import MODEL_HELP, model_directory
from mesh.errors import BadRequest
from mesh.host.signals import run_loop
from mesh.settings.units import format_bytes, format_seconds, parse_rate

__all__ = ["add_pull_parser", "add_push_parser", "add_rate_argument", "rate_of"]


def add_push_parser(subparsers: Any) -> None:
    text = """Copy a model into the mesh, so that shards anywhere can fetch the blocks that they serve. Files that are there
already are not sent."""
    parser = subparsers.add_parser("push", help="copy a model directory into the mesh", description=text)
    parser.add_argument("model", metavar="MODEL", type=Path, help=MODEL_HELP)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_connection_arguments(parser)
    parser.set_defaults(run=push_command)


def add_pull_parser(subparsers: Any) -> None:
    text = """Copy a model of the mesh, or a layer range of it, into a directory. Files that are there already and right stay as they are.
A pull that was broken off goes on where it ended. What another pull of this machine has is copied from there."""
    parser = subparsers.add_parser("pull", help="copy a model from the mesh", description=text)
    parser.add_argument("name", metavar="NAME", help="name of a pushed model")
    parser.add_argument("directory", metavar="DIR", type=Path, help="where to copy it")
    parser.add_argument("--layers", metavar="A-B", help="only layers [A, B), with embedding or head if they belong to them")
    add_rate_argument(parser)
    add_signature_argument(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_connection_arguments(parser)
    parser.set_defaults(run=pull_command)


def add_rate_argument(parser: argparse.ArgumentParser) -> None:
    """Add --pull-rate."""
    parser.add_argument("--pull-rate", metavar="RATE", help="at most so fast, such as 1Gbit/s or 50MB/s (default: as fast as the network)")


def rate_of(args: argparse.Namespace) -> float | None:
    """Bytes per second of --pull-rate; None: it was not given. ConfigError, BadRequest: it is no rate at which anything comes."""
    rate = parse_rate(args.pull_rate) if args.pull_rate else None
    if rate == 0:
        raise BadRequest(f"--pull-rate {args.pull_rate}: give more than 0, or leave it out", field="pull_rate")
    return rate


def push_command(args: argparse.Namespace) -> int:
    from mesh.bus import Bus, ModelStore

    directory = model_directory(args.model)

    async def work() -> None:
        began = time.perf_counter()
        async with await Bus.connect(bus_options(args), name="mesh-push") as bus:
            with progress_bar(quiet=args.quiet, sizes=True) as progress:
                manifest = await ModelStore(bus).push(directory, progress)
        size = sum(file.bytes for block in manifest.blocks for file in block.files)
        print(f"{manifest.name} is in the mesh: {format_bytes(size)} in {format_seconds(time.perf_counter() - began)}")

    asyncio.run(work())
    return 0


def pull_command(args: argparse.Namespace) -> int:
    from mesh.bus import Bus, ModelStore, files_of
    from mesh.host.process import give_way
    from mesh.planner.from_config import parse_range

    rate = rate_of(args)

    async def work() -> None:
        layers, signers = None if args.layers is None else parse_range(args.layers), signers_of(args)
        async with await Bus.connect(bus_options(args), name="mesh-pull") as bus:
            store = ModelStore(bus, signers)
            manifest = await store.manifest(args.name)
            if layers is not None:
                manifest.check_range(layers)
            first, last = layers is None or layers.start == 0, layers is None or layers.stop == manifest.layers
            files = files_of(manifest, layers, embed=first, head=last)
            began = time.perf_counter()
            with progress_bar(quiet=args.quiet, sizes=True) as progress:
                pull = store.pulling(manifest, files, args.directory, progress=progress, bytes_per_s=rate)
                await pull.run()
            took_s = time.perf_counter() - began
        size = sum(file.bytes for file in files)
        print(
            f"{manifest.name} in {args.directory}: layers {layers or f'0-{manifest.layers}'}, {format_bytes(size)}, of which "
            f"{format_bytes(pull.fetched_bytes)} came from the mesh in {format_seconds(took_s)}"
        )

    give_way()  # a shard of this machine may be serving
    run_loop(work)
    return 0
