"""The compiled kernels: found, loaded and made known to XLA, once for a process."""

from __future__ import annotations

import ctypes
import os
import threading
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import jax

__all__ = ["Kernels", "kernels"]

_LIBRARY = Path(__file__).with_name("native") / "kernels.so"
_TARGETS = ("mesh_products", "mesh_expert_products", "mesh_attention", "mesh_likeliest")
_VERSION = 8
"""Of the calls in calls.py. handlers.cpp has the same number: a library that was built from other sources is not used."""
_WITH_TILES = ("amx", "avx512bf16", "avx512vnni")
_SLOWER = "narrow weights are multiplied several times slower"


@dataclass(frozen=True, slots=True)
class Kernels:
    """What this process multiplies with. `name`: the processor's kernels, such as avx512bf16; None: XLA's forms, and `reason` says why.
    `digest`: changes whenever compiled programs have to."""

    name: str | None
    reason: str = ""
    digest: str = ""

    @property
    def reads_tiles(self) -> bool:
        """Whether codes of 4, 6 and 8 bits are best laid out in tiles (mesh/kernels/native/weight.h)."""
        return self.name in _WITH_TILES

    def __str__(self) -> str:
        return self.name or f"none ({self.reason}): {_SLOWER}"


_lock = threading.Lock()


def kernels() -> Kernels:
    """The kernels of this process. MESH_KERNELS names others that the processor has (amx, avx512bf16, avx512vnni, avx512, avx2, neon,
    portable), or none."""
    with _lock:  # XLA is told once, whichever of several stages that load at the same time is first
        return _found()


@cache
def _found() -> Kernels:
    if os.environ.get("MESH_KERNELS") == "none":
        return Kernels(None, "MESH_KERNELS is none")
    if jax.default_backend() != "cpu":
        return Kernels(None, f"this process computes on a {jax.default_backend()}")
    if not _LIBRARY.is_file():
        return Kernels(None, "the package was installed without a C++ compiler")
    try:
        library = ctypes.CDLL(str(_LIBRARY))
        if not hasattr(library, "mesh_kernels_version") or library.mesh_kernels_version() != _VERSION:
            return Kernels(None, f"{_LIBRARY.name} was built from another version of the package: install the package again")
        for target in _TARGETS:
            jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    except Exception as error:  # of another platform, or for another version of XLA
        return Kernels(None, f"{_LIBRARY.name} cannot be used here: {error}")
    library.mesh_kernels_name.restype = ctypes.c_char_p
    name = library.mesh_kernels_name().decode()
    return Kernels(name, digest=f"{name} {sha256(_LIBRARY.read_bytes()).hexdigest()}")
