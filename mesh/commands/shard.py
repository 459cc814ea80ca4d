"""`mesh shard` and `mesh join`."""

from __future__ import annotations

import argparse
import logging
import secrets
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mesh.commands.connection import add_connection_arguments, add_metrics_argument, bus_options
from mesh.commands.progress import progress_bar
from mesh.commands.push import add_rate_argument, rate_of
from mesh.commands.signing import add_signature_argument, signers_of
from mesh.errors import ConfigError
from mesh.settings.defaults import DEFAULT_HTTP_PORT, DEFAULT_ROWS
from mesh.settings.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from mesh.bus import Bus, Pull
    from mesh.model.signature import Signers
    from mesh.settings.schema import ShardConfig, ShardModelSection
    from mesh.shard.http import ShardHttp
    from mesh.shard.options import ShardOptions
    from mesh.types import LayerRange

__all__ = ["add_join_parser", "add_shard_parser"]

log = logging.getLogger("mesh.shard")

_HTTP_CONNECTIONS = 64
_JOIN_CONNECT_S = 10.0
_JOIN_SHARE = 0.8  # of the free memory

_SHARD = """\
Serve one layer range of a model, as a configuration file says. If the blocks are not in the model directory model.shard_path, they are
fetched from the mesh (`mesh push`), by the name of the directory, or by NAME if model.shard_path is models:NAME. SIGTERM lets open
sessions end first; a second SIGTERM does not."""

_JOIN = """\
Serve what the mesh lacks most and this machine's memory allows: layers that no shard holds, otherwise the range with the fewest
replicas. The blocks are fetched from the mesh (`mesh push`)."""


def add_shard_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("shard", help="serve one layer range, as a file says", description=_SHARD)
    parser.add_argument("--config", metavar="FILE", type=Path, required=True, help="config.yaml; MESH_ variables override its keys")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_signature_argument(parser)
    add_metrics_argument(parser)
    parser.add_argument("--free-port", action="store_true", help="use a free port for metrics if that one is taken")
    add_connection_arguments(parser)
    parser.set_defaults(run=shard_command)


def add_join_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("join", help="serve what the mesh lacks most", description=_JOIN)
    add_connection_arguments(parser)
    parser.add_argument("--model", metavar="NAME", help="default: the only one that was pushed")
    parser.add_argument("--wait", action="store_true", help="wait until the model has been pushed")
    parser.add_argument("--layers", metavar="A-B", help="half-open range, such as 0-12 (default: what the mesh lacks most)")
    parser.add_argument("--name", help="name of this shard (default: a random one)")
    parser.add_argument("--memory", metavar="SIZE", help="the most memory to use, such as 8GB (default: 80 %% of what is free)")
    parser.add_argument("--rows", type=int, metavar="N", help=f"sessions at once (default: as the other shards, or {DEFAULT_ROWS})")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="positions a row (default: as the other shards, or 2048)")
    parser.add_argument("--mode", choices=("balance", "mirror"), help="replication mode (default: as the other shards, or balance)")
    parser.add_argument("--dir", metavar="DIR", type=Path, help="where blocks are kept (default: the cache directory)")
    add_rate_argument(parser)
    parser.add_argument("--threads", type=int, metavar="N", help="cores to compute on (default: all)")
    parser.add_argument("--gpu", action="store_true", help="compute on the GPU")
    parser.add_argument("--http-port", type=int, metavar="PORT", help="port of its health and statistics (default: 8080, or a free one)")
    add_signature_argument(parser)
    add_metrics_argument(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=join_command)


def shard_command(args: argparse.Namespace) -> int:
    from mesh.runtime.device import prepare
    from mesh.settings.schema import ShardConfig, load_config
    from mesh.shard.metrics import ShardMetrics
    from mesh.shard.options import ShardOptions
    from mesh.shard.process import choose_device, limit_threads, run, serve
    from mesh.telemetry.from_config import export_of
    from mesh.telemetry.logs import setup_logging
    from mesh.types import LayerRange

    config = load_config(args.config, ShardConfig)
    setup_logging(config.logging, role="shard", name=f"shard-{config.shard.shard_id}")
    limit_threads(config.resources.worker_threads, turn=config.shard.shard_id - 1)
    choose_device(gpu=config.resources.enable_gpu)
    prepare()
    layers, most_memory = LayerRange(config.model.layers_start, config.model.layers_end), _most_memory(config)
    connection, signers = bus_options(args, config.nats), signers_of(args, config.model.require_signature)
    http, export = _http(config), export_of(config.tracing)
    metrics = ShardMetrics.bind(config.metrics, port=args.metrics_port, or_free=args.free_port)

    with progress_bar(quiet=args.quiet) as progress:

        async def make(bus: Bus) -> ShardOptions:
            directory, incoming = await _blocks(bus, config.model, layers, signers)
            return ShardOptions(
                name=f"shard-{config.shard.shard_id}",
                directory=directory,
                layers=layers,
                rows=config.performance.batch_size,
                context=config.performance.max_sequence_length,
                max_memory_bytes=most_memory,
                drain_s=config.health.timeout,
                overlap=config.model.overlap_layers,
                kv_cache=config.performance.enable_kv_cache,
                mirror=config.shard.replication_mode == "mirror",
                signers=signers,
                incoming=incoming,
            )

        run(partial(serve, connection, make, progress=progress, http=http, metrics=metrics, export=export))
    return 0


def _http(config: ShardConfig) -> ShardHttp:
    """The shard's HTTP. Its port is taken here, so that a wrong port is an error before anything is loaded."""
    from mesh.http.from_config import tls_of, verifier_of
    from mesh.http.listener import Listener, ListenerOptions
    from mesh.shard.http import ShardHttp

    section = config.shard
    verifier = verifier_of(config.authentication, section.listen_host)
    options = ListenerOptions(section.listen_host, section.listen_port, _HTTP_CONNECTIONS, grace_s=0, tls=tls_of(config.tls))
    listener, also = Listener.bind(options, or_free="listen_port" not in section.model_fields_set), []
    if config.health.port is not None and config.health.port != section.listen_port:
        also.append(Listener.bind(replace(options, port=config.health.port)))
    return ShardHttp(listener, check_interval_s=config.health.check_interval, timeout_s=config.health.timeout, verifier=verifier, also=also)


def join_command(args: argparse.Namespace) -> int:
    from mesh.http.listener import Listener, ListenerOptions
    from mesh.runtime.device import prepare
    from mesh.settings.files import load_environment
    from mesh.settings.schema import HealthSection, LoggingConfig, MetricsConfig, TracingSection
    from mesh.shard.http import ShardHttp
    from mesh.shard.metrics import ShardMetrics
    from mesh.shard.process import choose_device, limit_threads, run, serve
    from mesh.telemetry.from_config import export_of
    from mesh.telemetry.logs import setup_logging

    name = args.name or f"join-{secrets.token_hex(4)}"
    setup_logging(load_environment(LoggingConfig).logging, role="shard", name=name)
    limit_threads(args.threads)
    choose_device(gpu=args.gpu)
    prepare()
    options = ListenerOptions(
        port=DEFAULT_HTTP_PORT if args.http_port is None else args.http_port, max_connections=_HTTP_CONNECTIONS, grace_s=0
    )
    health = HealthSection()
    http = ShardHttp(
        Listener.bind(options, or_free=args.http_port is None), check_interval_s=health.check_interval, timeout_s=health.timeout
    )
    metrics = ShardMetrics.bind(load_environment(MetricsConfig).metrics, port=args.metrics_port)
    export = export_of(TracingSection())
    signers = signers_of(args)
    layers = None
    if args.layers:
        from mesh.planner.from_config import parse_range

        layers = parse_range(args.layers)
    rate = rate_of(args)
    memory = parse_bytes(args.memory) if args.memory else round(_JOIN_SHARE * _free_memory())
    with progress_bar(quiet=args.quiet) as progress:

        async def make(bus: Bus) -> ShardOptions:
            from mesh.shard.placing import place

            return await place(
                bus,
                name,
                model=args.model,
                memory_bytes=memory,
                shared=args.memory is None,
                rows=args.rows,
                context=args.context,
                mirror=None if args.mode is None else args.mode == "mirror",
                directory=args.dir,
                layers=layers,
                signers=signers,
                bytes_per_s=rate,
                wait=args.wait,
            )

        run(
            partial(serve, bus_options(args), make, progress=progress, http=http, metrics=metrics, export=export, connect_s=_JOIN_CONNECT_S)
        )
    return 0


async def _blocks(bus: Bus, section: ShardModelSection, layers: LayerRange, signers: Signers | None) -> tuple[Path, Pull | None]:
    """The directory of the blocks of `layers` and of the overlap on either side, and what brings those that are not in it. `models:NAME` is
    a model of the mesh, kept in the cache directory. Anything else is a directory: it is used as it is if the blocks are in it, otherwise
    it is filled from the mesh's model of its name."""
    from mesh.bus import ModelStore, files_of, kept_at
    from mesh.errors import CorruptModel, ModelNotFound
    from mesh.model.manifest import Manifest
    from mesh.model.signature import load_trusted

    def held(manifest: Manifest) -> LayerRange:
        manifest.check_range(layers)
        return layers.widened(section.overlap_layers, manifest.layers)

    store = ModelStore(bus, signers)
    scheme, _, name = section.shard_path.partition(":")
    if scheme == "models" and name:
        manifest = await store.manifest(name)
        directory = kept_at(manifest)
    else:
        directory = Path(section.shard_path).expanduser()
        name = directory.name
        missing: ModelNotFound | CorruptModel
        try:
            manifest = load_trusted(directory, signers)
            needed = held(manifest)
            manifest.verify_files(directory, needed, checksums=False, embed=needed.start == 0, head=needed.stop == manifest.layers)
            return directory, None
        except (ModelNotFound, CorruptModel) as error:
            missing = error
        try:
            manifest = await store.manifest(name)
        except ModelNotFound:
            raise ModelNotFound(f"{missing}; and the mesh has no model {name} (`mesh push`)") from None
    needed = held(manifest)
    files = files_of(manifest, needed, embed=needed.start == 0, head=needed.stop == manifest.layers)
    return directory, store.pulling(manifest, files, directory, bytes_per_s=section.pull_rate)


def _free_memory() -> int:
    """Bytes that can be used without swapping, in this machine or its container. ConfigError: the system does not say."""
    from mesh.host.machine import machine

    if free := machine().available_bytes:
        return free
    raise ConfigError("this system does not say how much memory is free: give --memory, such as --memory 8GB")


def _most_memory(config: ShardConfig) -> int:
    """resources.max_memory_gb, but no more than this machine or its container has. A GPU has memory of its own."""
    from mesh.host.machine import machine

    asked, limit = config.resources.max_memory_bytes, machine().limit_bytes
    if config.resources.enable_gpu or not limit or asked <= limit:
        return asked
    log.warning(
        "resources.max_memory_gb is %s, and this machine or its container has %s: it may take no more",
        format_bytes(asked),
        format_bytes(limit),
    )
    return limit
