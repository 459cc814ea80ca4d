"""Experts: each token is multiplied with the weights of the experts that its router chose.

A block chooses them by a gather, and multiplies after it:

    GatherND or Gather(W [experts, ...], chosen) --> maybe Transpose --> MatMul

As written, that copies a whole expert for every token and choice: 25 GB for a chunk of 256 tokens of a model with eight experts of 12 MB
a token. So the gather waits here for its product. With kernels, the rows of one expert are multiplied together and each weight is read
once (mesh/kernels/calls.py). XLA's form takes the experts of a few tokens at a time, so that the copies stay small, or one expert at a time
for all tokens where there are many of these. Either reads the weight as it is stored: floats of 16 or 32 bits, or codes with scales. W may
also be one weight [experts * out, in], in any of the ways of mesh/lowering/operands.py, which a Reshape divides.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh.host.pages import aligned, copy_mapped
from mesh.kernels import calls
from mesh.lowering import linear
from mesh.lowering.linear import Codes, Factors
from mesh.lowering.lower import Lowered
from mesh.lowering.op_helpers import numpy_type
from mesh.lowering.operands import Finder, RightOperand
from mesh.lowering.prepare import Graph, GraphNode, with_nodes
from mesh.lowering.rounding import before_rounding
from mesh.lowering.tensors import PackedFormat, unpack
from mesh.lowering.weights import fits_tiles, pack, stored_codes

__all__ = ["ExpertOperand", "ExpertWeight", "KeptExperts", "expert_operands", "pack_experts"]

_GATHERS = ("Gather", "GatherND")
_COPIED_BYTES = 32 << 20
"""XLA's form has the weights of no more tokens in memory at a time."""
_FEW_EXPERTS = 8
"""On a CPU, XLA's form lets so many experts compute every token rather than read an expert for each."""

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class ExpertOperand:
    """What a weight of experts is made of: (codes - zero) * scale. `shape`: as it is stored. `depth`: the axis that a product sums over, 1
    or 2. `dtype`: what it is widened to (None: its own type). `rounds`: what it is multiplied with is rounded to bfloat16."""

    codes: str
    shape: tuple[int, int, int]
    depth: int = 0
    dtype: np.dtype[Any] | None = None
    scale: str | None = None
    zero: str | None = None
    axis: int = 0  # of the groups; 0: there are none
    group: int = 0
    rounds: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The initializers that it is made of."""
        return (self.codes, *(name for name in (self.scale, self.zero) if name is not None))


@dataclass(frozen=True)
class KeptExperts:
    """The weights of experts as one weight of two axes, [experts * out, in]."""

    weight: RightOperand
    experts: int
    rounds: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The initializers that it is made of."""
        return self.weight.names


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertWeight:
    """The weights of all experts, one after the other: `codes` [experts * out, in]. Takes the place of a tensor of experts in a lowered
    graph, which sees each of them as [in, out] where `turned`, else as [out, in]. `rounds`: what it is multiplied with is rounded to
    bfloat16 in any case."""

    codes: Codes
    experts: int = field(metadata={"static": True})
    turned: bool = field(metadata={"static": True})
    rounds: bool = field(default=False, metadata={"static": True})

    def __lower_op__(self, op_type: str, args: tuple[Any, ...], attrs: Mapping[str, Any]) -> Any:
        if op_type not in _GATHERS or args[0] is not self:
            return NotImplemented
        chosen = jnp.asarray(args[1])
        return _Chosen(self, chosen.reshape(chosen.shape[:-1]) if op_type == "GatherND" else chosen, self.turned)

    def product(self, x: jax.Array, chosen: jax.Array) -> jax.Array:
        """x [rows, in], chosen [rows] -> [rows, out], of x's type: row r times the weight of expert chosen[r]."""
        chosen = chosen.astype(jnp.int32)
        chosen = jnp.where(chosen < 0, chosen + self.experts, chosen)  # as ONNX counts
        if linear.in_kernel(x.dtype, self.codes):
            return calls.expert_products(x, chosen, self.codes.for_kernels(), self.experts, rounds=self.rounds)
        each = jax.tree.map(self._divided, self.codes.in_rows())

        def one(row: Any, expert: Any) -> Any:
            return jax.tree.map(lambda leaf: leaf[expert] if leaf.ndim else leaf, each).widened(x.dtype) @ row

        if x.shape[0] >= 2 * self.experts and (self.experts <= _FEW_EXPERTS or jax.default_backend() != "cpu"):

            def add(y: Any, pair: Any) -> tuple[Any, None]:
                expert, weight = pair
                return jnp.where((chosen == expert)[:, None], x @ weight.widened(x.dtype).T, y), None

            out = self.codes.shape[0] // self.experts
            numbers = jnp.arange(self.experts, dtype=jnp.int32)
            spread = jax.tree.map(lambda leaf: leaf if leaf.ndim else jnp.broadcast_to(leaf, (self.experts,)), each)
            return jax.lax.scan(add, jnp.zeros((x.shape[0], out), x.dtype), (numbers, spread))[0]
        size = math.prod(self.codes.shape) // self.experts * np.dtype(x.dtype).itemsize
        together = max(1, _COPIED_BYTES // size)
        if x.shape[0] <= together:
            return jax.vmap(one)(x, chosen)
        return jax.lax.map(lambda pair: one(*pair), (x, chosen), batch_size=together)

    def _divided(self, leaf: Any) -> Any:
        """[experts * n, ...] -> [experts, n, ...]; a number for all stays."""
        return leaf.reshape(self.experts, -1, *leaf.shape[1:]) if leaf.ndim else leaf


@dataclass(frozen=True)
class _Chosen:
    """The weights of chosen experts, not copied yet. `turned`: seen as [..., in, out], else as [..., out, in]."""

    weight: ExpertWeight
    chosen: jax.Array
    turned: bool

    def __lower_op__(self, op_type: str, args: tuple[Any, ...], attrs: Mapping[str, Any]) -> Any:
        if op_type == "Transpose":
            return replace(self, turned=self.turned ^ bool(_swaps(attrs["perm"])))
        if op_type != "MatMul":
            return NotImplemented
        left = args[0] is self
        x = jnp.asarray(args[1] if left else args[0])
        x = x.swapaxes(-1, -2) if left else x  # [..., T, in]
        lead, (tokens, size) = self.chosen.shape, x.shape[-2:]
        x = jnp.broadcast_to(x, (*lead, tokens, size))
        chosen = jnp.broadcast_to(self.chosen[..., None], (*lead, tokens))
        y = self.weight.product(x.reshape(-1, size), chosen.reshape(-1)).reshape(*lead, tokens, -1)
        return y.swapaxes(-1, -2) if left else y


def _swaps(perm: Sequence[int]) -> bool | None:
    """Whether a Transpose swaps the last two axes; None where it moves another."""
    before = list(range(len(perm) - 2))
    return perm[-1] < perm[-2] if list(perm[:-2]) == before else None


def expert_operands(lowered: Lowered, graph: Graph) -> tuple[Graph, dict[str, ExpertOperand | KeptExperts]]:
    """(the graph in which each tensor of experts is one name, and these by name). Only those that nothing but gathers and products read."""
    readers: dict[str, list[GraphNode]] = defaultdict(list)
    for node in graph.nodes:
        for name in {*node.inputs, *node.captured()}:
            readers[name].append(node)
    made_by = {name: node for node in graph.nodes for name in node.outputs if node.op.domain == ""}
    found: dict[str, ExpertOperand | KeptExperts] = {}
    finder = Finder(lowered)
    replaced: dict[int, GraphNode] = {}
    for name in dict.fromkeys(node.inputs[0] for node in graph.nodes if _chooses(node)):
        nodes = readers[name]
        operand = _kept(finder, graph, made_by.get(name)) or _stored(lowered, graph, name, made_by, readers)
        if operand is None or name in graph.outputs or not all(_chooses(node) and node.inputs[0] == name for node in nodes):
            continue
        turned = _one({_turned(graph, node.outputs[0], readers) for node in nodes})
        if turned is None:
            continue
        depth = 1 if turned else 2
        if isinstance(operand, KeptExperts):
            if turned:
                continue
            codes = operand.weight.codes
        else:
            if operand.axis not in (0, depth):
                continue
            codes, operand = operand.codes, replace(operand, depth=depth)
        rounded = (before_rounding(made_by, other) is not None for node in nodes for other in _others(node.outputs[0], readers))
        found[codes] = replace(operand, rounds=all(rounded))
        replaced |= {id(node): replace(node, inputs=(codes, *node.inputs[1:])) for node in nodes}
    if not found:
        return graph, found
    return with_nodes(graph, [replaced.get(id(node), node) for node in graph.nodes]), found


def _chooses(node: GraphNode) -> bool:
    """Whether it gathers along the first axis."""
    own = node.op.domain == "" and node.op.op_type in _GATHERS
    return own and not node.attributes.get("axis", 0) and not node.attributes.get("batch_dims", 0)


def _turned(graph: Graph, value: str, readers: Mapping[str, Sequence[GraphNode]], swapped: bool = False) -> bool | None:
    """Whether the products that read chosen experts [..., a, b] sum over a; None where they differ, or something else reads them."""
    found: set[bool | None] = {None} if value in graph.outputs else set()
    for node in readers[value]:
        kind = node.op.op_type if node.op.domain == "" else ""
        swaps = _swaps(node.attributes["perm"]) if kind == "Transpose" and "perm" in node.attributes else None
        if kind == "MatMul" and node.inputs.count(value) == 1:
            found.add((node.inputs[1] == value) ^ swapped)
        elif swaps is not None:
            found.add(_turned(graph, node.outputs[0], readers, swapped ^ swaps))
        else:
            found.add(None)
    return _one(found)


def _others(value: str, readers: Mapping[str, Sequence[GraphNode]]) -> list[str]:
    """What chosen experts are multiplied with, where they are only transposed before."""
    found: list[str] = []
    for node in readers[value]:
        found += _others(node.outputs[0], readers) if node.op.op_type == "Transpose" else [each for each in node.inputs if each != value]
    return found


def _one(found: set[bool | None]) -> bool | None:
    """What all say; None where they differ, or nothing is said."""
    return found.pop() if len(found) == 1 else None


def _kept(finder: Finder, graph: Graph, node: GraphNode | None) -> KeptExperts | None:
    """What a node gives, if it is the Reshape of a weight [experts * out, in] to [experts, out, in]."""
    if node is None or node.op.op_type != "Reshape":
        return None
    shape, weight = graph.constants.get(node.inputs[1]), finder.outputs_first(node.inputs[0])
    if shape is None or weight is None or shape.size != 3:
        return None
    experts, out, depth = (int(size) for size in shape)
    return KeptExperts(weight, experts) if min(experts, out, depth) > 0 and weight.shape == (experts * out, depth) else None


def _stored(
    lowered: Lowered, graph: Graph, name: str, made_by: Mapping[str, GraphNode], readers: Mapping[str, Sequence[GraphNode]]
) -> ExpertOperand | None:
    """What a value is, if it is a tensor of experts: an initializer of three axes, its Cast, or a DequantizeLinear of it in groups."""

    def known(each: str) -> bool:
        return (each in lowered.weights or each in graph.constants) and len(readers[each]) == 1

    def shape_of(each: str) -> tuple[int, ...]:
        if each in lowered.packed:
            return tuple(lowered.packed[each].shape)
        return tuple((lowered.weights[each] if each in lowered.weights else graph.constants[each]).shape)

    if name in lowered.weights:
        shape = shape_of(name)
        floating = np.dtype(lowered.weights[name].dtype).kind == "f" or lowered.weights[name].dtype.name == "bfloat16"
        return ExpertOperand(name, shape) if len(shape) == 3 and floating and name not in lowered.packed else None
    node = made_by.get(name)
    if node is None or not all(known(each) for each in node.inputs if each) or node.inputs[0] not in lowered.weights:
        return None
    shape = shape_of(node.inputs[0])
    if len(shape) != 3:
        return None
    codes = ExpertOperand(node.inputs[0], shape)
    if node.op.op_type == "Cast":
        return replace(codes, dtype=numpy_type(node.attributes["to"]))
    if node.op.op_type != "DequantizeLinear" or not node.attributes.get("block_size") or set(node.attributes) - {"axis", "block_size"}:
        return None
    scale, zero = node.inputs[1], node.inputs[2] if len(node.inputs) > 2 and node.inputs[2] else None
    if len(shape_of(scale)) != 3:
        return None
    held = lowered.weights[scale] if scale in lowered.weights else graph.constants[scale]
    axis, group = node.attributes.get("axis", 1) % 3, node.attributes["block_size"]
    return replace(codes, dtype=np.dtype(held.dtype), scale=scale, zero=zero, axis=axis, group=group)


def pack_experts(operand: ExpertOperand | KeptExperts, read: Callable[[str], tuple[Array, PackedFormat | None]]) -> ExpertWeight:
    """The weight as the runtime holds it. `read` gives an initializer as stored, and its format if its elements are smaller than bytes."""
    if isinstance(operand, KeptExperts):
        return ExpertWeight(
            pack([operand.weight], read, experts=operand.experts).codes, operand.experts, turned=False, rounds=operand.rounds
        )
    turned = operand.depth == 1

    def numbers(name: str) -> Array:
        array, layout = read(name)
        return array if layout is None else np.asarray(unpack(array, layout))

    def in_rows(array: Array) -> Array:
        """[experts, ...] -> [experts * out, what lies along the depth]."""
        array = array.swapaxes(1, 2) if turned else array
        return np.ascontiguousarray(array).reshape(-1, array.shape[2])

    stored = numbers(operand.codes)
    experts, rows, columns = stored.shape
    out, depth = (columns, rows) if turned else (rows, columns)
    codes = aligned((experts * out, depth), stored.dtype)
    for expert in range(experts):
        copy_mapped(stored[expert].T if turned else stored[expert], codes[expert * out : (expert + 1) * out])

    def factors(name: str | None) -> Factors | None:
        if name is None:
            return None
        array = in_rows(numbers(name))
        small = array.dtype.name in ("int4", "uint4")
        return Factors(jax.device_put(array.astype(np.int8 if array.dtype.name == "int4" else np.uint8) if small else array))

    held = stored_codes(codes, read(operand.codes)[1], grouped=operand.scale is not None)
    held = replace(held, dtype=operand.dtype, scale=factors(operand.scale), zero_point=factors(operand.zero), group=operand.group)
    return ExpertWeight(held.in_tiles() if fits_tiles(held, experts) else held, experts, turned, operand.rounds)
