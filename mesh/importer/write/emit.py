"""Re-emit one block's part of an exported graph as a block of its own.

The nodes of the data path are copied. Attention patterns, sizes and positions are replaced: see emit_attention and emit_values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.analysis.cut import Crossing, DataPath
from mesh.importer.analysis.layers import CarriedState
from mesh.importer.analysis.mask import ScoreRule
from mesh.importer.analysis.positions import InputParts
from mesh.importer.graph.decoder import Dependence, Role, input_of, producer
from mesh.importer.write.blocks import GraphBuilder, Weight
from mesh.importer.write.emit_attention import emit_attention
from mesh.importer.write.emit_values import FLOATS, Values, attributes_of

__all__ = ["Emitter", "Part"]


@dataclass(frozen=True, slots=True)
class Part:
    """What a block is made of: from `start` (none: the token ids) to `end`, the attention in it, and the states that it carries.
    `width`: of the hidden state that enters and leaves it."""

    name: str
    start: tuple[Crossing, ...]
    end: tuple[Crossing, ...]
    width: int
    rule: ScoreRule | None = None
    states: Sequence[CarriedState] = ()


class Emitter:
    """Builds the graph of one part. `source_type` is the float type of the source's data path."""

    def __init__(self, path: DataPath, inputs: InputParts, builder: GraphBuilder, part: Part, source_type: np.dtype[Any]) -> None:
        self.path, self.graph, self.builder, self.part = path, path.graph, builder, part
        first_input = "hidden_in" if part.start else "input_ids"
        self.values = Values(path.graph, inputs, builder, source_type, first_input)

    @property
    def uses_positions(self) -> bool:
        """Whether the block reads position_ids."""
        return self.values.uses_positions

    def emit(self, out: str) -> None:
        """Emit everything up to the part's end, which gets the name `out` in the compute type. States are float32: their errors add up."""
        values = self.values
        tokens = self.graph.input(Role.TOKENS)
        starts, ends = ([each.value for each in side] for side in (self.part.start, self.part.end))
        if starts:
            self._take_apart()
        wide = np.dtype(np.float32)
        for number, state in enumerate(self.part.states):
            values.names[state.before] = f"past_state_{number}"
            values.types[f"past_state_{number}"] = wide
        before = {state.before for state in self.part.states}
        ends += [state.after for state in self.part.states]
        order = [value for value in self.path.between(ends, starts) if value not in before]
        done: set[ir.Node] = set()
        for value in order:
            if value is tokens:
                values.names[value] = self._token_ids(value)
                continue
            pattern = self.path.patterns.get(value)
            if pattern is not None:
                values.names[value] = emit_attention(values, pattern, self.part.rule)
                continue
            node = producer(value)
            if node in done:
                continue
            done.add(node)
            self._node(node)
        self.builder.op("Identity", self._put_together(fill=out == "hidden_out"), out=out)
        for number, state in enumerate(self.part.states):
            self.builder.op("Identity", values.typed(values.names[state.after], wide), out=f"present_state_{number}")

    def _take_apart(self) -> None:
        """Name the values that cross into the block: parts of `hidden_in`, one after the other."""
        values, builder, crossings = self.values, self.builder, self.part.start
        names = ["hidden_in"]
        if len(crossings) > 1 or crossings[0].width < self.part.width:
            widths = [each.width for each in crossings]
            rest = self.part.width - sum(widths)
            sizes = [*widths, *([rest] if rest else [])]
            names = builder.ops("Split", "hidden_in", builder.const(sizes), out=len(sizes), axis=-1)
        for each, name in zip(crossings, names[: len(crossings)], strict=True):
            if len(each.rest) != 1:
                name = builder.op("Reshape", name, builder.const([0, 0, *each.rest]))
            if each.perm != tuple(range(len(each.perm))):
                name = builder.op("Transpose", name, perm=[each.perm.index(axis) for axis in range(len(each.perm))])
            values.names[each.value], values.types[name] = name, values.compute

    def _put_together(self, *, fill: bool) -> str:
        """The values that leave the block, one after the other; `fill`: and zeros up to the width of the hidden state."""
        values, builder, parts = self.values, self.builder, []
        for each in self.part.end:
            name = values.typed(values.names[each.value], values.compute)
            if each.perm != tuple(range(len(each.perm))):
                name = builder.op("Transpose", name, perm=list(each.perm))
            parts.append(name if len(each.rest) == 1 else builder.op("Reshape", name, builder.const([0, 0, each.width])))
        together = parts[0] if len(parts) == 1 else builder.op("Concat", *parts, axis=-1)
        missing = self.part.width - sum(each.width for each in self.part.end)
        return builder.op("Pad", together, builder.const([0, 0, 0, 0, 0, missing])) if fill and missing else together

    def _token_ids(self, tokens: ir.Value) -> str:
        if tokens.dtype in (None, ir.DataType.INT64):
            return "input_ids"
        return self.builder.op("Cast", "input_ids", to=int(tokens.dtype))

    def _node(self, node: ir.Node) -> None:
        values = self.values
        handler = {"MatMul": self._matmul, "Gemm": self._gemm, "Gather": self._gather, "GatherND": self._experts}.get(node.op_type)
        if handler is not None and handler(node):
            return
        inputs = [self._input(node, i) for i in range(len(node.inputs))]
        attributes = attributes_of(node)
        if node.op_type == "Reshape" and self.graph.dependence(input_of(node, 1)) is not Dependence.CONSTANT:
            attributes.pop("allowzero", None)
        values.place(node, inputs, attributes)

    def _input(self, node: ir.Node, place: int) -> str:
        values = self.values
        value = node.inputs[place]
        if value is None:
            return ""
        kind = self.graph.dependence(value)
        if kind is Dependence.TOKENS:
            return values.names[value]
        if kind is Dependence.CONSTANT:
            return values.constant(value)
        if kind is Dependence.PAST:
            raise UnsupportedModel(f"node {node.name} ({node.op_type}) reads the cache outside attention: not supported")
        if node.op_type in ("Reshape", "Expand") and place == 1:
            return values.target(node, value)
        return values.described(value, node)

    def _matmul(self, node: ir.Node) -> bool:
        values = self.values
        data, weight = input_of(node, 0), input_of(node, 1)
        if self.graph.dependence(weight) is not Dependence.CONSTANT or self.graph.dependence(data) is not Dependence.TOKENS:
            return False
        shape = values.inputs.probes[0].shape(weight)
        if len(shape) not in (2, 3) or values.kept(weight):
            return False
        x = values.typed(values.names[data], values.compute) if values.widening else values.names[data]
        own = values.source_matrix(weight, turned=True)
        if own is not None:
            name = self.builder.linear(x, values.fresh_name(str(weight.name)), own)
            values.names[node.outputs[0]], values.types[name] = name, values.compute
            return True
        matrix = values.matrix(weight, lambda: values.fold(weight), len(shape) == 3)
        name = self.builder.op("MatMul", x, matrix)
        values.names[node.outputs[0]], values.types[name] = name, values.compute
        return True

    def _gemm(self, node: ir.Node) -> bool:
        values = self.values
        data, weight = input_of(node, 0), input_of(node, 1)
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        attributes = attributes_of(node)
        plain = attributes.get("alpha", 1.0) == 1.0 and attributes.get("beta", 1.0) == 1.0 and not attributes.get("transA", 0)
        constant = self.graph.dependence(weight) is Dependence.CONSTANT and (
            bias is None or self.graph.dependence(bias) is Dependence.CONSTANT
        )
        if not plain or not constant or self.graph.dependence(data) is not Dependence.TOKENS or values.kept(weight):
            return False
        transpose = bool(attributes.get("transB", 0))
        x = values.typed(values.names[data], values.compute)
        own = values.source_matrix(weight, turned=not transpose)
        if own is not None:
            name = self.builder.linear(x, values.fresh_name(str(weight.name)), own)
        else:
            matrix = values.matrix(
                weight, lambda: values.fold(weight).T if transpose else values.fold(weight), False, "T" if transpose else ""
            )
            name = self.builder.op("MatMul", x, matrix)
        if bias is not None:
            name = self.builder.op("Add", name, values.typed(values.constant(bias), values.compute))
        values.names[node.outputs[0]], values.types[name] = name, values.compute
        return True

    def _experts(self, node: ir.Node) -> bool:
        """The weights of the experts that a router has chosen, of a tensor of experts that nothing but such gathers read for products."""
        values = self.values
        table = input_of(node, 0)
        attributes = attributes_of(node)
        if self.graph.dependence(table) is not Dependence.CONSTANT or attributes.get("axis", 0) or attributes.get("batch_dims", 0):
            return False
        probe = values.inputs.probes[0]
        if len(probe.shape(table)) != 3 or probe.dtype(table) not in FLOATS or values.kept(table):
            return False
        rank = len(probe.shape(node.outputs[0]))
        turned = _turned(node.outputs[0], rank)
        if turned is None:
            return False
        matrix, outputs_first = values.experts(table, turned=turned)
        name = self.builder.op(node.op_type, matrix, self._input(node, 1))
        if turned == outputs_first:
            name = self.builder.op("Transpose", name, perm=[*range(rank - 2), rank - 1, rank - 2])
        values.names[node.outputs[0]], values.types[name] = name, values.compute
        return True

    def _gather(self, node: ir.Node) -> bool:
        """The embedding of the token ids, or experts."""
        return self._embedding(node) or self._experts(node)

    def _embedding(self, node: ir.Node) -> bool:
        values = self.values
        table, ids = input_of(node, 0), input_of(node, 1)
        if self.graph.dependence(table) is not Dependence.CONSTANT or self.graph.roles.get(ids) is not Role.TOKENS or values.kept(table):
            return False
        if attributes_of(node).get("axis", 0) != 0 or len(values.inputs.probes[0].shape(table)) != 2:
            return False
        own = values.source_matrix(table, turned=False) or Weight(lambda: values.fold(table))
        name = self.builder.embedding(values.names[ids], values.fresh_name(str(table.name)), own)
        values.names[node.outputs[0]], values.types[name] = name, values.compute
        return True


def _turned(value: ir.Value, rank: int, swapped: bool = False) -> bool | None:
    """Whether the products that read chosen experts [..., a, b] sum over a; None where they differ, or something else reads them."""
    found: set[bool | None] = set()
    for node, place in value.uses():
        perm = list(attributes_of(node).get("perm", ())) if node.op_type == "Transpose" else []
        if node.op_type == "MatMul":
            found.add((place == 1) ^ swapped)
        elif perm and perm[:-2] == list(range(rank - 2)):
            found.add(_turned(node.outputs[0], rank, swapped ^ (perm[-1] == rank - 2)))
        else:
            found.add(None)
    return found.pop() if len(found) == 1 and not value.is_graph_output() else None
