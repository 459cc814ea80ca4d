"""An exported decoder as a graph that can be asked questions: what each input is, and what each value depends on.

    Role           what a graph input is
    Dependence     what a value depends on: nothing, the inputs' shapes and positions, the past cache, or the tokens
    Draft          a decoder while the passes still rewrite it
    DecoderGraph   a decoder as the analysis reads it

Weights stay where they are: nothing here reads a tensor of more than a few numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as passes

from mesh.errors import UnsupportedModel

__all__ = [
    "PAST_STATE",
    "PRESENT_STATE",
    "DecoderGraph",
    "Dependence",
    "Draft",
    "Role",
    "attribute",
    "constant",
    "input_of",
    "producer",
    "scalar",
]

PAST_STATE, PRESENT_STATE = "past_state.", "present_state."
"""What the names of inputs and outputs that are states begin with; the layer and the number of the state in it follow."""
SMALL = 4096  # elements: what counts as a constant rather than as a weight


class Dependence(IntEnum):
    """What a value depends on; each level includes those before it. The shape of any value depends on the inputs' shapes only."""

    CONSTANT = 0
    SHAPE = 1  # shapes of inputs, position ids, the attention mask
    PAST = 2  # the past key and value inputs
    TOKENS = 3  # the data path, with the states of layers that carry some


class Role(Enum):
    TOKENS = "input_ids"
    MASK = "attention_mask"
    POSITIONS = "position_ids"
    CACHE_POSITION = "cache_position"
    SEGMENTS = "token_type_ids"
    PAST = "past"
    STATE = "state"


_DEPENDENCE = {Role.TOKENS: Dependence.TOKENS, Role.STATE: Dependence.TOKENS, Role.PAST: Dependence.PAST}


@dataclass(slots=True)
class DecoderGraph:
    """A graph after all passes. `nodes` is in topological order; `index` is a node's place in it. `path` is for messages. `source_logits`:
    what the source itself calls its logits, which a pass may have made anew."""

    path: Path
    model: ir.Model
    nodes: list[ir.Node]
    roles: dict[ir.Value, Role]
    logits: ir.Value
    index: dict[ir.Node, int] = field(default_factory=dict)
    dependences: dict[ir.Value, Dependence] = field(default_factory=dict)
    source_logits: str = ""

    def __post_init__(self) -> None:
        self.index = {node: i for i, node in enumerate(self.nodes)}
        for value, role in self.roles.items():
            self.dependences[value] = _DEPENDENCE.get(role, Dependence.SHAPE)
        for node in self.nodes:
            most = max((self.dependence(value) for value in node.inputs if value is not None), default=Dependence.CONSTANT)
            if node.op_type in ("Shape", "Size"):
                most = min(most, Dependence.SHAPE)
            for output in node.outputs:
                self.dependences[output] = most

    def dependence(self, value: ir.Value) -> Dependence:
        return self.dependences.get(value, Dependence.CONSTANT)

    def input(self, role: Role) -> ir.Value | None:
        return next((value for value, other in self.roles.items() if other is role), None)

    @property
    def states(self) -> list[tuple[int, ir.Value, ir.Value]]:
        """Of each state the layer of the source, the value before the tokens and that after them, in order."""
        after = {str(value.name).removeprefix(PRESENT_STATE): value for value in self.model.graph.outputs[1:]}
        before = {str(value.name).removeprefix(PAST_STATE): value for value, role in self.roles.items() if role is Role.STATE}
        places = sorted(tuple(map(int, name.split("."))) for name in before)
        names = [f"{layer}.{number}" for layer, number in places]
        return [(place[0], before[name], after[name]) for place, name in zip(places, names, strict=True)]

    @property
    def has_past(self) -> bool:
        return self.input(Role.PAST) is not None

    def ancestors(self, value: ir.Value) -> Iterator[ir.Node]:
        """The nodes `value` is computed from, nearest first."""
        seen: set[ir.Node] = set()
        stack = [value]
        while stack:
            current = stack.pop()
            node = current.producer()
            if node is None or node in seen:
                continue
            seen.add(node)
            yield node
            stack.extend(v for v in node.inputs if v is not None)


@dataclass(slots=True)
class Draft:
    """A decoder while the passes rewrite `model`. `roles` and `source_logits` are empty until the pass that names the inputs has run."""

    path: Path
    model: ir.Model
    roles: dict[ir.Value, Role] = field(default_factory=dict)
    source_logits: str = ""

    def analysed(self) -> DecoderGraph:
        """The graph as it is now, without unused nodes and in topological order.

        UnsupportedModel if the logits do not depend on the token ids.
        """
        model = self.model
        passes.RemoveUnusedNodesPass()(model)
        model.graph.sort()
        logits = model.graph.outputs[0]
        used = {value for node in model.graph for value in node.inputs}
        used |= {value for node in model.graph for graph in _subgraphs(node) for inner in graph for value in inner.inputs}
        if not any(role is Role.TOKENS and value in used for value, role in self.roles.items()):
            raise UnsupportedModel(
                f"{self.path}: the output {logits.name!r} does not depend on the token ids: export the model with its lm head"
            )
        return DecoderGraph(self.path, model, list(model.graph), dict(self.roles), logits, source_logits=self.source_logits)


def producer(value: ir.Value) -> ir.Node:
    """The node that produces `value`, which must be neither a graph input nor a weight."""
    node = value.producer()
    assert node is not None, f"no node produces {value.name}"
    return node


def input_of(node: ir.Node, place: int) -> ir.Value:
    """Input number `place` of a node, which must not be left out."""
    value = node.inputs[place]
    assert value is not None, f"input {place} of {node.name} is left out"
    return value


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of a node's attribute, `default` where it is absent."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array of a small constant or weight; None for anything else."""
    if value is None or value.const_value is None or value.const_value.size > SMALL:
        return None
    return value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number in a constant of one element; None for anything else."""
    array = constant(value)
    return float(array.reshape(())) if array is not None and array.size == 1 else None


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for value in node.attributes.values():
        if value.type == ir.AttributeType.GRAPH:
            graph = value.as_graph()
            yield graph
            for inner in graph:
                yield from _subgraphs(inner)
