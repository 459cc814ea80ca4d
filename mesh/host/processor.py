"""What this machine computes with, as its system says."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

__all__ = ["machine_id", "processor_features", "processor_name"]


def processor_name() -> str:
    """The processor's model name, or "processor unknown"."""
    names = (line for line in _cpuinfo() if line.startswith("model name"))
    return next(names, ":processor unknown").partition(":")[2].strip()


def processor_features() -> list[str]:
    """The lines of /proc/cpuinfo that name the processor and its instruction sets; empty where there is no such file."""
    return sorted({line for line in _cpuinfo() if line.startswith(("model name", "flags", "Features"))})


def machine_id() -> str:
    """The same for every process of this machine until it starts again."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return platform.node()


def _cpuinfo() -> list[str]:
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text().splitlines()
    return []
