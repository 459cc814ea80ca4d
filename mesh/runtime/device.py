"""Settings of JAX for the whole process. The owner of the process makes them once; importing a module never does."""

from __future__ import annotations

import contextlib
import os
from functools import cache
from pathlib import Path
from typing import TypedDict

import jax

from mesh.host.processor import machine_id
from mesh.kernels.library import kernels
from mesh.runtime.cache import in_blocks

__all__ = ["Habits", "keeps_programs", "memory", "memory_habits", "prepare", "processor"]

_WORKER = "tf_XLAEigen"
"""The name of the threads that compute."""


_prepared = False


def prepare() -> None:
    """Keep compiled programs across processes (mesh/runtime/executables.py), and compute float32 products in float32. A GPU would
    otherwise multiply in TF32, and greedy tokens would differ from the reference's. Call it once the process has its cores and its
    device."""
    global _prepared
    jax.config.update("jax_default_matmul_precision", "highest")
    # JAX's own cache stays off: an executable that was loaded from it cannot be serialised again with its functions.
    jax.config.update("jax_enable_compilation_cache", False)
    _pin_workers()
    _prepared = True


class Habits(TypedDict):
    """What of a process its memory depends on: see mesh/model/memory.py."""

    widens: bool
    in_blocks: bool


def memory_habits() -> Habits:
    """Those of this process."""
    return {"widens": kernels().name is None, "in_blocks": in_blocks()}


def keeps_programs() -> bool:
    """Whether `prepare` has been called. Tests and tools that have not called it leave no files behind."""
    return _prepared


def _pin_workers() -> None:
    """Give each of XLA's worker threads a core of its own. They sleep between two steps. If the kernel wakes two of them on one core, or
    one beside the thread that waits for them, a step begins on fewer cores than it has: 10 to 20 % of a short step."""
    if jax.default_backend() != "cpu" or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.suppress(OSError):  # no /proc, or not allowed: the kernel decides
        workers = [int(task.name) for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text().strip() == _WORKER]
        if len(workers) <= len(cores):
            for worker, core in zip(sorted(workers), cores, strict=False):
                os.sched_setaffinity(worker, {core})


@cache
def processor() -> str:
    """A name of what computes for this process. All processes of a machine that compute on its CPU have the same name; an accelerator
    is taken to belong to this process alone."""
    machine, backend = machine_id(), jax.default_backend()
    return f"{machine}/{backend}" if backend == "cpu" else f"{machine}/{backend}/{os.getpid()}"


def memory() -> list[tuple[str, dict[str, int]]]:
    """(device, bytes by kind: used, peak, limit) of each device that reports them. A CPU reports nothing."""
    found = []
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        names = {"used": "bytes_in_use", "peak": "peak_bytes_in_use", "limit": "bytes_limit"}
        figures = {kind: int(stats[name]) for kind, name in names.items() if name in stats}
        if figures:
            found.append((f"{device.platform}:{device.id}", figures))
    return found
