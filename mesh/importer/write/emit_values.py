"""The values of a block under construction: which name stands for which value of the source, and of what type it is.

Sizes, positions, constants and weights of the source get their counterparts in the block here. mesh/importer/write/emit.py has
the nodes of the data path.

Types: a source's own float type becomes the compute type. From float32 to 16 bits, norms, exponentials and whatever meets
them stay in float32; matrix products, attention, the cache and the hidden state are of the compute type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper

from mesh.errors import UnsupportedModel
from mesh.importer.analysis.positions import Computed, Constant, InputParts, Positions, Sizes, Table
from mesh.importer.graph.decoder import DecoderGraph, Dependence, input_of, producer
from mesh.importer.graph.evaluate import NotConcrete
from mesh.importer.graph.probe import BROADCAST, GraphProbe
from mesh.importer.write.blocks import GraphBuilder, Weight
from mesh.importer.write.kept import SourceMatrix

__all__ = ["FLOATS", "Values", "attributes_of"]

Array = npt.NDArray[Any]

FLOATS = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float64))
SMALL_BYTES = 1024
# computed in float32 under a 16-bit compute type
WIDE = frozenset((
    "Pow", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceSumSquare", "Sqrt", "Reciprocal", "Exp", "Log", "Softmax", "LogSoftmax",
    "Cos", "Sin", "Erf", "Scan",
))  # fmt: skip
# take and give the compute type
NARROW = frozenset(("MatMul", "Gemm", "LayerNormalization", "RMSNormalization", "RotaryEmbedding", "Einsum", "CastLike"))


class Values:
    """Names and types of one block's values.

    `source_type` is the float type of the source's data path. `first_input` is the block's input [B, T, ...] whose shape gives
    the sizes B and T.
    """

    def __init__(
        self, graph: DecoderGraph, inputs: InputParts, builder: GraphBuilder, source_type: np.dtype[Any], first_input: str
    ) -> None:
        self.graph, self.inputs, self.builder = graph, inputs, builder
        self.source, self.compute = source_type, builder.options.compute
        self.widening = source_type == np.float32 and self.compute != np.float32
        self.names: dict[ir.Value, str] = {}
        self.types: dict[str, np.dtype[Any]] = {}  # of float values by their name
        self._shape_source = first_input
        self._sizes: dict[tuple[int, int, int, int], str] = {}
        self._casts: dict[tuple[str, str], str] = {}
        self._weights: dict[tuple[int, str], str] = {}
        self._experts: dict[ir.Value, tuple[str, bool]] = {}
        self.uses_positions = False

    def place(self, node: ir.Node, inputs: list[str], attributes: dict[str, Any]) -> None:
        """Add the node with its float inputs brought to one type, and note the type of its outputs."""
        result: np.dtype[Any] | None = None
        floats = [self.types[name] for name in inputs if name in self.types]
        if self.widening and floats:
            if node.op_type in WIDE:
                result = np.dtype(np.float32)
            elif node.op_type in NARROW:
                result = self.compute
            else:
                result = floats[0] if len(set(floats)) == 1 else np.dtype(np.float32)
            inputs = [self.typed(name, result) if name in self.types else name for name in inputs]
        elif floats:
            result = floats[0]
        if node.op_type == "Cast":
            to = ir.DataType(attributes["to"])
            if to.is_floating_point():
                result = self._mapped(to.numpy())
                if self.widening and floats:
                    result = floats[0]
                attributes["to"] = helper.np_dtype_to_tensor_dtype(result)
        outputs = self.builder.ops(node.op_type, *inputs, out=len(node.outputs), **attributes)
        for output, name in zip(node.outputs, outputs, strict=True):
            self.names[output] = name
            if result is not None and self._is_float(output):
                self.types[name] = result

    def _is_float(self, value: ir.Value) -> bool:
        try:
            return self.inputs.probes[0].dtype(value) in FLOATS
        except NotConcrete:
            return True

    def _mapped(self, dtype: np.dtype[Any]) -> np.dtype[Any]:
        """The block's type for a type of the source."""
        if self.widening:
            return np.dtype(np.float32) if dtype in FLOATS else dtype
        return self.compute if dtype == self.source else dtype

    def typed(self, name: str, dtype: np.dtype[Any]) -> str:
        if self.types.get(name, dtype) == dtype:
            return name
        key = name, dtype.name
        if key not in self._casts:
            self._casts[key] = self.builder.op("Cast", name, to=helper.np_dtype_to_tensor_dtype(dtype))
            self.types[self._casts[key]] = dtype
        return self._casts[key]

    def like(self, source: str, name: str) -> str:
        if source in self.types:
            self.types[name] = self.types[source]
        return name

    # --- sizes and positions ----------------------------------------------------------------------------------------

    def described(self, value: ir.Value, node: ir.Node) -> str:
        """The name of a value of positions and sizes that a node of the data path takes."""
        description = self.inputs.describe(value, self._widened(value, node))
        if isinstance(description, Computed):
            return self._computed(value)
        return self._leaf(value, description)

    def _widened(self, value: ir.Value, node: ir.Node) -> bool:
        """Whether `value` may get one more axis in front, for the batch, without harm to `node`."""
        if node.op_type not in BROADCAST:
            return False
        probe = self.inputs.probes[0]
        out = probe.shape(node.outputs[0])
        return len(out) == len(probe.shape(value)) + 1 and out[0] == probe.batch

    def _leaf(self, value: ir.Value, leaf: Constant | Sizes | Positions | Table) -> str:
        if value in self.names:
            return self.names[value]
        if isinstance(leaf, Constant):
            name = self._array(leaf.array, str(value.name))
        elif isinstance(leaf, Sizes):
            name = self.size_vector([self.factor(f) for f in leaf.factors], leaf.rank)
            if (dtype := self.inputs.probes[0].value(value).dtype) != np.int64:
                name = self.builder.op("Cast", name, to=helper.np_dtype_to_tensor_dtype(dtype))
        elif isinstance(leaf, Positions):
            name = self._positions(leaf)
        else:
            name = self._table(leaf, str(value.name))
        self.names[value] = name
        return name

    def _computed(self, value: ir.Value) -> str:
        """Emit the source's own nodes, from the leaves up to `value`."""
        stack = [value]
        while stack:
            current = stack[-1]
            if current in self.names:
                stack.pop()
                continue
            if self.graph.dependence(current) is Dependence.CONSTANT:
                self.names[current] = self.constant(current)
                continue
            leaf = self.inputs.leaf(current)
            if leaf is not None:
                self._leaf(current, leaf)
                continue
            node = producer(current)
            missing = [v for v in node.inputs if v is not None and v not in self.names]
            if missing:
                stack.extend(missing)
                continue
            self.place(node, [self.names[v] if v is not None else "" for v in node.inputs], attributes_of(node))
        return self.names[value]

    def _position_ids(self) -> str:
        self.uses_positions = True
        return "position_ids"

    def _positions(self, leaf: Positions) -> str:
        builder, name = self.builder, self._position_ids()
        if leaf.offset:
            name = builder.op("Add", name, builder.const(leaf.offset))
        if leaf.dtype != np.int64:
            dtype = self._mapped(leaf.dtype)
            name = builder.op("Cast", name, to=helper.np_dtype_to_tensor_dtype(dtype))
            if dtype in FLOATS:
                self.types[name] = dtype
        axes = [a for a in range(leaf.rank) if a not in (leaf.batch, leaf.token)]
        if leaf.batch < 0:
            axes = [a + 1 for a in axes]
        elif leaf.batch > leaf.token:
            name = self.like(name, builder.op("Transpose", name, perm=[1, 0]))
        return self.like(name, builder.op("Unsqueeze", name, builder.const(axes))) if axes else name

    def _table(self, table: Table, name: str) -> str:
        rows = self.builder.op("Gather", self._array(table.rows, f"{name}.by_position"), self._position_ids())  # [B, T, ...]
        dtype = self._mapped(table.rows.dtype)
        if dtype in FLOATS:
            self.types[rows] = dtype
        rank = table.rows.ndim + 1
        if table.batch < 0:
            # the token axis counts without the batch, which stays in front
            rest = iter(range(2, rank))
            perm = [0, *(1 if axis == table.token else next(rest) for axis in range(rank - 1))]
        else:
            rest = iter(range(2, rank))
            perm = [0 if axis == table.batch else 1 if axis == table.token else next(rest) for axis in range(rank)]
        return rows if perm == sorted(perm) else self.like(rows, self.builder.op("Transpose", rows, perm=perm))

    def factor(self, factors: tuple[int, int, int, int]) -> int | str:
        """A number, or the name of a one-element vector."""
        constant, rows, tokens, both = factors
        if not (rows or tokens or both):
            return constant
        if factors not in self._sizes:
            self._sizes[factors] = self._product_sum(constant, rows, tokens, both)
        return self._sizes[factors]

    def _product_sum(self, constant: int, rows: int, tokens: int, both: int) -> str:
        builder = self.builder
        if (constant, rows, tokens, both) == (0, 1, 0, 0):
            return builder.op("Shape", self._shape_source, start=0, end=1)
        if (constant, rows, tokens, both) == (0, 0, 1, 0):
            return builder.op("Shape", self._shape_source, start=1, end=2)
        B, T = self.factor((0, 1, 0, 0)), self.factor((0, 0, 1, 0))
        assert isinstance(B, str) and isinstance(T, str)
        terms: list[str] = []
        for factor, name in ((rows, B), (tokens, T)):
            if factor:
                terms.append(name if factor == 1 else builder.op("Mul", name, builder.const([factor])))
        if both:
            product = builder.op("Mul", B, T)
            terms.append(product if both == 1 else builder.op("Mul", product, builder.const([both])))
        if constant:
            terms.append(builder.const([constant]))
        total = terms[0]
        for term in terms[1:]:
            total = builder.op("Add", total, term)
        return total

    def size_vector(self, elements: list[int | str], rank: int = 1) -> str:
        """An int64 vector (or, for rank 0, a number) of numbers and one-element vectors."""
        builder = self.builder
        if all(isinstance(element, int) for element in elements):
            return builder.const(elements if rank else elements[0])
        if rank == 0:
            return builder.op("Squeeze", str(elements[0]), builder.const([0]))
        parts = [builder.const([e]) if isinstance(e, int) else e for e in elements]
        return parts[0] if len(parts) == 1 else builder.op("Concat", *parts, axis=0)

    def target(self, node: ir.Node, value: ir.Value) -> str:
        """The shape input of a Reshape or Expand, as a constant if that is possible."""
        leaf = self.inputs.leaf(value)
        if not isinstance(leaf, Constant | Sizes):
            return self.described(value, node)
        if isinstance(leaf, Constant):
            factors = [(int(n), 0, 0, 0) for n in leaf.array.reshape(-1)]
        else:
            factors = list(leaf.factors)
        return self.size_vector(self.short_target(node.op_type, input_of(node, 0), factors))

    def short_target(self, op_type: str, data: ir.Value, factors: list[tuple[int, int, int, int]]) -> list[int | str]:
        own = self.dims(data)
        if all(f[1:] == (0, 0, 0) for f in factors):
            return [f[0] for f in factors]
        elements: list[int | str | None] = []
        for i, factor in enumerate(factors):
            fixed = factor[1:] == (0, 0, 0)
            if op_type == "Expand":
                axis = i - len(factors) + len(own)
                same = axis >= 0 and own[axis] == factor
                elements.append(1 if same and not fixed else factor[0] if fixed else None)
            else:
                same = i < len(own) and own[i] == factor
                elements.append(factor[0] if fixed else 0 if same else None)
        open_places = [i for i, element in enumerate(elements) if element is None]
        if op_type == "Reshape" and len(open_places) == 1 and -1 not in elements:
            elements[open_places[0]] = -1
        return [self.factor(factors[i]) if element is None else element for i, element in enumerate(elements)]

    def dims(self, value: ir.Value) -> list[tuple[int, int, int, int] | None]:
        """The shape of a value as factors of 1, B, T and B*T; None for an axis that is something else."""
        probes = self.inputs.probes
        shapes = np.array([probe.shape(value) for probe in probes], np.float64).reshape(len(probes), -1)
        basis = np.array([[1, p.batch, p.chunk, p.batch * p.chunk] for p in probes], np.float64)
        factors = np.rint(np.linalg.lstsq(basis, shapes, rcond=None)[0])
        good = (basis @ factors == shapes).all(axis=0)
        return [tuple(int(f) for f in column) if ok else None for column, ok in zip(factors.T, good, strict=True)]  # type: ignore[misc]

    # --- constants and weights --------------------------------------------------------------------------------------

    def constant(self, value: ir.Value) -> str:
        if value in self.names:
            return self.names[value]
        if self.kept(value):
            node = producer(value)
            inputs = [self.constant(v) if v is not None else "" for v in node.inputs]
            self.place(node, inputs, attributes_of(node))
            return self.names[value]
        shape = self.inputs.probes[0].shape(value)
        dtype = self.inputs.probes[0].dtype(value)
        if int(np.prod(shape)) * dtype.itemsize <= SMALL_BYTES:
            name = self._array(self.fold(value), str(value.name))
        else:
            stored = self._mapped(dtype)
            name = self.builder.weight(self.fresh_name(str(value.name)), Weight(lambda: self.fold(value), stored))
            if stored in FLOATS:
                self.types[name] = stored
        self.names[value] = name
        return name

    def _array(self, array: Array, name: str) -> str:
        dtype = self._mapped(array.dtype)
        if array.nbytes <= SMALL_BYTES:
            result = self.builder.const(array, dtype)
        else:
            result = self.builder.weight(self.fresh_name(name), Weight(lambda: array, dtype))
        if dtype in FLOATS:
            self.types[result] = dtype
        return result

    def matrix(self, value: ir.Value, produce: Callable[[], Array], experts: bool, form: str = "") -> str:
        key = id(value), f"matrix{form}"
        if key not in self._weights:
            self._weights[key] = self.builder.matrix(self.fresh_name(str(value.name)), Weight(produce), experts=experts)
            self.types[self._weights[key]] = self.compute
        return self._weights[key]

    def experts(self, value: ir.Value, *, turned: bool) -> tuple[str, bool]:
        """A tensor of experts [experts, in, out] (`turned`), or [experts, out, in], and whether the block has it as [experts, out, in]."""
        if value not in self._experts:
            own = self.source_experts(value, turned=turned)
            weight = own or Weight(lambda: self.fold(value) if turned else self.fold(value).swapaxes(1, 2))
            self._experts[value] = self.builder.experts(self.fresh_name(str(value.name)), weight)
        return self._experts[value]

    def source_experts(self, value: ir.Value, *, turned: bool) -> SourceMatrix | None:
        """Weights of experts as their checkpoint has them, where the graph has these as [experts, out, in], or (`turned`) as
        [experts, in, out]."""
        swapped = False
        while (node := value.producer()) is not None and node.op_type == "Transpose":
            perm = list(attributes_of(node).get("perm", ()))
            if perm not in ([0, 1, 2], [0, 2, 1]):  # exporters write the first too, which changes nothing
                return None
            value, swapped = input_of(node, 0), swapped ^ (perm == [0, 2, 1])
        found = getattr(value.const_value, "source", None)
        if not isinstance(found, SourceMatrix) or found.experts is None or (found.turned ^ swapped) != turned:
            return None
        return found

    def source_matrix(self, value: ir.Value, *, turned: bool) -> SourceMatrix | None:
        """A weight as its checkpoint has it, where the graph has that as [out, in], or (`turned`) as [in, out]."""
        node = value.producer()
        swapped = node is not None and node.op_type == "Transpose" and list(attributes_of(node).get("perm", (1, 0))) == [1, 0]
        if node is not None and swapped:
            value = input_of(node, 0)
        found = getattr(value.const_value, "source", None)
        if not isinstance(found, SourceMatrix) or found.experts is not None:
            return None
        return found if swapped == turned else found.transposed()

    def kept(self, value: ir.Value) -> bool:
        """Whether a block keeps the nodes that compute a constant: a weight that the source stores quantized stays quantized."""
        node = value.producer()
        return node is not None and any(n.op_type == "DequantizeLinear" for n in self.graph.ancestors(value))

    def fold(self, value: ir.Value) -> Array:
        if value.const_value is not None:
            return value.const_value.numpy()
        return GraphProbe(self.graph, 1, 1, 1 if self.graph.has_past else 0).value(value)

    def fresh_name(self, name: str) -> str:
        name = name or "weight"
        taken = {key.removesuffix(".weight") for key in self.builder.weights} | set(self.builder.weights)
        number, base = 1, name
        while name in taken:
            name, number = f"{base}.{number}", number + 1
        return name


def attributes_of(node: ir.Node) -> dict[str, Any]:
    """The attributes of a node as GraphBuilder takes them. UnsupportedModel if one of them is a graph, but for the body of a Scan."""
    result: dict[str, Any] = {}
    for attribute in node.attributes.values():
        if node.op_type == "Scan" and attribute.type == ir.AttributeType.GRAPH:
            result[attribute.name] = body_of(node, attribute.as_graph())
            continue
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            raise UnsupportedModel(
                f"node {node.name} ({node.op_type}) has a branch or loop of its own that depends on its inputs: export without control flow"
            )
        value = attribute.value
        result[attribute.name] = ir.to_proto(value) if attribute.type == ir.AttributeType.TENSOR else value
    return result


def body_of(node: ir.Node, graph: ir.Graph) -> onnx.GraphProto:
    """The body of a Scan, under names that no block has. UnsupportedModel if it uses values of the graph around it."""
    body = graph.clone()
    held = {*body.inputs, *body.initializers.values(), *(value for each in body for value in each.outputs)}
    used = {value for each in body for value in each.inputs if value is not None}
    if used - held:
        names = ", ".join(sorted(str(value.name) for value in used - held))
        raise UnsupportedModel(f"the loop {node.name} uses values of the graph around it ({names}): not supported")
    for number, value in enumerate(sorted(held, key=lambda value: str(value.name))):
        value.name = f"{node.name}.{number}"
    return ir.to_proto(body)
