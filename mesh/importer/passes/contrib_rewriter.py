"""What the rules for com.microsoft operators share: new nodes, constants, weights and positions in place of an operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.graph.decoder import Role, constant
from mesh.importer.graph.edit import insert, new_constant

__all__ = ["Result", "Rewriter", "Rule", "optional", "refuse", "stored"]

Result = Sequence[ir.Value | None]
"""The values that stand in place of an operator's outputs, in order. None: this output must not be used."""


class Rewriter:
    """Makes the nodes and constants that stand in place of contrib operators."""

    def __init__(self, model: ir.Model, roles: dict[ir.Value, Role]) -> None:
        self.model, self.graph, self.roles = model, model.graph, roles
        self._positions: ir.Value | None = None

    def op(self, at: ir.Node, op_type: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> list[ir.Value]:
        """A node of the default domain in front of `at`; its outputs."""
        return insert(self.graph, at, op_type, *inputs, outputs=outputs, **attributes)

    def one(self, at: ir.Node, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self.op(at, op_type, *inputs, **attributes)[0]

    def ints(self, *numbers: int) -> ir.Value:
        return new_constant(self.graph, np.array(numbers, np.int64))

    def number(self, value: float, like: ir.Value | None) -> ir.Value:
        dtype = like.dtype.numpy() if like is not None and like.dtype is not None else np.dtype(np.float32)
        return new_constant(self.graph, np.array(value, dtype))

    def weight(self, name: str, produce: Callable[[], np.ndarray[Any, Any]], dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """A weight of `shape` that `produce` computes from others when it is read."""
        number = len(self.graph.initializers)
        unique = f"{name}.{number}"
        tensor = ir.LazyTensor(lambda: ir.tensor(produce(), dtype=dtype), dtype=dtype, shape=ir.Shape(shape), name=unique)
        value = ir.Value(name=unique, const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.graph.register_initializer(value)
        return value

    def positions(self) -> ir.Value:
        """position_ids [batch, tokens]: those of the graph, or a new input where the attentions count positions by themselves."""
        if self._positions is None:
            given = next(
                (v for v, role in self.roles.items() if role is Role.POSITIONS and v.shape is not None and len(v.shape) == 2), None
            )
            if given is None:
                given = ir.Value(name="mesh.position_ids", shape=ir.Shape(["batch", "chunk"]), type=ir.TensorType(ir.DataType.INT64))
                self.graph.inputs.append(given)
                self.roles[given] = Role.POSITIONS
            self._positions = given
        return self._positions


def optional(node: ir.Node, place: int) -> ir.Value | None:
    """Input number `place` of a node, None where it is left out."""
    return node.inputs[place] if place < len(node.inputs) else None


def stored(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The weight that `value` is, also in another shape: the embedding and the head of a model may be one weight. None: it is computed."""
    if value is None:
        return None
    node = value.producer()
    if node is None or node.op_type != "Reshape":
        return value.const_value
    data, shape = stored(node.inputs[0]), constant(node.inputs[1])
    if data is None or shape is None or (shape < 1).any():
        return None
    sizes = [int(size) for size in shape]
    return ir.LazyTensor(lambda: ir.tensor(data.numpy().reshape(sizes), dtype=data.dtype), dtype=data.dtype, shape=ir.Shape(sizes))


def refuse(node: ir.Node, what: str) -> UnsupportedModel:
    """The error for something about `node` that has no standard form here."""
    return UnsupportedModel(f"{node.op_type} {node.name}: {what} is not supported")


Rule = Callable[[Rewriter, ir.Node], Result]
