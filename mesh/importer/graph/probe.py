"""Run the parts of a graph that depend on shapes and positions only, on concrete sizes, to see what they compute.

A GraphProbe is one choice of (batch, chunk, past). It computes the shape of any value on demand, and also the numbers of a value
that depends neither on the tokens nor on the cache. Masks, positions and shape arithmetic are recognised by these results,
whatever nodes an exporter wrote them with.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
from onnx import helper, numpy_helper

from mesh.errors import UnsupportedModel
from mesh.importer.graph.decoder import DecoderGraph, Dependence, Role, attribute, input_of
from mesh.importer.graph.evaluate import HELP, NotConcrete, evaluate
from mesh.lowering import ops
from mesh.lowering.registry import find, op_types
from mesh.model.onnx_form import OPSET

__all__ = ["GraphProbe", "state_shape"]

Array = npt.NDArray[Any]


ops.load()  # what is known of each op stands beside it, in mesh/lowering/ops
SAME_SHAPE = op_types(lambda op: op.same_shape)
BROADCAST = op_types(lambda op: op.broadcasts)
TO_BOOL = op_types(lambda op: op.to_bool)


def shape_inputs(node: ir.Node) -> tuple[int, ...]:
    """Positions of the inputs whose numbers, not only whose shapes, decide the shape of the output."""
    op = find(node.op_type, node.domain, OPSET)
    return () if op is None or op.same_shape or op.takes_scope else op.static


class GraphProbe:
    """`batch` rows of `chunk` new tokens after `past` cached ones; the attention mask is all ones.

    overrides: numbers to use for some values in place of what the graph computes.
    """

    def __init__(
        self,
        graph: DecoderGraph,
        batch: int,
        chunk: int,
        past: int,
        overrides: Mapping[ir.Value, Array] | None = None,
        parent: GraphProbe | None = None,
    ) -> None:
        self.graph, self.batch, self.chunk, self.past = graph, batch, chunk, past
        self._parent = parent
        self._values: dict[ir.Value, Array] = dict(overrides or {})
        self._shapes: dict[ir.Value, tuple[int, ...]] = {}
        self._dtypes: dict[ir.Value, int] = {}

    def derive(self, overrides: Mapping[ir.Value, Array]) -> GraphProbe:
        """A probe of the same sizes, with given numbers for some values of the data path. It shares what depends on shapes only."""
        return GraphProbe(self.graph, self.batch, self.chunk, self.past, overrides, self)

    @property
    def total(self) -> int:
        return self.past + self.chunk

    def value(self, value: ir.Value) -> Array:
        """The numbers of `value`. NotConcrete where it has none."""
        self._need(value, numbers=True)
        return self._values[value]

    def shape(self, value: ir.Value) -> tuple[int, ...]:
        """The shape of `value`. NotConcrete where it depends on the tokens."""
        self._need(value, numbers=False)
        return self._values[value].shape if value in self._values else self._shapes[value]

    def dtype(self, value: ir.Value) -> np.dtype[Any]:
        """The element type of `value`. NotConcrete where its shape depends on the tokens."""
        self._need(value, numbers=False)
        if value in self._values:
            return self._values[value].dtype
        return np.dtype(helper.tensor_dtype_to_np_dtype(self._dtypes.get(value, onnx.TensorProto.FLOAT)))

    def _has(self, value: ir.Value, numbers: bool) -> bool:
        return value in self._values or (not numbers and value in self._shapes)

    def _need(self, value: ir.Value, numbers: bool) -> None:
        stack = [(value, numbers)]
        while stack:
            current, want = stack[-1]
            if self._has(current, want):
                stack.pop()
                continue
            if self._parent is not None and (not want or self.graph.dependence(current) <= Dependence.SHAPE):
                self._inherit(self._parent, current, want)
                continue
            node = current.producer()
            if node is None:
                self._leaf(current, want)
                continue
            wanted = self._wanted(node, want)
            missing = [(v, w) for v, w in wanted if not self._has(v, w)]
            if missing:
                stack.extend(missing)
                continue
            if want:
                self._evaluate(node)
            else:
                self._infer(node)

    def _inherit(self, parent: GraphProbe, value: ir.Value, numbers: bool) -> None:
        parent._need(value, numbers)
        if value in parent._values:
            self._values[value] = parent._values[value]
        else:
            self._shapes[value] = parent._shapes[value]
            self._dtypes[value] = parent._dtypes.get(value, onnx.TensorProto.FLOAT)

    def _wanted(self, node: ir.Node, numbers: bool) -> list[tuple[ir.Value, bool]]:
        if node.op_type in ("Shape", "Size"):
            return [(v, False) for v in node.inputs if v is not None]
        if numbers:
            return [(v, True) for v in node.inputs if v is not None]
        places = shape_inputs(node)
        return [(v, i in places) for i, v in enumerate(node.inputs) if v is not None]

    def _leaf(self, value: ir.Value, numbers: bool) -> None:
        if value.const_value is not None:
            if numbers:
                self._values[value] = value.const_value.numpy()
            else:
                self._shapes[value] = tuple(value.const_value.shape.numpy())
                self._dtypes[value] = int(value.const_value.dtype)
            return
        role = self.graph.roles.get(value)
        batch, chunk, past = self.batch, self.chunk, self.past
        if role in (Role.TOKENS, Role.PAST, Role.STATE):
            if numbers:
                raise NotConcrete(value.name)
            self._dtypes[value] = int(value.dtype) if value.dtype is not None else onnx.TensorProto.FLOAT
            if role is Role.STATE:
                self._shapes[value] = (batch, *state_shape(value))
            else:
                self._shapes[value] = (batch, chunk) if role is Role.TOKENS else past_shape(value, batch, past)
            return
        dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.int64)
        positions = np.arange(past, past + chunk)
        if role is Role.MASK and (value.shape is None or len(value.shape) == 2):
            self._values[value] = np.ones((batch, past + chunk), dtype)
        elif role is Role.SEGMENTS:
            self._values[value] = np.zeros((batch, chunk), dtype)
        elif role is Role.CACHE_POSITION:
            self._values[value] = positions.astype(dtype)
        elif role is Role.POSITIONS and (value.shape is None or len(value.shape) == 2):
            self._values[value] = np.broadcast_to(positions, (batch, chunk)).astype(dtype)
        elif role is Role.POSITIONS and value.shape is not None and len(value.shape) == 1:
            self._values[value] = positions.astype(dtype)
        else:
            raise UnsupportedModel(
                f"input {value.name} of shape {value.shape} is not understood: export with 2-D input_ids and attention_mask"
            )

    def _evaluate(self, node: ir.Node) -> None:
        if node.op_type == "Shape":
            shape = self.shape(input_of(node, 0))
            start, end = attribute(node, "start", 0), attribute(node, "end")
            self._values[node.outputs[0]] = np.asarray(shape[start:end], np.int64)
            return
        if node.op_type == "Size":
            self._values[node.outputs[0]] = np.asarray(prod(self.shape(input_of(node, 0))), np.int64)
            return
        inputs = [None if v is None else self._values[v] for v in node.inputs]
        for output, result in zip(node.outputs, evaluate(node, inputs), strict=False):
            self._values[output] = result

    def _infer(self, node: ir.Node) -> None:
        out = node.outputs[0]
        shapes = [self.shape(v) if v is not None else () for v in node.inputs]
        if node.op_type in SAME_SHAPE and len(node.outputs) == 1:
            self._shapes[out] = shapes[0]
        elif node.op_type in BROADCAST:
            try:
                self._shapes[out] = np.broadcast_shapes(*shapes)
            except ValueError as error:
                raise _misfit(node, error) from None
        elif node.op_type == "MatMul" and len(shapes[0]) >= 2 and len(shapes[1]) >= 2:
            self._shapes[out] = (*np.broadcast_shapes(shapes[0][:-2], shapes[1][:-2]), shapes[0][-2], shapes[1][-1])
        elif node.op_type == "Transpose" and "perm" in node.attributes:
            self._shapes[out] = tuple(shapes[0][i] for i in node.attributes["perm"].value)
        elif node.op_type == "Shape":
            self._evaluate(node)
        else:
            (self._infer_scan if node.op_type == "Scan" else self._infer_generic)(node)
            return
        if node.op_type == "Cast":
            self._dtypes[out] = int(node.attributes["to"].value)
        elif node.op_type in TO_BOOL:
            self._dtypes[out] = onnx.TensorProto.BOOL
        else:
            source = input_of(node, 1 if node.op_type in ("Where", "CastLike") else 0)
            self._dtypes[out] = helper.np_dtype_to_tensor_dtype(self.dtype(source))

    def _infer_scan(self, node: ir.Node) -> None:
        """What a loop over first axes hands on, one state or one output a step: onnx looks for the sizes in the body, where an exporter has
        names for them."""
        count = int(node.attributes["num_scan_inputs"].value)
        if any(any(attribute(node, f"scan_{which}_axes", ())) for which in ("input", "output")):
            raise NotConcrete(f"the shape of {node.outputs[0].name} (Scan over an axis that is not the first)")
        given = [input_of(node, place) for place in range(len(node.inputs))]
        states, steps = len(given) - count, self.shape(given[-1])[0]
        body = ir.to_proto(node.attributes["body"].as_graph())
        for place, (value, declared) in enumerate(zip(given, body.input, strict=True)):
            kind = helper.np_dtype_to_tensor_dtype(self.dtype(value))
            shape = self.shape(value)
            declared.CopyFrom(helper.make_tensor_value_info(declared.name, kind, shape if place < states else shape[1:]))
        del body.value_info[:]
        for declared in body.output:
            declared.type.tensor_type.ClearField("shape")
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        for place, (output, found) in enumerate(
            zip(node.outputs, onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output, strict=True)
        ):
            kind, dims = found.type.tensor_type.elem_type, found.type.tensor_type.shape.dim
            if not found.type.tensor_type.HasField("shape") or not all(dim.HasField("dim_value") for dim in dims):
                raise NotConcrete(f"the shape of {output.name} (Scan)")
            self._shapes[output] = (*(() if place < states else (steps,)), *(dim.dim_value for dim in dims))
            self._dtypes[output] = kind

    def _infer_generic(self, node: ir.Node) -> None:
        proto = ir.to_proto(node)
        try:
            schema = onnx.defs.get_schema(node.op_type, OPSET, node.domain)
        except onnx.defs.SchemaError:
            raise UnsupportedModel(f"operator {node.domain or 'ai.onnx'}.{node.op_type} (node {node.name}) is not known: {HELP}") from None
        types: dict[str, onnx.TypeProto] = {}
        data: dict[str, onnx.TensorProto] = {}
        for i, value in enumerate(node.inputs):
            if value is None:
                continue
            name = str(value.name)
            if value in self._values:
                array = self._values[value]
                types[name] = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
                if i in shape_inputs(node):
                    data[name] = numpy_helper.from_array(array)
            else:
                types[name] = helper.make_tensor_type_proto(self._dtypes.get(value, onnx.TensorProto.FLOAT), self._shapes[value])
        try:
            found = onnx.shape_inference.infer_node_outputs(
                schema, proto, types, data, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10
            )
        except Exception as error:
            raise _misfit(node, error) from None
        for output in node.outputs:
            kind = found.get(str(output.name))
            if kind is None:
                continue
            dims = kind.tensor_type.shape.dim
            if not kind.tensor_type.HasField("shape") or not all(dim.HasField("dim_value") for dim in dims):
                raise NotConcrete(f"the shape of {output.name} ({node.op_type})")
            self._shapes[output] = tuple(dim.dim_value for dim in dims)
            self._dtypes[output] = kind.tensor_type.elem_type


def _misfit(node: ir.Node, error: Exception) -> UnsupportedModel:
    detail = " ".join(str(error).split())
    return UnsupportedModel(
        f"node {node.name} ({node.op_type}) does not fit its inputs ({detail}): export the model again with dynamic axes"
    )


def state_shape(value: ir.Value) -> tuple[int, ...]:
    """The shape of a state without the batch."""
    dims = tuple(dim for dim in (value.shape or ())[1:] if isinstance(dim, int))
    if value.shape is None or len(dims) != len(value.shape) - 1:
        raise UnsupportedModel(f"input {value.name} has shape {value.shape}: a state has a size of its own: export it with static axes")
    return dims


def past_shape(value: ir.Value, batch: int, past: int) -> tuple[int, ...]:
    """The shape of a past input [batch, heads, past, width] or stacked [2, batch, heads, past, width]."""
    dims = list(value.shape or ())
    rank = len(dims)
    row, slot = rank - 4, past_axis(value)
    shape: list[int] = []
    for axis, dim in enumerate(dims):
        if axis == slot:
            shape.append(past)
        elif axis == row and not isinstance(dim, int):
            shape.append(batch)
        elif isinstance(dim, int):
            shape.append(dim)
        else:
            raise UnsupportedModel(
                f"input {value.name} has shape {value.shape}: its heads and head size must be numbers; export them as static axes"
            )
    return tuple(shape)


def past_axis(value: ir.Value) -> int:
    """The axis of a past input that counts cached positions: the one it is concatenated along, else the last but one."""
    rank = len(value.shape or ())
    for node, _ in value.uses():
        if node.op_type == "Concat" and len(node.inputs) == 2:
            return int(node.attributes["axis"].value) % rank
    return rank - 2
