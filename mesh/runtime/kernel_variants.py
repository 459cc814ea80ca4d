"""The fastest variant of each product: measured on this machine by `mesh tune`, kept beside the compiled programs, looked up at load.

Measuring takes seconds for each shape, so a stage does not do it. Without an entry it uses the default of mesh/lowering/linear.py.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import orjson

from mesh.host.paths import cache_directory
from mesh.host.processor import processor_name
from mesh.lowering import linear
from mesh.lowering.weights import PackedWeight, Variants

__all__ = ["VariantTable"]


class VariantTable:
    """Variants by (machine, JAX version, weight shape and type, rows)."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cache_directory() / "forms.json"
        self._machine = f"{processor_name()}, {os.cpu_count()} cores, {jax.default_backend()}, jax {jax.__version__}"
        self._known = self._load()

    def lookup(self, weight: PackedWeight) -> Variants:
        """The variants that were measured for this weight, ascending in rows; empty if nothing was measured."""
        return tuple(
            sorted((int(rows), variant) for rows, variant in self._known.get(self._key(weight), {}).items() if variant in linear.VARIANTS)
        )

    def tune(self, weights: Iterable[PackedWeight], rows: Sequence[int]) -> Iterable[tuple[str, int, dict[str, float]]]:
        """Measure each shape that is not known yet. Yields (weight, rows, seconds of each variant) as it proceeds."""
        for weight in weights:
            known = self._known.setdefault(self._key(weight), {})
            for count in rows:
                if str(count) in known or len(linear.candidates(count, weight.codes)) == 1:
                    continue
                seconds = linear.measure(weight.codes, count)
                known[str(count)] = min(seconds, key=lambda variant: seconds[variant])
                self._save()
                yield f"{weight.shape[0]} x {weight.shape[1]}", count, seconds

    def _key(self, weight: PackedWeight) -> str:
        codes = weight.codes
        return f"{self._machine}: {codes.shape[0]}x{codes.shape[1]} {codes.stored_as}"

    def _load(self) -> dict[str, dict[str, str]]:
        try:
            found = orjson.loads(self.path.read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return {}
        return {key: value for key, value in found.items() if isinstance(value, dict)} if isinstance(found, dict) else {}

    def _save(self) -> None:
        """Write the whole file or nothing. If the folder cannot be written, the next run measures again."""
        part = self.path.with_suffix(f".{os.getpid()}.part")
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_bytes(orjson.dumps(self._known, option=orjson.OPT_INDENT_2))
            part.replace(self.path)
