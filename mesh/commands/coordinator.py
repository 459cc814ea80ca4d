"""`mesh coordinator`: takes requests, keeps the shards busy."""

from __future__ import annotations

import argparse
import asyncio
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

from mesh.errors import ConfigError

__all__ = ["add_parser", "run_command", "run_until_signal"]

_DESCRIPTION = """\
Serve generation requests on mesh.v1.MODEL.generate, through the shards that are there. Any number of coordinators may serve
the same model. Of the model directory only the manifest and the tokenizer are read."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("coordinator", help="take requests and drive the shards", description=_DESCRIPTION)
    parser.add_argument("--config", type=Path, metavar="FILE", required=True, help="config.yaml of the coordinator")
    parser.add_argument("--model", type=Path, metavar="MODEL_DIR", required=True, help="model directory: its tokenizer and manifest")
    parser.add_argument("--nats", metavar="URL[,URL]", help="NATS servers, over nats.urls of the file")
    parser.add_argument("--name", default="", metavar="NAME", help="of this coordinator (default: drawn at random)")
    parser.add_argument("--queue", type=int, default=256, metavar="N", help="requests that may wait for a row (default 256)")
    parser.add_argument("--step-timeout", type=float, default=15.0, metavar="SECONDS", help="longest a step may take (default 15)")
    parser.add_argument("--bf16-wire", action="store_true", help="send hidden states as bfloat16: half the bytes, not bit-exact")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    from mesh.bus import Bus, BusOptions
    from mesh.config import CoordinatorConfig, load_config
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
    options = CoordinatorOptions(
        model=args.model,
        name=args.name,
        strategy=config.distributed.load_balancing_strategy,
        queue_limit=args.queue,
        failover_timeout_s=config.distributed.failover_timeout,
        step_timeout_s=min(args.step_timeout, config.distributed.failover_timeout),
        flags=flags,
    )
    urls = tuple(args.nats.split(",")) if args.nats else config.nats.urls

    async def serve() -> None:
        bus = await Bus.connect(BusOptions(urls=urls), name="mesh-coordinator")
        async with bus:
            coordinator = Coordinator(bus, options)
            await run_until_signal(coordinator.run, coordinator.stop)

    run_loop(serve)
    return 0


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
