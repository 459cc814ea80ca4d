"""`mesh gateway`: HTTP in a process of its own."""

from __future__ import annotations

import argparse
import platform
from functools import partial
from pathlib import Path
from typing import Any

from mesh.commands.connection import add_connection_arguments, add_metrics_argument, bus_options
from mesh.errors import ConfigError

__all__ = ["add_parser", "run_command"]

_DESCRIPTION = """\
Serve HTTP for a mesh: its own API, OpenAI's API, and health. A gateway needs neither a model nor JAX, and any number of gateways may
stand behind a load balancer. A coordinator serves the same HTTP by itself (coordinator.listen_port)."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("gateway", help="HTTP for a mesh", description=_DESCRIPTION)
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.yaml of the gateway")
    parser.add_argument("--host", metavar="ADDRESS", help="address to listen on (default: gateway.listen_host, or 127.0.0.1)")
    parser.add_argument(
        "--http-port", type=int, metavar="PORT", help="port to listen on; 0 is a free one (default: gateway.listen_port, or 8080)"
    )
    add_metrics_argument(parser)
    parser.add_argument("--model", metavar="NAME", help="model of requests that name none (default: the only one)")
    add_connection_arguments(parser)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    from mesh.gateway import HttpEdge
    from mesh.gateway.from_config import gateway_settings
    from mesh.host.process import give_memory_back, no_core_dumps
    from mesh.host.signals import on_signals, run_loop
    from mesh.settings.files import load_environment
    from mesh.settings.schema import GatewayConfig, load_config
    from mesh.telemetry.from_config import export_of
    from mesh.telemetry.logs import setup_logging
    from mesh.telemetry.metrics_http import MetricsEndpoint, reporting
    from mesh.telemetry.registry import Registry

    no_core_dumps()
    config = load_environment(GatewayConfig) if args.config is None else load_config(args.config, GatewayConfig)
    given = {"listen_host": args.host, "listen_port": args.http_port, "model": args.model}
    section = config.gateway.model_copy(update={name: value for name, value in given.items() if value is not None})  # now set, too
    if not 0 <= section.listen_port <= 65535:
        raise ConfigError(f"--http-port {section.listen_port}: give 0 to 65535")
    setup_logging(config.logging, role="gateway", name=platform.node())
    settings = gateway_settings(section, config.tls, config.authentication, config.tracing, model=section.model)
    options = bus_options(args, config.nats if args.config is not None else None)
    export = export_of(config.tracing)
    edge = HttpEdge.bind(settings, or_free="listen_port" not in section.model_fields_set, export=export)
    registry = Registry("gateway")
    if export is not None:
        registry.spans_dropped.append(lambda: export.dropped)
    endpoint = MetricsEndpoint.bind(registry, config.metrics, port=args.metrics_port)

    give_memory_back()

    async def serve() -> None:
        on_signals(edge.stop, partial(edge.stop, now=True))
        async with reporting(registry, endpoint, export):
            await edge.serve(options, registry=registry, connected=None if endpoint is None else endpoint.say)

    run_loop(serve)
    return 0
