"""`mesh gateway`: HTTP in a process of its own, and what a coordinator's HTTP shares with it."""

from __future__ import annotations

import argparse
import asyncio
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.commands.connection import add_connection_arguments, bus_options
from mesh.errors import ConfigError

if TYPE_CHECKING:
    from mesh.gateway import GatewaySettings, HttpEdge
    from mesh.http.listener import Tls
    from mesh.http.tokens import Verifier
    from mesh.settings.schema import AuthenticationSection, HttpSection, TlsSection

__all__ = ["add_parser", "gateway_settings", "run_command", "tls_of", "until_told", "verifier_of"]

_DESCRIPTION = """\
Serve HTTP for a mesh: its own API, OpenAI's, health. It needs neither a model nor JAX, and any number of them may stand behind a
load balancer. A coordinator serves the same by itself (coordinator.listen_port)."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("gateway", help="HTTP for a mesh", description=_DESCRIPTION)
    parser.add_argument("--config", type=Path, metavar="FILE", help="config.yaml of the gateway")
    parser.add_argument("--host", metavar="ADDRESS", help="to listen on, over gateway.listen_host (default 127.0.0.1)")
    parser.add_argument("--http-port", type=int, metavar="PORT", help="over gateway.listen_port (default 8080; 0: a free one)")
    parser.add_argument("--model", metavar="NAME", help="what a request that names none means (default: the only one there)")
    add_connection_arguments(parser)
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    from mesh.commands.coordinator import run_loop
    from mesh.gateway import HttpEdge
    from mesh.settings.files import load_environment
    from mesh.settings.schema import GatewayConfig, load_config
    from mesh.telemetry.logs import setup_logging

    config = load_environment(GatewayConfig) if args.config is None else load_config(args.config, GatewayConfig)
    given = {"listen_host": args.host, "listen_port": args.http_port, "model": args.model}
    section = config.gateway.model_copy(update={name: value for name, value in given.items() if value is not None})  # now set, too
    if not 0 <= section.listen_port <= 65535:
        raise ConfigError(f"--http-port {section.listen_port}: give 0 to 65535")
    setup_logging(config.logging.level, config.logging.file)
    settings = gateway_settings(section, config.tls, config.authentication, model=section.model)
    options = bus_options(args, config.nats if args.config is not None else None)
    edge = HttpEdge.bind(settings, or_free="listen_port" not in section.model_fields_set)

    async def serve() -> None:
        await until_told(edge, options)

    run_loop(serve)
    return 0


async def until_told(edge: HttpEdge, options: Any) -> None:
    """Serve until the first SIGTERM or SIGINT, then let requests end; a second one does not."""
    loop = asyncio.get_running_loop()
    asked = False

    def end() -> None:
        nonlocal asked
        edge.stop(now=asked)
        asked = True

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, end)
    await edge.serve(options)


def gateway_settings(
    section: HttpSection, tls: TlsSection | None, authentication: AuthenticationSection, *, model: str | None
) -> GatewaySettings:
    """What the sections of a file say; ConfigError where the listener would be open to others than this machine, and they say
    nothing of who may ask."""
    from mesh.gateway import GatewaySettings, Limits
    from mesh.http.listener import ListenerOptions

    listener = ListenerOptions(
        host=section.listen_host,
        port=section.listen_port,
        max_connections=section.max_connections,
        grace_s=section.drain_timeout,
        tls=tls_of(tls),
    )
    limits = Limits(
        max_body_bytes=section.max_body_bytes,
        max_prompt_chars=section.max_prompt_chars,
        request_timeout_s=section.request_timeout,
        requests_per_minute=authentication.requests_per_minute,
        tokens_per_minute=authentication.tokens_per_minute,
    )
    return GatewaySettings(
        model=model,
        listener=listener,
        limits=limits,
        verifier=verifier_of(authentication, section.listen_host),
        probe_timeout_s=section.health_check_interval,
        cors_origins=tuple(section.cors_origins),
    )


def tls_of(section: TlsSection | None) -> Tls | None:
    from mesh.http.listener import Tls

    if section is None or not section.enabled:
        return None
    return Tls(section.cert_file, section.key_file, section.ca_file, required=section.require_client_certificate)


def verifier_of(section: AuthenticationSection, host: str) -> Verifier | None:
    """Who checks tokens at a listener on `host`; None: nobody."""
    from mesh.http.listener import is_loopback
    from mesh.http.tokens import Verifier, read_secret

    enabled = not is_loopback(host) if section.enabled is None else section.enabled
    if not enabled:
        return None
    if section.algorithm == "HS256":
        secret = None if section.secret_key is None else section.secret_key.get_secret_value()
        key = read_secret(secret, section.secret_key_file, "authentication.secret_key")
        wanted = "authentication.secret_key: ${JWT_SECRET} or secret_key_file"
    else:
        key = read_secret(None, section.public_key_file, "authentication.public_key")
        wanted = "authentication.public_key_file"
    if key is None:
        why = "is on" if section.enabled else f"is on because {host} is not loopback"
        raise ConfigError(f"authentication {why}, and has no key: set {wanted}, or authentication.enabled: false where others guard it")
    return Verifier(section.algorithm, key)
