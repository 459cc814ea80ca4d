"""A whole mesh on this machine: a nats-server (unless there is one already), coordinators and shards as child processes.

The kernel ends every child when this process ends, however it ends, so nothing is left behind. In the orderly case the children are asked
to stop, coordinators first. A child that dies is started again (mesh/local/supervisor.py).
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from urllib.parse import urlsplit

import yaml

from mesh.bus import Bucket, Bus, BusOptions, LeaseTable
from mesh.client import AsyncMeshClient
from mesh.errors import BadRequest, DeadlineExceeded
from mesh.host.machine import machine
from mesh.host.process import dying_with_parent
from mesh.host.scratch import ScratchFolder
from mesh.local.nats_server import USER, NatsServer
from mesh.local.secure import OPERATOR, SecureSite
from mesh.local.sizing import Demand, Sizing, size_together
from mesh.local.supervisor import Child, Supervisor
from mesh.model.manifest import Manifest
from mesh.protocol.status import CoordinatorStats, ShardLease
from mesh.protocol.subjects import KV_SHARDS, LEASE_TTL_S, token
from mesh.settings.defaults import DEFAULT_HTTP_PORT, DEFAULT_ROWS
from mesh.settings.files import ENV_PREFIX
from mesh.settings.schema import NatsSection
from mesh.settings.units import GB
from mesh.types import LayerRange, Progress, even_ranges, no_progress

__all__ = ["LocalMesh", "LocalModel", "LocalOptions", "OtherModel"]

log = logging.getLogger(__name__)

_STOP_S = 10.0
_HTTP_DRAIN_S = 2.0
_MUCH = 10**15
"""Bytes that a shard may take where the system does not say how much is free."""
_JETSTREAM_S = 30.0
"""How long servers are waited for that were just started: those of a cluster choose a leader first."""


@dataclass(frozen=True)
class OtherModel:
    """A model beside the first one. shards: layer ranges."""

    model: Path
    shards: int = 1


@dataclass(frozen=True)
class LocalModel:
    """A model of a LocalMesh: its directory, how it is cut, and what its shards take."""

    directory: Path
    manifest: Manifest
    ranges: list[LayerRange]
    sizing: Sizing

    @property
    def name(self) -> str:
        return self.manifest.name


@dataclass(frozen=True)
class LocalOptions:
    """What to start.

    others: further models, each with shards and coordinators of its own. Then a gateway in a process of its own serves HTTP for all of
    them, so that the end of a model's processes does not take it along.
    shards: layer ranges of `model`. replicas: shards of each range. mode: how replicas stand in for each other (mesh/settings/schema.py).
    nats: use these servers instead of starting one. port: of the server that is started (None: a free one). password: that this server
    asks for (None: every user of this machine may connect). secure: it asks for TLS and keys instead; each process has a user of its own,
    with the rights of its role alone. rows, context: of each shard (None: as long as the machine has room for). memory_bytes: the most
    that a shard may take (None: its share of what is free). http: whether HTTP is served: by each coordinator, or by the gateway; the
    first one does on http_port (None: 8080, or a free port). prefix_reuse: whose sessions may begin with the rows that earlier ones have
    left (mesh/settings/schema.py). coordinator_arguments: further arguments of `mesh coordinator`.
    """

    model: Path
    shards: int = 1
    replicas: int = 1
    mode: str = "balance"
    coordinators: int = 1
    nats: str | None = None
    port: int | None = None
    password: str | None = field(default=None, repr=False)
    secure: bool = False
    rows: int = DEFAULT_ROWS
    context: int | None = None
    memory_bytes: int | None = None
    strategy: str = "least_loaded"
    prefix_reuse: str = "tenant"
    failover_timeout_s: float = 30.0
    compression: bool = False
    http: bool = True
    http_port: int | None = None
    logs: Path | None = None
    coordinator_arguments: tuple[str, ...] = ()
    bus: BusOptions | None = None  # how to connect to `nats`
    others: tuple[OtherModel, ...] = ()


class LocalMesh:
    """The running processes; a context manager. Start it from the main thread. `models` are those that are served; `manifest`, `ranges` and
    `sizing` are those of the first. `url` is where clients connect, `http_urls` where HTTP is
    served, `metrics_urls` where each process answers its metrics. `say` is called with one line for each process that ended and is started
    again."""

    def __init__(self, options: LocalOptions, *, say: Callable[[str], None] = log.warning) -> None:
        self.options = options
        for name in ("replicas", "coordinators", "rows"):
            if getattr(options, name) < 1:
                raise BadRequest(f"{name} is {getattr(options, name)}: give at least 1", field=name)
        self.free_bytes = machine().available_bytes
        self.models = _models(options, self.free_bytes)
        first = self.models[0]
        self.manifest, self.ranges, self.sizing = first.manifest, first.ranges, first.sizing
        self.url = ""
        self.http_urls: tuple[str, ...] = ()
        self.metrics_urls: dict[str, str] = {}
        self._server: NatsServer | None = None
        self._children: dict[str, Child] = {}
        self._supervisor = Supervisor(say)
        self._folder: ScratchFolder | None = None
        self._secure: SecureSite | None = None

    @property
    def bus(self) -> BusOptions:
        """How to connect to this mesh, as its operator."""
        return self._bus_of(OPERATOR)

    @property
    def settings(self) -> dict[str, str | None]:
        """The keys of the `nats` section with which the operator of a secure mesh connects: paths of files, no secret."""
        return _files(self.bus) | {"inbox_prefix": self.bus.inbox_prefix} if self._secure is not None else {}

    @property
    def site(self) -> SecureSite | None:
        """The certificates and users of a secure mesh."""
        return self._secure

    def _bus_of(self, name: str) -> BusOptions:
        if self._secure is not None:
            return self._secure.bus(name, self.url)
        options = replace(self.options.bus or BusOptions(), urls=tuple(self.url.split(",")))
        password = self.options.password
        return options if self._server is None or password is None else replace(options, user=USER, password=password)

    @property
    def shard_count(self) -> int:
        return sum(len(model.ranges) for model in self.models) * self.options.replicas

    @property
    def _shard_names(self) -> dict[str, tuple[LocalModel, LayerRange]]:
        """What each shard serves."""
        cuts = [(model, layers) for model in self.models for layers in model.ranges for _ in range(self.options.replicas)]
        return {f"shard-{number + 1}": cut for number, cut in enumerate(cuts)}

    @property
    def _coordinator_names(self) -> dict[str, LocalModel]:
        of = [model for model in self.models for _ in range(self.options.coordinators)]
        return {f"coordinator-{number + 1}": model for number, model in enumerate(of)}

    @property
    def _gateway_names(self) -> tuple[str, ...]:
        return ("gateway-1",) if self.options.http and len(self.models) > 1 else ()

    @property
    def processes(self) -> dict[str, subprocess.Popen[bytes]]:
        return {name: child.process for name, child in self._children.items()}

    def start(self, *, timeout_s: float = 600.0, progress: Progress = no_progress) -> None:
        """Start everything, and return when the mesh could answer a request. Raises the error of a child that is given up, or
        DeadlineExceeded."""
        options = self.options
        self._folder = ScratchFolder("mesh-up-")
        logs = options.logs or self._folder.path
        logs.mkdir(parents=True, exist_ok=True)
        try:
            if options.nats is None:
                self._server = self._start_server()
                self._supervisor.watch("nats-server", self._server)
                self.url = self._server.url
            else:
                self.url = options.nats
            for number, (name, (model, layers)) in enumerate(self._shard_names.items(), 1):
                config = self._write(f"{name}.yaml", self._shard_config(number, model, layers))
                self._spawn(name, ["shard", "--config", str(config), "--free-port", "--metrics-port", "0"], logs, model)
            for index, (name, model) in enumerate(self._coordinator_names.items()):
                config = self._write(f"{name}.yaml", self._coordinator_config(name, model))
                arguments = [
                    "coordinator",
                    "--config",
                    str(config),
                    "--model",
                    str(model.directory.absolute()),
                    *options.coordinator_arguments,
                ]
                other = ["--free-port"] if options.http_port is None else ["--http-port", "0"] if index else []
                self._spawn(name, [*arguments, *other, "--metrics-port", "0"], logs, model)
            for name in self._gateway_names:
                self._start_gateway(name, logs)
            asyncio.run(self._wait_ready(timeout_s, progress))
        except BaseException:
            self.stop()
            raise

    def restart(self, name: str) -> None:
        """Start the child of this name again; end it first if it is alive. Its log continues."""
        self._supervisor.restart(name)

    @property
    def server(self) -> NatsServer | None:
        """The nats-server that was started; None if the mesh uses others."""
        return self._server

    def supervise(self) -> None:
        """Start again what ends. ServiceError, with the last words of its log, once a process keeps ending. Call it from the main thread. A
        shard that was drained is not started again."""
        self._supervisor.run()

    def stop(self) -> None:
        """End everything, gateways and coordinators first. Idempotent."""
        for group in ("gateway", "coordinator", "shard"):
            members = [child for name, child in self._children.items() if name.startswith(group)]
            for child in members:
                child.process.terminate()
            deadline = time.monotonic() + _STOP_S
            for child in members:
                try:
                    child.process.wait(max(deadline - time.monotonic(), 0))
                except subprocess.TimeoutExpired:
                    child.kill()
        self._children = {}
        if self._server is not None:
            self._server.stop()
            self._server = None
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def __enter__(self) -> LocalMesh:
        if not self.url:
            self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    # -- inside --------------------------------------------------------------------------------------------------------

    def _start_gateway(self, name: str, logs: Path) -> None:
        """It says its ports to nobody, so they are chosen here."""
        http, metrics = _free_port(DEFAULT_HTTP_PORT) if self.options.http_port is None else self.options.http_port, _free_port()
        config = self._write(f"{name}.yaml", {"gateway": {"drain_timeout": _HTTP_DRAIN_S}, "nats": self._nats_section(name)})
        ports = ["--http-port", str(http or _free_port()), "--metrics-port", str(metrics)]
        self._spawn(name, ["gateway", "--config", str(config), *ports], logs)

    def _spawn(self, name: str, arguments: Sequence[str], logs: Path, model: LocalModel | None = None) -> None:
        command = dying_with_parent([sys.executable, "-m", "mesh.cli", *arguments])
        child = self._children[name] = Child(command, logs / f"{name}.log", self._environment())
        group = model.name if model is not None and len(self.models) > 1 else None
        self._supervisor.watch(name, child, may_leave=name.startswith("shard"), group=group)

    def _write(self, name: str, content: object) -> Path:
        assert self._folder is not None
        path = self._folder.path / name
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    def _start_server(self) -> NatsServer:
        assert self._folder is not None
        options = self.options
        if not options.secure:
            return NatsServer.start(port=options.port, password=options.password)
        self._secure = SecureSite(
            self._folder.path / "secure",
            shards=list(self._shard_names),
            coordinators=list(self._coordinator_names),
            gateways=self._gateway_names,
        )
        return NatsServer.start(config=self._secure.config, port=options.port)

    def _nats_section(self, name: str) -> object:
        """The `nats` section of the file of a child of this name. Secrets are not in it; `_environment` passes them."""
        bus = self._bus_of(name)
        files = _files(bus)
        section = {"urls": list(bus.urls), "user": bus.user, "inbox_prefix": bus.inbox_prefix}
        section |= {key: str(Path(file).absolute()) for key, file in files.items() if file is not None}
        return {key: value for key, value in section.items() if value is not None}

    def _environment(self) -> dict[str, str]:
        """The children's environment: this process's, without its variables for the connection (that is in the children's files), and with
        the secrets."""
        named = {f"{ENV_PREFIX}{before}{key.upper()}" for key in NatsSection.model_fields for before in ("", "NATS_", "NATS__")}
        secrets = {"MESH_NATS_PASSWORD": self.bus.password, "MESH_NATS_TOKEN": self.bus.token}
        kept = {name: value for name, value in os.environ.items() if name not in named}
        return kept | {name: value for name, value in secrets.items() if value is not None}

    def _shard_config(self, number: int, model: LocalModel, layers: LayerRange) -> object:
        options, shares = self.options, model.sizing.allowed_bytes
        memory = options.memory_bytes or (_MUCH if shares is None else shares[model.ranges.index(layers)])
        return {
            "shard": {"shard_id": number, "listen_port": 0, "replication_mode": options.mode},
            "nats": self._nats_section(f"shard-{number}"),
            "model": {"shard_path": str(model.directory.absolute()), "layers_start": layers.start, "layers_end": layers.stop},
            "resources": {"max_memory_gb": memory / GB},
            "performance": {"batch_size": options.rows, "max_sequence_length": model.sizing.context},
        }

    def _coordinator_config(self, name: str, model: LocalModel) -> object:
        options = self.options
        interval = min(5.0, options.failover_timeout_s / 2)
        return {
            "coordinator": {
                "health_check_interval": interval,
                "serve_http": options.http and not self._gateway_names,
                "listen_port": DEFAULT_HTTP_PORT if options.http_port is None else options.http_port,
                "drain_timeout": _HTTP_DRAIN_S,
            },
            "nats": self._nats_section(name),
            "distributed": {
                "shards_count": len(model.ranges),
                "replication_factor": options.replicas,
                "failover_timeout": options.failover_timeout_s,
                "load_balancing_strategy": options.strategy,
                "prefix_reuse": options.prefix_reuse,
            },
            "memory": {"enable_compression": options.compression},
        }

    async def _wait_ready(self, timeout_s: float, progress: Progress) -> None:
        changed = asyncio.Event()
        async with (
            asyncio.timeout(timeout_s) as limit,
            await Bus.connect(self.bus, name="mesh-up") as bus,
        ):
            table = LeaseTable(Bucket(bus, KV_SHARDS, ttl_s=LEASE_TTL_S), ShardLease, lambda name, lease: changed.set())
            await table.start(timeout_s=_JETSTREAM_S)
            async with AsyncMeshClient(options=self.bus) as client:
                try:
                    while True:
                        self._supervisor.check()
                        mine = {child.pid for child in self._children.values()}
                        leases = [lease for lease in table.leases.values() if lease.pid in mine]
                        ready = sum(lease.state == "ready" for lease in leases)
                        states = sorted({lease.state for lease in leases} - {"ready"})
                        progress(f"shards {', '.join(states) or 'starting'}", ready, self.shard_count)
                        whole = ready == self.shard_count and await self._answers(client)
                        if whole and self._take_urls(leases, [coordinator.stats for coordinator in await client.coordinators()]):
                            self._supervisor.ready()
                            return
                        changed.clear()
                        try:
                            await asyncio.wait_for(changed.wait(), 0.25)  # nothing is announced when a child ends
                        except TimeoutError:
                            continue
                except asyncio.CancelledError:
                    if limit.expired():
                        raise DeadlineExceeded(f"the mesh was not ready within {timeout_s:g} s: {self._last_words()}") from None
                    raise
                finally:
                    await table.stop()

    async def _answers(self, client: AsyncMeshClient) -> bool:
        """Whether each model could answer a request, and each gateway listens."""
        for model in self.models:
            if not (await client.health(model.name)).ready:
                return False
        for name in self._gateway_names:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", _port_of(self._children[name], "--http-port"))
            except OSError:
                return False
            writer.close()
        return True

    def _take_urls(self, leases: Sequence[ShardLease], coordinators: Sequence[CoordinatorStats]) -> bool:
        """Note where the processes answer HTTP; False while one of them has not said so. A process that is started again takes the same
        ports."""
        said = {lease.pid: lease.metrics for lease in leases} | {stats.pid: stats.metrics for stats in coordinators}
        urls = {stats.pid: stats.http for stats in coordinators if stats.http}
        gateways = [self._children[name] for name in self._gateway_names]
        said |= {child.pid: f"http://127.0.0.1:{_port_of(child, '--metrics-port')}/metrics" for child in gateways}
        by_coordinators = self.options.http and not gateways
        serving = [child for name, child in self._children.items() if name.startswith("coordinator") and by_coordinators]
        if any(child.pid not in said for child in self._children.values()) or any(child.pid not in urls for child in serving):
            return False
        self.http_urls = tuple(sorted((urls[child.pid] for child in serving), key=lambda url: not url.endswith(f":{DEFAULT_HTTP_PORT}")))
        for child in serving:
            child.command += ["--http-port", urls[child.pid].rpartition(":")[2]]
        self.http_urls += tuple(f"http://127.0.0.1:{_port_of(child, '--http-port')}" for child in gateways)
        self.metrics_urls = {name: said[child.pid] for name, child in self._children.items() if said[child.pid]}
        for name, url in self.metrics_urls.items():
            self._children[name].command += ["--metrics-port", str(urlsplit(url).port)]
        return True

    def _last_words(self) -> str:
        return "; ".join(f"{name}: {(child.log or ['nothing said'])[-1]}" for name, child in self._children.items())


def _models(options: LocalOptions, free_bytes: int) -> tuple[LocalModel, ...]:
    """The models that are served, with what each takes of the memory that is free. BadRequest: two have one name."""
    given = [(options.model, options.shards), *((other.model, other.shards) for other in options.others)]
    wanted, directories = [], [directory for directory, _ in given]
    names: dict[str, Path] = {}
    for directory, shards in given:
        manifest = Manifest.load(directory)
        other = names.setdefault(token(manifest.name), directory)
        if other != directory or directories.count(directory) > 1:
            raise BadRequest(
                f"{other} and {directory} have one name, {manifest.name}: import one of them under another --name", field="model"
            )
        wanted.append(Demand(manifest, even_ranges(manifest.layers, shards), options.replicas, options.rows, options.context))
    sizings = size_together(wanted, available_bytes=free_bytes)
    return tuple(
        LocalModel(directory, each.manifest, list(each.ranges), sizing)
        for directory, each, sizing in zip(directories, wanted, sizings, strict=True)
    )


def _free_port(wanted: int = 0) -> int:
    """A port of loopback that is free now: `wanted`, or any."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError:
            return _free_port()
        port: int = probe.getsockname()[1]
        return port


def _port_of(child: Child, flag: str) -> int:
    return int(child.command[child.command.index(flag) + 1])


def _files(bus: BusOptions) -> dict[str, str | None]:
    """The files of a connection, by the keys of the `nats` section."""
    return {
        "credentials_file": bus.credentials,
        "nkey_seed_file": bus.nkey_seed,
        "tls_ca_file": bus.tls_ca,
        "tls_cert_file": bus.tls_cert,
        "tls_key_file": bus.tls_key,
    }
