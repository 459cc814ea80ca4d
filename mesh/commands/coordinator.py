"""`mesh coordinator`: takes requests, keeps the shards busy."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.commands.connection import add_connection_arguments, bus_options
from mesh.errors import ConfigError

if TYPE_CHECKING:
    from mesh.config import ServedModelSection
    from mesh.coordinator.description import Wanted

__all__ = ["add_parser", "run_command", "run_until_signal"]

_DESCRIPTION = """\
Serve generation requests on mesh.v1.MODEL.generate, through the shards that are there. Any number of coordinators may serve
the same model. It needs the model's manifest and tokenizer alone: from the directory model.path of the file, or from the mesh
(`mesh push`), where it waits for them."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("coordinator", help="take requests and drive the shards", description=_DESCRIPTION)
    parser.add_argument("--config", type=Path, metavar="FILE", required=True, help="config.yaml of the coordinator")
    parser.add_argument("--model", metavar="MODEL", help="a model directory, or the name of a pushed model; over the file's model section")
    parser.add_argument("--name", default="", metavar="NAME", help="of this coordinator (default: drawn at random)")
    parser.add_argument("--queue", type=int, default=256, metavar="N", help="requests that may wait for a row (default 256)")
    parser.add_argument("--step-timeout", type=float, default=15.0, metavar="SECONDS", help="longest a step may take (default 15)")
    parser.add_argument("--bf16-wire", action="store_true", help="send hidden states as bfloat16: half the bytes, not bit-exact")
    add_connection_arguments(parser)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    from mesh.bus import Bus
    from mesh.config import CoordinatorConfig, load_config
    from mesh.coordinator.description import find_model
    from mesh.coordinator.service import Coordinator, CoordinatorOptions
    from mesh.frames import Flags
    from mesh.telemetry import setup_logging

    config = load_config(args.config, CoordinatorConfig)
    setup_logging(config.logging.level, config.logging.file)
    if args.queue < 0:
        raise ConfigError(f"--queue {args.queue}: give 0 or more")
    flags = Flags.ZSTD if config.memory.enable_compression else Flags(0)
    if args.bf16_wire:
        flags |= Flags.BF16
    wanted, connection = _wanted(args.model, config.model), bus_options(args, config.nats)
    options = CoordinatorOptions(
        model=wanted.path or Path(),
        name=args.name,
        strategy=config.distributed.load_balancing_strategy,
        queue_limit=args.queue,
        failover_timeout_s=config.distributed.failover_timeout,
        step_timeout_s=min(args.step_timeout, config.distributed.failover_timeout),
        flags=flags,
    )

    async def serve() -> None:
        bus = await Bus.connect(connection, name="mesh-coordinator")
        async with bus:
            coordinator = Coordinator(bus, replace(options, model=await find_model(bus, wanted)))
            await run_until_signal(coordinator.run, coordinator.stop)

    run_loop(serve)
    return 0


def _wanted(model: str | None, section: ServedModelSection) -> Wanted:
    """What the file says, --model over it: a directory where there is one of that path, else a name."""
    from mesh.coordinator.description import Wanted

    said = {key: getattr(section, key) for key in section.model_fields_set}
    if model is not None:
        directory = Path(model)
        is_path = directory.is_dir() or len(directory.parts) != 1
        said |= {"path": model, "name": None} if is_path else {"path": None, "name": model}
    path = said.pop("path", None)
    return Wanted(path=None if path is None else Path(path), **said)


def run_loop(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """On uvloop where there is one: a hop costs half."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main())
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


async def run_until_signal(run: Callable[[], Coroutine[Any, Any, None]], stop: Callable[[], Any]) -> None:
    """`run`, and `stop` on the first SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    await run()
