"""What this machine gives a process: processors, memory, open files, ports, disk. Limits of a container count."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

from mesh.host.processor import processor_features, processor_name

__all__ = ["Disk", "Machine", "Ports", "disk_of", "local_ports", "machine"]

FEATURES: Final = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
"""Instruction sets that matter for products of matrices."""

_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Machine:
    """`cores`: of the machine; `usable_cores`: those that this process may run on; `quota_cores`: the processor time that its container
    may use, in cores (None: no limit). `limit_bytes`: the memory that the process can have at most: that of the machine, or of its
    container. `available_bytes`: what of it is free now. `open_files`: the most files that the process may raise its limit to."""

    processor: str
    features: tuple[str, ...]
    cores: int
    usable_cores: int
    quota_cores: float | None
    memory_bytes: int
    limit_bytes: int
    available_bytes: int
    open_files: int


@dataclass(frozen=True, slots=True)
class Ports:
    """The ports for connections that this machine opens: how many there are, and how many of these are in use (TCP over IPv4 and 6)."""

    count: int
    used: int


@dataclass(frozen=True, slots=True)
class Disk:
    """The disk of a folder."""

    total_bytes: int
    free_bytes: int
    writable: bool


def machine() -> Machine:
    """This machine, as this process sees it now."""
    memory = _meminfo("MemTotal")
    limit, used = _cgroup_memory()
    available = _meminfo("MemAvailable")
    if limit is not None:
        available = min(available, max(limit - used, 0)) if available else max(limit - used, 0)
    return Machine(
        processor=_processor(),
        features=_features(),
        cores=os.cpu_count() or 1,
        usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        quota_cores=_cgroup_cores(),
        memory_bytes=memory,
        limit_bytes=memory if limit is None else min(memory or limit, limit),
        available_bytes=available,
        open_files=_open_files(),
    )


@cache
def _processor() -> str:
    return processor_name()


@cache
def _features() -> tuple[str, ...]:
    words = {word for line in processor_features() for word in line.split()}
    return tuple(name for name in FEATURES if name in words)


def local_ports() -> Ports | None:
    """None: the system does not say."""
    try:
        first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
        used = set()
        for table in ("tcp", "tcp6"):
            path = Path("/proc/net") / table
            if path.exists():
                used |= {int(line.split()[1].rpartition(":")[2], 16) for line in path.read_text().splitlines()[1:]}
    except (OSError, ValueError, IndexError):
        return None
    return Ports(last - first + 1, sum(first <= port <= last for port in used))


def disk_of(folder: Path) -> Disk | None:
    """The disk on which `folder` is, or would be made; None: there is no such place."""
    there = next((path for path in (folder, *folder.absolute().parents) if path.exists()), None)
    if there is None:
        return None
    try:
        usage = shutil.disk_usage(there)
    except OSError:
        return None
    return Disk(usage.total, usage.free, os.access(there, os.W_OK))


def _open_files() -> int:
    if sys.platform == "win32":
        return 0
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2**31 if hard == resource.RLIM_INFINITY else hard


def _meminfo(key: str) -> int:
    """Bytes; 0 where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return 0


def _cgroup_folders(controller: str) -> list[Path]:
    """The folders of this process's control group, the innermost first: each may have a limit. Where version 1 has the controller, they
    are those of version 1."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    below = {name: path for _, names, path in (line for line in lines if len(line) == 3) for name in names.split(",")}
    root = _CGROUP / controller if controller in below else _CGROUP
    inner = root / below.get(controller, below.get("", "")).lstrip("/")
    return [path for path in (inner, *inner.parents) if path == root or root in path.parents]


def _cgroup_memory() -> tuple[int | None, int]:
    """(limit, used) in bytes of the tightest control group; None: there is no limit. Pages of files that the system can drop are not
    used."""
    found: list[tuple[int, int]] = []
    for folder in _cgroup_folders("memory"):
        for limit_name, used_name, prefix in (
            ("memory.max", "memory.current", ""),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
        ):
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is not None and limit < 2**60:
                files = _statistics(folder / "memory.stat")
                dropped = sum(files.get(f"{prefix}{name}_file", 0) for name in ("active", "inactive"))
                found.append((limit, max((used or 0) - dropped, 0)))
    return min(found, key=lambda one: (one[0] - one[1], one[0])) if found else (None, 0)


def _statistics(path: Path) -> dict[str, int]:
    """The lines `NAME NUMBER` of a file."""
    try:
        lines = [line.split() for line in path.read_text().splitlines()]
        return {line[0]: int(line[1]) for line in lines if len(line) == 2}
    except (OSError, ValueError):
        return {}


def _cgroup_cores() -> float | None:
    found = []
    for folder in _cgroup_folders("cpu"):
        try:
            quota, period = (folder / "cpu.max").read_text().split()
            found.append(int(quota) / int(period))
        except (OSError, ValueError):
            quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
            if quota_us and period_us and quota_us > 0:
                found.append(quota_us / period_us)
    return min(found) if found else None


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
