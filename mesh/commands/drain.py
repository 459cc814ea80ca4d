"""`mesh drain` and `mesh load`: stop a shard, or let it serve another range."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mesh.commands.connection import add_connection_arguments, bus_options, repeated_flags
from mesh.settings.units import parse_seconds

__all__ = ["add_drain_parser", "add_load_parser"]


def add_drain_parser(subparsers: Any) -> None:
    text = "Let a shard take no new sessions, wait until its open ones have ended or moved, and stop it."
    parser = subparsers.add_parser("drain", help="stop a shard without losing a session", description=text)
    parser.add_argument("shard", metavar="SHARD", help="its name, such as shard-1, or its shard_id")
    parser.add_argument("--timeout", default="30s", metavar="TIME", help="stop after this time even if sessions are open (default 30s)")
    parser.add_argument("--keep", action="store_true", help="leave it running when it is empty")
    parser.add_argument("--force", action="store_true", help="also if it is the only shard of its layers: requests then wait for another")
    add_connection_arguments(parser)
    parser.set_defaults(run=drain_command)


def drain_command(args: argparse.Namespace) -> int:
    from mesh.bus import Bus
    from mesh.protocol import topics
    from mesh.protocol.control import Drain

    name = _name(args.shard)
    message = Drain(timeout_s=parse_seconds(args.timeout), stop=not args.keep, force=args.force)

    async def work() -> None:
        async with await Bus.connect(bus_options(args), name="mesh-drain") as bus:
            with _advising(args):
                drained = await bus.request(topics.DRAIN.at(name), message, timeout_s=10)
        then = "it stays" if args.keep else "then it stops"
        print(f"{drained.shard} is draining {drained.sessions} sessions, for {args.timeout} at most; {then}{_left(drained.gap)}")

    asyncio.run(work())
    return 0


def add_load_parser(subparsers: Any) -> None:
    text = """Let a shard serve another range of the layers it holds (overlap_layers in its configuration). Nothing is loaded and nothing
compiled; sessions that are open may end first, the rest go on on other replicas of the old range."""
    parser = subparsers.add_parser("load", help="let a shard serve another range of the layers it holds", description=text)
    parser.add_argument("shard", metavar="SHARD", help="its name, such as shard-1, or its shard_id")
    parser.add_argument("--layers", required=True, metavar="A-B", help="half-open range, such as 0-12")
    parser.add_argument("--timeout", default="30s", metavar="TIME", help="how long open sessions may take to end (default 30s)")
    parser.add_argument("--force", action="store_true", help="also if it is the only shard of its layers: requests then wait for another")
    add_connection_arguments(parser)
    parser.set_defaults(run=load_command)


def load_command(args: argparse.Namespace) -> int:
    from mesh.bus import Bus
    from mesh.planner.from_config import parse_range
    from mesh.protocol import topics
    from mesh.protocol.control import Load

    layers = parse_range(args.layers)
    timeout_s = parse_seconds(args.timeout)
    message = Load(layers_start=layers.start, layers_end=layers.stop, timeout_s=timeout_s, force=args.force)

    async def work() -> None:
        async with await Bus.connect(bus_options(args), name="mesh-load") as bus:
            with _advising(args):
                loaded = await bus.request(topics.LOAD.at(_name(args.shard)), message, timeout_s=timeout_s + 30)
        moved = f"; {loaded.sessions} sessions go on elsewhere" if loaded.sessions else ""
        print(f"{loaded.shard} serves layers {layers} after {loaded.took_s * 1e3:.0f} ms{moved}{_left(loaded.gap)}")

    asyncio.run(work())
    return 0


@contextmanager
def _advising(args: argparse.Namespace) -> Iterator[None]:
    """A refusal advises other commands: they are given this command's connection, so that they work as they stand."""
    from mesh.errors import BadRequest

    try:
        yield
    except BadRequest as error:
        flags = repeated_flags(args)
        text = str(error)
        for command in ("mesh join", "mesh load", "mesh push MODEL_DIR"):
            text = text.replace(f"`{command}", f"`{command}{flags}")
        raise BadRequest(text, field=error.field) from None


def _left(gap: str) -> str:
    return f"; layers {gap} have no shard that is ready now, and requests wait until one joins" if gap else ""


def _name(shard: str) -> str:
    return f"shard-{shard}" if shard.isdigit() else shard
