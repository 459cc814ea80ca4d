"""Process-wide JAX settings, made once by whoever owns the process (never by importing a module)."""

from __future__ import annotations

import os
from pathlib import Path

import jax

__all__ = ["cache_directory", "prepare"]


def cache_directory() -> Path:
    """Where compiled programs and measured product forms are kept: $MESH_CACHE_DIR, or stagemesh in the user's cache."""
    chosen = os.environ.get("MESH_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stagemesh"


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
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
