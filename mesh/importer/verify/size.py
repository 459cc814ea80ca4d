"""How many bits a model directory stores for each of its weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto
from onnx.external_data_helper import uses_external_data

from mesh.lowering.tensors import TensorReader
from mesh.model.manifest import Manifest, block_name
from mesh.runtime.loading import read_model

__all__ = ["bits_per_weight"]


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
        return np.array_equal(first, second)

    return bool(embed) and all(any(same(each, other) for other in head) for each in embed)


def _large(directory: Path, name: str) -> list[TensorProto]:
    return [tensor for tensor in read_model(directory / f"{name}.onnx").graph.initializer if uses_external_data(tensor)]
