"""Process-wide JAX settings, made once by whoever owns the process (never by importing a module)."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path

import jax

from mesh.paths import cache_directory

__all__ = ["cache_directory", "prepare", "processor"]


def prepare() -> None:
    """Keep compiled programs across processes (a cache that cannot be written is done without), and let float32 mean float32: a
    GPU would otherwise multiply in TF32, and greedy tokens would differ from the reference's."""
    jax.config.update("jax_default_matmul_precision", "highest")
    directory = cache_directory() / "xla"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@cache
def processor() -> str:
    """A name of what computes for this process: the same for every process of a machine that computes on its CPU; an accelerator is
    taken to be this process's own."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        machine = platform.node()
    backend = jax.default_backend()
    return f"{machine}/{backend}" if backend == "cpu" else f"{machine}/{backend}/{os.getpid()}"
