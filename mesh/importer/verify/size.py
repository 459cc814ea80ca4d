"""How many bits a model directory stores for each of its weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto
from onnx.external_data_helper import uses_external_data

from mesh.lowering.tensors import TensorReader
from mesh.model.manifest import Manifest, block_name
from mesh.runtime.loading import read_model

__all__ = ["bits_per_weight", "equal"]

COMPARED_BYTES = 16 << 20


def bits_per_weight(directory: Path, manifest: Manifest) -> float:
    """All that is stored, scales and minima included, over the number of weights. A table of tokens that the head has in the same bytes is
    one weight, and counted once."""
    blocks = [block for block in manifest.blocks if block.name != block_name("embed") or not _head_has_table(directory)]
    return 8 * sum(block.weight_bytes for block in blocks) / max(1, sum(block.parameters for block in blocks))


def _head_has_table(directory: Path) -> bool:
    """Whether all large weights of embed are in the head too, byte for byte."""
    embed, head = (_large(directory, block_name(name)) for name in ("embed", "head"))
    reader = TensorReader(directory)

    def same(a: TensorProto, b: TensorProto) -> bool:
        if a.data_type != b.data_type or list(a.dims) != list(b.dims):
            return False
        first, second = (reader.read(each).reshape(-1).view(np.uint8) for each in (a, b))
        return equal(first, second)

    return bool(embed) and all(any(same(each, other) for other in head) for each in embed)


def equal(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Whether two arrays hold the same numbers. Compared piece by piece: it takes no more memory for larger ones."""
    if a.shape != b.shape:
        return False
    step = max(1, COMPARED_BYTES * len(a) // max(1, a.nbytes))
    return all(np.array_equal(a[start : start + step], b[start : start + step]) for start in range(0, len(a), step))


def _large(directory: Path, name: str) -> list[TensorProto]:
    return [tensor for tensor in read_model(directory / f"{name}.onnx").graph.initializer if uses_external_data(tensor)]
