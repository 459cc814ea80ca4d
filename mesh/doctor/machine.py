"""This machine: what a shard, a coordinator or a gateway would find here. No mesh has to run."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import orjson

from mesh import __version__
from mesh.doctor.findings import Finding, error, ok, skipped, warning
from mesh.errors import ConfigError
from mesh.host.machine import Machine, disk_of, local_ports, machine
from mesh.host.paths import cache_directory
from mesh.local.nats_server import find_binary
from mesh.settings.units import format_bytes

__all__ = ["check_machine", "check_port"]

_FEW_FILES: Final = 256
_WANTED_FILES: Final = 1256
"""A thousand HTTP connections, and what a process has open besides."""
_FEW_PORTS: Final = 10_000
_BUSY_PORTS: Final = 0.8
_LITTLE_DISK: Final = 1_000_000_000
_NO_DISK: Final = 100_000_000
_LITTLE_MEMORY: Final = 1_000_000_000


def check_machine() -> Iterator[Finding]:
    """Everything but the ports of HTTP."""
    here = machine()
    yield from _programs()
    yield from _processor(here)
    yield from _kernels(here)
    yield from _memory(here)
    yield from _files(here)
    yield from _local_ports()
    yield from _disk("disk (cache)", cache_directory(), "compiled programs and fetched models", "set MESH_CACHE_DIR to a folder with room")
    yield from _disk("disk (temporary)", Path(tempfile.gettempdir()), "JetStream of a `mesh up`", "set TMPDIR to a folder with room")


def check_port(host: str, port: int) -> Finding:
    """Whether HTTP could be served on a port. Ask only where no process of the mesh is meant to be there already."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as reason:
        advice = "stop the program that has it (`ss -ltnp`), or choose another port with --http-port or listen_port"
        return warning("HTTP port", f"port {port} of {host} cannot be taken: {reason.strerror}", advice)
    return ok("HTTP port", f"port {port} of {host} is free")


def _programs() -> Iterator[Finding]:
    try:
        jax = f"jax {version('jax')}"
    except PackageNotFoundError:
        yield warning(
            "programs", f"stagemesh {__version__}, without jax", "a shard needs it: pip install 'stagemesh' with its dependencies"
        )
    else:
        yield ok("programs", f"stagemesh {__version__}, {jax}")
    try:
        yield ok("nats-server", f"the program is at {find_binary()}")
    except ConfigError as reason:
        yield warning("nats-server", "the program is not there, so that `mesh up` needs --nats", str(reason))


def _processor(here: Machine) -> Iterator[Finding]:
    has = ", ".join(here.features) or "no instruction set that is known to matter"
    found = f"{here.processor}, {here.usable_cores} of {here.cores} cores usable ({has})"
    x86 = not any(name in here.features for name in ("asimd", "sve"))
    if x86 and "avx2" not in here.features:
        yield warning(
            "processor", found, "without AVX2 products take several times as long: use another machine, or pass its flags to the guest"
        )
    else:
        yield ok("processor", found)
    if here.quota_cores is not None and here.quota_cores < here.usable_cores:
        count = max(int(here.quota_cores), 1)
        yield warning(
            "threads",
            f"the container may use the time of {here.quota_cores:g} cores, and a shard starts {here.usable_cores} threads",
            f"set resources.worker_threads: {count} (or --threads {count}): threads beyond the quota are stopped in the middle of a step",
        )


def _kernels(here: Machine) -> Iterator[Finding]:
    path = cache_directory() / "forms.json"
    try:
        known = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError):
        known = {}
    prefix = f"{here.processor}, {here.cores} cores, "
    count = sum(isinstance(key, str) and key.startswith(prefix) for key in known) if isinstance(known, dict) else 0
    if count:
        yield ok("kernels", f"{count} products were measured on this machine (`mesh tune`)")
    else:
        yield ok(
            "kernels", "no product was measured on this machine: the usual variants are used", "for a 32-bit model: mesh tune MODEL_DIR"
        )


def _memory(here: Machine) -> Iterator[Finding]:
    contained = here.limit_bytes < here.memory_bytes
    found = f"{format_bytes(here.available_bytes)} of {format_bytes(here.limit_bytes)} are free"
    found += f" (a limit of the container; the machine has {format_bytes(here.memory_bytes)})" if contained else ""
    if here.available_bytes < _LITTLE_MEMORY:
        yield warning("memory", found, "end other programs, or raise the container's limit: `mesh plan MODEL --nodes SIZE` says what fits")
    else:
        yield ok("memory", found)


def _files(here: Machine) -> Iterator[Finding]:
    if not here.open_files:
        return
    found = f"a process may have {here.open_files:,} files open"
    advice = f"raise the hard limit to {_WANTED_FILES} or more: `ulimit -Hn`, LimitNOFILE= of systemd, --ulimit nofile of docker"
    if here.open_files < _FEW_FILES:
        yield error("open files", found, advice)
    elif here.open_files < _WANTED_FILES:
        yield warning("open files", found, f"{advice}; or lower max_connections")
    else:
        yield ok("open files", found)


def _local_ports() -> Iterator[Finding]:
    ports = local_ports()
    if ports is None:
        yield skipped("local ports", "the system does not say which ports connections may use", "nothing to do where it is no Linux")
    elif ports.count < _FEW_PORTS or ports.used > _BUSY_PORTS * ports.count:
        found = f"{ports.used:,} of {ports.count:,} ports for outgoing connections are in use"
        yield warning("local ports", found, "widen net.ipv4.ip_local_port_range, or end what opens so many connections")
    else:
        yield ok("local ports", f"{ports.used:,} of {ports.count:,} ports for outgoing connections are in use")


def _disk(check: str, folder: Path, what: str, advice: str) -> Iterator[Finding]:
    disk = disk_of(folder)
    if disk is None:
        yield error(check, f"{folder} is on no disk", advice)
        return
    found = f"{format_bytes(disk.free_bytes)} free at {folder}, for {what}"
    if not disk.writable:
        yield error(check, f"{folder} cannot be written", advice)
    elif disk.free_bytes < _NO_DISK:
        yield error(check, found, advice)
    elif disk.free_bytes < _LITTLE_DISK:
        yield warning(check, found, advice)
    else:
        yield ok(check, found)
