"""Process-wide JAX settings, made once by whoever owns the process (never by importing a module)."""

from __future__ import annotations

import jax

from mesh.paths import cache_directory

__all__ = ["cache_directory", "prepare"]


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
