"""`mesh coordinator`: takes requests and drives the shards."""

from __future__ import annotations

import argparse
import asyncio
import secrets
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.commands.connection import add_connection_arguments, add_metrics_argument, bus_options
from mesh.commands.signing import add_signature_argument, signers_of
from mesh.errors import ConfigError

if TYPE_CHECKING:
    from mesh.bus import BusOptions
    from mesh.coordinator.description import Wanted
    from mesh.coordinator.service import Coordinator
    from mesh.gateway import HttpEdge
    from mesh.settings.schema import CoordinatorConfig, ServedModelSection
    from mesh.telemetry.export import SpanExport
    from mesh.telemetry.registry import Registry

__all__ = ["add_parser", "run_command"]

_DESCRIPTION = """\
Serve generation requests on mesh.v1.MODEL.generate through the shards of the mesh. Any number of coordinators may serve the same model.
A coordinator needs only the model's manifest and tokenizer: from the directory model.path of the file, or from the mesh (`mesh push`),
where it waits for them."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("coordinator", help="take requests and drive the shards", description=_DESCRIPTION)
    parser.add_argument("--config", type=Path, metavar="FILE", required=True, help="config.yaml of the coordinator")
    parser.add_argument(
        "--model", metavar="MODEL", help="a model directory, or the name of a pushed model (default: the file's model section)"
    )
    parser.add_argument("--name", default="", metavar="NAME", help="name of this coordinator (default: a random one)")
    parser.add_argument("--queue", type=int, default=256, metavar="N", help="requests that may wait for a row (default 256)")
    parser.add_argument(
        "--step-timeout", type=float, metavar="SECONDS", help="the longest that a step may take (default: distributed.step_timeout, or 15)"
    )
    parser.add_argument("--bf16-wire", action="store_true", help="send hidden states as bfloat16: half the bytes, not bit-exact")
    parser.add_argument(
        "--http-port", type=int, metavar="PORT", help="HTTP port; 0 is a free one (default: coordinator.listen_port, or 8080)"
    )
    add_signature_argument(parser)
    add_metrics_argument(parser)
    parser.add_argument("--free-port", action="store_true", help="use a free port if one of these is taken")
    add_connection_arguments(parser)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    from mesh.bus import Bus
    from mesh.coordinator.core.expectations import ExpectedShards
    from mesh.coordinator.description import find_model
    from mesh.coordinator.metrics import report_coordinator
    from mesh.coordinator.service import Coordinator, CoordinatorOptions
    from mesh.host.process import give_memory_back, no_core_dumps, settle
    from mesh.host.signals import on_signals, run_loop
    from mesh.protocol.frame_codec import Flags
    from mesh.settings.schema import CoordinatorConfig, load_config
    from mesh.settings.units import GB
    from mesh.telemetry.from_config import export_of, sampling_of
    from mesh.telemetry.logs import setup_logging
    from mesh.telemetry.metrics_http import MetricsEndpoint, reporting
    from mesh.telemetry.registry import Registry

    no_core_dumps()
    config = load_config(args.config, CoordinatorConfig)
    name = args.name or f"c-{secrets.token_hex(4)}"
    setup_logging(config.logging, role="coordinator", name=name)
    if args.queue < 0:
        raise ConfigError(f"--queue {args.queue}: give 0 or more")
    flags = Flags.ZSTD if config.memory.enable_compression else Flags(0)
    if args.bf16_wire:
        flags |= Flags.BF16
    wanted, connection = _wanted(args.model, config.model), bus_options(args, config.nats)
    options = CoordinatorOptions(
        model=wanted.path or Path(),
        name=name,
        strategy=config.distributed.load_balancing_strategy,
        queue_limit=args.queue,
        failover_timeout_s=config.distributed.failover_timeout,
        step_timeout_s=min(args.step_timeout or config.distributed.step_timeout, config.distributed.failover_timeout),
        step_slowdown=config.distributed.step_slowdown,
        prefix_reuse=config.distributed.prefix_reuse,
        flags=flags,
        health_check_interval_s=config.coordinator.health_check_interval,
        expected=ExpectedShards(config.distributed.shards_count, config.distributed.replication_factor),
        pool_bytes=round(config.memory.max_pool_size_gb * GB),
        sampling=sampling_of(config.tracing),
        signers=signers_of(args, config.model.require_signature),
    )
    export = export_of(config.tracing)
    edge = _edge(args, config, export)
    registry = Registry("coordinator")
    endpoint = MetricsEndpoint.bind(registry, config.metrics, port=args.metrics_port, or_free=args.free_port)

    async def serve() -> None:
        bus = await Bus.connect(connection, name="mesh-coordinator")
        async with bus, reporting(registry, endpoint, export):
            coordinator = Coordinator(bus, replace(options, model=await find_model(bus, wanted, options.signers)), export)
            if endpoint is not None:
                coordinator.metrics_url = endpoint.url
                endpoint.say()
            report_coordinator(registry, coordinator)
            give_memory_back()
            settle()
            if edge is None:
                on_signals(coordinator.stop)
                await coordinator.run()
            else:
                await _run_with_http(coordinator, edge, connection, registry)

    run_loop(serve)
    return 0


def _edge(args: argparse.Namespace, config: CoordinatorConfig, export: SpanExport | None) -> HttpEdge | None:
    """The HTTP edge, if the file asks for one. Its port is taken here, so that a wrong port is an error before anything starts."""
    section = config.coordinator
    if not section.serve_http:
        return None
    from mesh.gateway import HttpEdge
    from mesh.gateway.from_config import gateway_settings

    if args.http_port is not None:
        if not 0 <= args.http_port <= 65535:
            raise ConfigError(f"--http-port {args.http_port}: give 0 to 65535")
        section = section.model_copy(update={"listen_port": args.http_port})
    or_free = args.free_port or "listen_port" not in section.model_fields_set
    settings = gateway_settings(section, config.tls, config.authentication, config.tracing, model=None)
    return HttpEdge.bind(settings, or_free=or_free, export=export)


async def _run_with_http(coordinator: Coordinator, edge: HttpEdge, connection: BusOptions, registry: Registry) -> None:
    """Run both until the first SIGTERM or SIGINT. The edge then lets its requests end, and the coordinator ends after it; a second
    signal ends both at once."""
    from mesh.host.signals import on_signals

    coordinator.http_url = edge.url
    serving = asyncio.create_task(coordinator.run())
    listening = asyncio.create_task(edge.serve(connection, model=coordinator.manifest.name, registry=registry))

    def end_now() -> None:
        edge.stop(now=True)
        coordinator.stop()

    on_signals(edge.stop, end_now)
    await asyncio.wait({serving, listening}, return_when=asyncio.FIRST_COMPLETED)
    end_now()
    await asyncio.gather(serving, listening)


def _wanted(model: str | None, section: ServedModelSection) -> Wanted:
    """The model to serve: the file's, unless --model is given. --model is a directory if there is one of that path, otherwise a name."""
    from mesh.coordinator.description import Wanted

    said = {key: getattr(section, key) for key in section.model_fields_set - {"require_signature"}}
    if model is not None:
        directory = Path(model)
        is_path = directory.is_dir() or len(directory.parts) != 1
        said |= {"path": model, "name": None} if is_path else {"path": None, "name": model}
    path = said.pop("path", None)
    return Wanted(path=None if path is None else Path(path), **said)
