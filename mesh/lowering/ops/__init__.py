"""The ops, by family. Importing a module of this package registers its ops; `load` imports them all.

activation, elementwise, norm, matmul                arithmetic
attention, recurrent, recurrent_attention, contrib   attention, recurrences, onnxruntime's own ops
cast, quant                                          types and quantization
indexing, shape, reduce, control                     gathers, shapes, reductions, control flow
conv, pool, resize, signal, random                   images, signals, Dropout
"""

from __future__ import annotations

import importlib
import pkgutil

__all__ = ["load"]

_loaded = False


def load() -> None:
    """Register every op of this package, once."""
    global _loaded
    if not _loaded:
        for module in pkgutil.iter_modules(__path__):
            importlib.import_module(f"{__name__}.{module.name}")
        _loaded = True
