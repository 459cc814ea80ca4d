"""What the right operand of a product is made of, where it follows from initializers alone.

A block says how its weights are stored in standard ONNX, before the product that reads them:

    W [in, out]                                       as it is
    Cast(W)                                           16 bits
    DequantizeLinear(W, scale, zero)                  8 or 4 bits, a scale for each output or each group of inputs
    DequantizeLinear(BitwiseOr(L, H), scale, 32)      6 bits: L and H are the low and the upper bits, unpacked from bytes
    Transpose(...)                                    any of these, stored [out, in]
    Reshape(Add or Sub(Reshape(...), Unsqueeze(m)))   a minimum for each group, of a weight stored [out, in]

A scale or a minimum may be a Cast of its initializer, or a DequantizeLinear of one with a step for several groups. `operands` replaces each
such chain by one name, and says in an `RightOperand` what stands behind it; mesh/lowering/weights.py makes one array of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mesh.lowering.lower import Lowered
from mesh.lowering.op_helpers import numpy_type
from mesh.lowering.prepare import Graph, GraphNode, with_nodes
from mesh.lowering.tensors import PackedFormat

__all__ = ["Finder", "RightOperand", "Stored", "operands"]


@dataclass(frozen=True)
class Stored:
    """Numbers of a weight's groups: an initializer's, times those of `step` where there is one."""

    name: str
    step: str | None = None


@dataclass(frozen=True)
class RightOperand:
    """A weight: (codes - zero) * scale - minimum. `turned`: stored [out, in]. `pending`: so far the graph has it as [out, in] as well.
    `sign`: what the minimum is multiplied with to be subtracted. `dtype`: what it is widened to (None: the codes' own type). `high`: the
    codes are bytes with their low four bits, and this has the upper two, both in the order of mesh/kernels/native/weight.h."""

    codes: str
    shape: tuple[int, int]  # as it is stored
    turned: bool = False
    pending: bool = False
    dtype: np.dtype[Any] | None = None
    scale: Stored | None = None
    zero: Stored | None = None
    minimum: Stored | None = None
    sign: int = 1
    group: int = 0
    high: str | None = None

    @property
    def depth(self) -> int:
        return self.shape[1] if self.turned else self.shape[0]

    @property
    def out(self) -> int:
        return self.shape[0] if self.turned else self.shape[1]

    @property
    def names(self) -> tuple[str, ...]:
        """The initializers that it is made of."""
        factors = (each for each in (self.scale, self.zero, self.minimum) if each is not None)
        codes = (self.codes,) if self.high is None else (self.codes, self.high)
        return (*codes, *(name for each in factors for name in (each.name, each.step) if name is not None))


def operands(lowered: Lowered) -> tuple[Graph, dict[str, RightOperand]]:
    """(the graph in which each right operand made of initializers is one name, and the operands by those names)."""
    found = Finder(lowered)
    nodes, result = [], {}
    for node in lowered.graph.nodes:
        if (node.op.domain, node.op.op_type) == ("", "MatMul"):
            operand = found.operand(node.inputs[1])
            if operand is not None and not operand.pending:
                result[operand.codes] = operand
                node = replace(node, inputs=(node.inputs[0], operand.codes))
        nodes.append(node)
    return with_nodes(lowered.graph, nodes), result


class Finder:
    """Follows values back to initializers. A value that something else reads as well is not followed."""

    def __init__(self, lowered: Lowered) -> None:
        graph = lowered.graph
        self._weights: Mapping[str, Any] = lowered.weights
        self._packed: Mapping[str, PackedFormat] = lowered.packed
        self._constants = graph.constants
        self._uses = Counter(name for node in graph.nodes for name in (*node.inputs, *node.captured()))
        self._uses.update(graph.outputs)
        self._made_by = {name: node for node in graph.nodes for name in node.outputs if node.op.domain == ""}

    def operand(self, name: str) -> RightOperand | None:
        """What the right operand `name` of a product is, or None."""
        if self._uses[name] != 1:
            return None
        if name in self._weights:
            shape = self._shape(name)
            return RightOperand(name, (shape[0], shape[1])) if len(shape) == 2 else None
        node = self._made_by.get(name)
        known = None if node is None else _KNOWN.get(node.op.op_type)
        return None if node is None or known is None else known(self, node)

    def _cast(self, node: GraphNode) -> RightOperand | None:
        inner = self.operand(node.inputs[0])
        if inner is None or inner.dtype is not None:
            return None
        return replace(inner, dtype=numpy_type(node.attributes["to"]))

    def _dequantize(self, node: GraphNode) -> RightOperand | None:
        inner = self._six_bits(node) or self.operand(node.inputs[0])
        if inner is None or inner.dtype is not None or inner.turned or set(node.attributes) - {"axis", "block_size"}:
            return None
        axis, group = node.attributes.get("axis", 1) % 2, node.attributes.get("block_size", 0)
        scale = self._factors(node.inputs[1], axis)
        given = len(node.inputs) > 2 and bool(node.inputs[2]) and inner.high is None
        zero = self._initializer(node.inputs[2]) if given else None
        if scale is None or (given and zero is None):
            return None
        rank = len(self._shape(scale.name))
        if group and rank != 2:
            return None
        # Groups lie along the inputs, a scale without groups belongs to an output: which axis is which follows from that.
        turned = axis == (1 if group else 0) and self._size(scale.name) > 1
        dtype = self._type_of(node.inputs[1])
        return replace(inner, dtype=dtype, scale=scale, zero=zero, group=group, turned=turned, pending=turned)

    def _six_bits(self, node: GraphNode) -> RightOperand | None:
        """The codes of a DequantizeLinear around 32, where they are BitwiseOr(low bits, BitShift(upper bits, 4))."""
        both = self._only(node.inputs[0], "BitwiseOr")
        lifted = None if both is None else self._only(both.inputs[1], "BitShift")
        if both is None or lifted is None or lifted.attributes["direction"] != "LEFT" or not self._is(lifted.inputs[1], 4):
            return None
        low, high = self._unpacked(both.inputs[0], (0, 4), 15), self._unpacked(lifted.inputs[0], (0, 2, 4, 6), 3)
        if low is None or high is None or len(node.inputs) < 3 or not self._is_zero_of_six(node.inputs[2]):
            return None
        (out, width), upper = self._shape(low), self._shape(high)
        return RightOperand(low, (out, 2 * width), high=high) if upper == (out, width // 2) and width % 32 == 0 else None

    def _unpacked(self, name: str, shifts: tuple[int, ...], mask: int) -> str | None:
        """The initializer [out, n] of bytes whose parts, `mask` wide and in blocks of 16 bytes, a value has one after the other."""
        joined = self._only(name, "Reshape")
        masked = None if joined is None else self._only(joined.inputs[0], "BitwiseAnd")
        shifted = None if masked is None else self._only(masked.inputs[0], "BitShift")
        divided = None if shifted is None else self._only(shifted.inputs[0], "Reshape")
        if joined is None or masked is None or shifted is None or divided is None or shifted.attributes["direction"] != "RIGHT":
            return None
        if not (self._is(joined.inputs[1], [0, -1]) and self._is(masked.inputs[1], mask) and self._is(divided.inputs[1], [0, -1, 1, 16])):
            return None
        if not self._is(shifted.inputs[1], [[each] for each in shifts]):
            return None
        source = self._initializer(divided.inputs[0])
        return None if source is None or len(self._shape(source.name)) != 2 else source.name

    def _only(self, name: str, op_type: str) -> GraphNode | None:
        """The node of that kind that gives a value which nothing else reads."""
        node = self._made_by.get(name)
        return node if node is not None and node.op.op_type == op_type and self._uses[name] == 1 else None

    def _is(self, name: str, value: Any) -> bool:
        known = self._constants.get(name)
        return known is not None and known.tolist() == value

    def _is_zero_of_six(self, name: str) -> bool:
        """Whether a zero point is 32 everywhere."""
        node = self._made_by.get(name)
        value = self._constants.get(name) if node is None else node.attributes.get("value")
        return value is not None and (node is None or node.op.op_type == "ConstantOfShape") and bool((np.asarray(value) == 32).all())

    def _transpose(self, node: GraphNode) -> RightOperand | None:
        return self.outputs_first(node.inputs[0]) if tuple(node.attributes.get("perm", (1, 0))) == (1, 0) else None

    def outputs_first(self, name: str) -> RightOperand | None:
        """What a weight is that the graph has as [out, in], or None."""
        inner = self.operand(name)
        if inner is None:
            return None
        if inner.turned:
            return replace(inner, pending=False) if inner.pending else None
        return replace(inner, turned=True) if inner.scale is None or self._size(inner.scale.name) == 1 else None

    def _reshape(self, node: GraphNode) -> RightOperand | None:
        """Reshape(Sub(Reshape(W, [0, -1, group]), Unsqueeze(m, 2)), [0, -1]) of W [out, in]."""
        middle = self._made_by.get(node.inputs[0])
        if middle is None or middle.op.op_type not in ("Add", "Sub") or self._uses[node.inputs[0]] != 1:
            return None
        grouped, lifted = (self._made_by.get(name) for name in middle.inputs)
        if grouped is None or lifted is None or grouped.op.op_type != "Reshape" or lifted.op.op_type != "Unsqueeze":
            return None
        inner = self.operand(grouped.inputs[0])
        minimum = self._factors(lifted.inputs[0], 1)
        axes = self._constants.get(lifted.inputs[1])
        if inner is None or minimum is None or inner.minimum is not None or not inner.pending or not inner.group or axes is None:
            return None
        shapes = (self._constants.get(grouped.inputs[1]), self._constants.get(node.inputs[1]))
        if [None if shape is None else shape.tolist() for shape in shapes] != [[0, -1, inner.group], [0, -1]]:
            return None
        if axes.tolist() not in ([-1], [2]) or any(self._uses[name] != 1 for name in middle.inputs):
            return None
        return replace(inner, minimum=minimum, sign=1 if middle.op.op_type == "Sub" else -1)

    def _factors(self, name: str, axis: int) -> Stored | None:
        """Numbers of groups along `axis`, through a Cast or a DequantizeLinear with a step of their own."""
        node = self._made_by.get(name)
        if node is None:
            return self._initializer(name)
        if self._uses[name] != 1:
            return None
        if node.op.op_type == "Cast":
            return self._initializer(node.inputs[0])
        if node.op.op_type != "DequantizeLinear" or len(node.inputs) > 2 or not node.attributes.get("block_size"):
            return None
        inner, step = self._initializer(node.inputs[0]), self._factors(node.inputs[1], axis)
        if inner is None or step is None or step.step is not None or node.attributes.get("axis", 1) % 2 != axis:
            return None
        return replace(inner, step=step.name)

    def _initializer(self, name: str) -> Stored | None:
        known = name in self._weights or name in self._constants
        return Stored(name) if known and self._uses[name] == 1 else None

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self._packed:
            return tuple(self._packed[name].shape)
        return tuple((self._weights[name] if name in self._weights else self._constants[name]).shape)

    def _size(self, name: str) -> int:
        return math.prod(self._shape(name))

    def _type_of(self, value: str) -> np.dtype[Any]:
        node = self._made_by.get(value)
        if node is not None and node.op.op_type == "Cast":
            return numpy_type(node.attributes["to"])
        if node is not None:
            return self._type_of(node.inputs[1])
        return np.dtype((self._weights[value] if value in self._weights else self._constants[value]).dtype)


_KNOWN = {
    "Cast": Finder._cast,
    "DequantizeLinear": Finder._dequantize,
    "Transpose": Finder._transpose,
    "Reshape": Finder._reshape,
}
