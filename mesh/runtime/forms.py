"""Choosing the form of each product by measuring it on this machine, once: the choices are kept beside the compiled programs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import jax
import orjson

from mesh.lowering import linear
from mesh.lowering.weights import Forms, PackedWeight
from mesh.runtime.device import cache_directory

__all__ = ["Tuner"]

_LARGEST = 64  # rows; beyond, every product is one GEMM


class Tuner:
    """Measures products for the row counts a stage will run, remembering by shape, stored type, rows, machine and JAX version."""

    def __init__(self, rows: Sequence[int], *, path: Path | None = None) -> None:
        self.rows = sorted({count for count in rows if count <= _LARGEST})
        self.path = path or cache_directory() / "forms.json"
        self._machine = f"{jax.__version__} {jax.default_backend()} {os.cpu_count()} {_processor()}"
        self._known = self._load()
        self._dtype = jax.numpy.float32

    def forms(self, weight: PackedWeight) -> Forms:
        """The fastest form for each row count, ascending."""
        chosen = []
        for rows in self.rows:
            names = linear.candidates(rows, weight.codes)
            chosen.append((rows, names[0] if len(names) == 1 else self._best(weight, rows)))
        return tuple(chosen)

    def _best(self, weight: PackedWeight, rows: int) -> str:
        codes = weight.codes
        kind = codes.nibbles or codes.data.dtype.name
        key = f"{self._machine} | {codes.shape[0]}x{codes.shape[1]} {kind} | {rows}"
        if self._known.get(key) not in linear.FORMS:
            self._known[key] = linear.measure(codes, rows, self._dtype)
            self._save()
        return self._known[key]

    def _load(self) -> dict[str, str]:
        try:
            found = orjson.loads(self.path.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return {}
        return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}

    def _save(self) -> None:
        """Whole or not at all; a folder that cannot be written costs measuring again next time."""
        part = self.path.with_suffix(f".{os.getpid()}.part")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(orjson.dumps(self._known, option=orjson.OPT_INDENT_2))
            part.replace(self.path)


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"
