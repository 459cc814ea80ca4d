"""From the files of a model directory to lowered blocks and their weights on the device."""

from __future__ import annotations

import mmap
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx

from mesh.errors import CorruptModel
from mesh.lowering import Lowered, lower
from mesh.lowering.join import join_products
from mesh.lowering.weights import PackedWeight, Variants, pack
from mesh.model.manifest import block_name
from mesh.runtime.canonical import canonical
from mesh.types import LayerRange

__all__ = ["Block", "block_names", "load_block"]


_GONE = np.empty(0, np.float32)


@dataclass(frozen=True)
class Block:
    """One lowered block under canonical names, and its weights on the device. Blocks of equal `signature` share one program."""

    name: str
    signature: str
    lowered: Lowered
    weights: dict[str, Any]

    @property
    def weight_bytes(self) -> int:
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.weights))


def block_names(layers: LayerRange, *, embed: bool, head: bool) -> list[str]:
    """Names of the blocks a range runs, in order."""
    names = [block_name(i) for i in layers]
    return ([block_name("embed")] if embed else []) + names + ([block_name("head")] if head else [])


def read_model(path: Path) -> onnx.ModelProto:
    """The graph without its weights. CorruptModel: the file is no graph."""
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own errors for a damaged file, and the system's for a missing one
        raise CorruptModel(f"{path} cannot be read ({type(error).__name__}): fetch or import the model again") from None


def load_block(directory: Path, name: str, *, variants: Callable[[PackedWeight], Variants] | None = None) -> Block:
    """Read one block; `variants` chooses the product variants of each packed weight (None: the defaults)."""
    path = Path(directory) / f"{name}.onnx"
    signature, lowered = canonical(lower(read_model(path), base_dir=path.parent))
    packable = _matmul_weights(lowered)
    graph, joined = join_products(lowered, packable)
    names = {part: (part,) for part in lowered.weights} | joined
    for parts in joined.values():
        for part in parts:
            del names[part]
    weights: dict[str, Any] = {}
    for key, parts in names.items():
        arrays = [lowered.weights[part] for part in parts]
        if parts[0] in packable:
            weight = pack([(array, lowered.packed.get(part)) for array, part in zip(arrays, parts, strict=True)])
            weights[key] = weight if variants is None else weight.with_variants(variants(weight))
            for array in arrays:
                _forget_pages(array)
        else:
            weights[key] = jnp.asarray(arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1))
    # From here on the graph needs only the names of the weights: release the mapped file.
    bare = Lowered(graph, dict.fromkeys(weights, _GONE), lowered.packed, lowered.static_inputs)
    return Block(name, signature, bare, weights)


def _forget_pages(array: np.ndarray) -> None:
    """Let the system drop the pages of a mapped file that was read: otherwise a block would be in memory twice."""
    mapped: Any = array
    while mapped is not None and not isinstance(mapped, mmap.mmap):
        mapped = getattr(mapped, "base", None)
    if mapped is None or not hasattr(mapped, "madvise"):
        return
    whole = np.frombuffer(mapped, np.uint8)
    start = array.__array_interface__["data"][0] - whole.__array_interface__["data"][0]
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        mapped.madvise(mmap.MADV_DONTNEED, first, length)


def _matmul_weights(lowered: Lowered) -> set[str]:
    """The weights [in, out] that only serve as right operands of MatMul, directly or through one Cast or DequantizeLinear."""
    uses: dict[str, list[tuple[str, int, tuple[str, ...]]]] = defaultdict(list)  # value -> (op, position, outputs)
    for node in lowered.graph.nodes:
        for position, name in enumerate(node.inputs):
            uses[name].append((node.op.op_type if node.op.domain == "" else "", position, node.outputs))

    def right_operand(name: str) -> bool:
        return bool(uses[name]) and all(op == "MatMul" and position == 1 for op, position, _ in uses[name])

    def through(name: str) -> bool:
        return bool(uses[name]) and all(
            op in ("Cast", "DequantizeLinear") and position == 0 and right_operand(outputs[0]) for op, position, outputs in uses[name]
        )

    def rank(name: str) -> int:
        return len(lowered.packed[name].shape) if name in lowered.packed else int(lowered.weights[name].ndim)

    outputs = set(lowered.graph.outputs)
    return {name for name in lowered.weights if rank(name) == 2 and name not in outputs and (right_operand(name) or through(name))}
