"""From the files of a model directory to lowered blocks and their weights on the device."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnx

from mesh.errors import CorruptModel
from mesh.host.pages import PIECE_BYTES, aligned, copy_mapped, forget_pages
from mesh.kernels.library import kernels
from mesh.lowering import Lowered, lower
from mesh.lowering.experts import expert_operands, pack_experts
from mesh.lowering.fuse import fuse
from mesh.lowering.join import join_products
from mesh.lowering.operands import RightOperand, operands
from mesh.lowering.prepare import Graph
from mesh.lowering.states import before_vocabulary
from mesh.lowering.tensors import PackedFormat
from mesh.lowering.weights import PackedWeight, Variants, pack
from mesh.model.manifest import block_name
from mesh.runtime.canonical import canonical
from mesh.types import LayerRange

__all__ = ["Block", "block_names", "load_block", "read_model"]


_GONE = np.empty(0, np.float32)


@dataclass(frozen=True)
class Block:
    """One lowered block under canonical names, and its weights on the device. Blocks of equal `signature` share one program."""

    name: str
    signature: str
    lowered: Lowered
    weights: dict[str, Any]
    decode: Lowered
    """The same for a step of one token a row, where kernels do more at once; equal to `lowered` without them."""
    states: Lowered | None = None
    """Of a head: hidden state -> the same after the final norm. None where the head cannot be cut there."""

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


def load_block(
    directory: Path, name: str, *, variants: Callable[[PackedWeight], Variants] | None = None, vocabulary: int | None = None
) -> Block:
    """Read one block; `variants` chooses the product variants of each packed weight (None: the defaults). `vocabulary`: it is a head, for
    so many tokens."""
    path = Path(directory) / f"{name}.onnx"
    signature, lowered = canonical(lower(read_model(path), base_dir=path.parent))
    graph, found = operands(lowered)
    states = None if vocabulary is None else before_vocabulary(lowered, graph, found, vocabulary)
    parts: dict[str, tuple[str, ...]] = {operand: (operand,) for operand in found}
    if kernels().name is None:  # they take several weights in one call
        graph, parts = join_products(graph, found, partial(_stored_as, lowered))

    def read(name: str) -> tuple[np.ndarray, PackedFormat | None]:
        array = lowered.weights[name] if name in lowered.weights else lowered.graph.constants[name]
        return array, lowered.packed.get(name)

    weights: dict[str, Any] = {}
    graph, experts = expert_operands(lowered, graph)
    for key, tensor in experts.items():
        weights[key] = pack_experts(tensor, read)
        for part in tensor.names:
            forget_pages(read(part)[0])
    for key, names in parts.items():
        weight = pack([found[part] for part in names], read)
        weights[key] = weight if variants is None else weight.with_variants(variants(weight))
        for part in names:
            for each in found[part].names:
                forget_pages(read(each)[0])
    packed = {each for operand in found.values() for each in operand.names} | {each for one in experts.values() for each in one.names}
    weights |= {each: _on_device(array) for each, array in lowered.weights.items() if each not in packed}
    # From here on the graph needs only the names of the weights: release the mapped file.
    graphs = [graph, graph] if kernels().name is None else [fuse(graph, weights, decode=decode) for decode in (False, True)]
    bare, decode = (Lowered(each, dict.fromkeys(weights, _GONE), lowered.packed, lowered.static_inputs) for each in graphs)
    held = hashlib.sha256(str(jax.tree.structure(weights)).encode()).hexdigest()  # codes of few bits are packed by their values
    return Block(name, f"{signature} {held}", bare, weights, decode, _states(states, weights, lowered))


def _on_device(array: np.ndarray) -> Any:
    """A weight that stays as it is stored."""
    if array.nbytes <= PIECE_BYTES:
        return jnp.asarray(array)
    copy = aligned(array.shape, array.dtype)
    copy_mapped(array, copy)
    return jax.device_put(copy, may_alias=True)


def _states(graph: Graph | None, weights: Mapping[str, Any], lowered: Lowered) -> Lowered | None:
    """The part of a head that makes states; None where there is none, or where it needs a weight that was joined with another."""
    if graph is None:
        return None
    used = {name for node in graph.nodes for name in (*node.inputs, *node.captured())} - {
        name for node in graph.nodes for name in node.outputs
    }
    own = [name for name in weights if name in used]
    if used - {"", *own, *graph.inputs, *graph.constants}:
        return None
    return Lowered(graph, dict.fromkeys(own, _GONE), lowered.packed, lowered.static_inputs)


def _stored_as(lowered: Lowered, operand: RightOperand) -> tuple[Any, ...]:
    """What two operands must have in common to be joined."""

    def of(name: str | None) -> Any:
        if name is None:
            return None
        if name in lowered.packed:
            return lowered.packed[name].bits, lowered.packed[name].signed
        array = lowered.weights[name] if name in lowered.weights else lowered.graph.constants[name]
        return array.dtype, array.ndim if array.size > 1 else array.tobytes()

    factors = (None if each is None else (of(each.name), of(each.step)) for each in (operand.scale, operand.zero, operand.minimum))
    return (of(operand.codes), of(operand.high), operand.dtype, operand.group, operand.sign, *factors)
