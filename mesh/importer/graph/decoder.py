"""An exported decoder as a graph one can ask questions of: which inputs are what, and what each value depends on.

    load      a .onnx file as a DecoderGraph in opset 24 with functions, constant branches and identities gone
    Kind      what a value depends on: nothing, the inputs' shapes and positions, the past cache, the tokens
    Role      what a graph input is

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

from mesh.errors import CorruptModel, ModelNotFound, UnsupportedModel

__all__ = ["DecoderGraph", "Kind", "Role", "argument", "attribute", "constant", "load", "maker", "scalar"]

OPSET = 24
SMALL = 4096  # elements: what counts as a constant rather than as a weight


_CACHE_BRANCH = "use_cache_branch"


class Kind(IntEnum):
    """What a value depends on, each including those before it. A shape depends on the inputs' shapes only, whatever it is the shape of."""

    CONSTANT = 0
    SHAPE = 1  # shapes of inputs, position ids, the attention mask
    PAST = 2  # the past key and value inputs
    TOKENS = 3  # the data path


class Role(Enum):
    TOKENS = "input_ids"
    MASK = "attention_mask"
    POSITIONS = "position_ids"
    CACHE_POSITION = "cache_position"
    SEGMENTS = "token_type_ids"
    PAST = "past"


@dataclass(slots=True)
class DecoderGraph:
    """A normalised graph. `nodes` is a topological order; `index` a node's place in it."""

    path: Path
    model: ir.Model
    nodes: list[ir.Node]
    roles: dict[ir.Value, Role]
    logits: ir.Value
    index: dict[ir.Node, int] = field(default_factory=dict)
    kinds: dict[ir.Value, Kind] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.index = {node: i for i, node in enumerate(self.nodes)}
        for value, role in self.roles.items():
            self.kinds[value] = {Role.TOKENS: Kind.TOKENS, Role.PAST: Kind.PAST}.get(role, Kind.SHAPE)
        for node in self.nodes:
            kind = max((self.kind(value) for value in node.inputs if value is not None), default=Kind.CONSTANT)
            if node.op_type in ("Shape", "Size") and kind > Kind.SHAPE:
                kind = Kind.SHAPE
            for output in node.outputs:
                self.kinds[output] = kind

    def kind(self, value: ir.Value) -> Kind:
        return self.kinds.get(value, Kind.CONSTANT)

    def input(self, role: Role) -> ir.Value | None:
        return next((value for value, other in self.roles.items() if other is role), None)

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


def maker(value: ir.Value) -> ir.Node:
    """The node that makes `value`, which is no input and no weight."""
    node = value.producer()
    assert node is not None, f"{value.name} is made by no node"
    return node


def argument(node: ir.Node, place: int) -> ir.Value:
    """An input that is not left out."""
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


def load(path: Path) -> DecoderGraph:
    """Read and normalise an exported decoder.

    Errors: ModelNotFound, CorruptModel (not ONNX, or its external data is missing or short), UnsupportedModel.
    """
    # normalisation lives beside this file; imported here because those files use its helpers
    from mesh.importer.passes.contrib import rewrite_contrib
    from mesh.importer.passes.experts import make_experts_static, mask_chosen_rows
    from mesh.importer.passes.normalise import free_batch, inline_branches, rewrite_einsum
    from mesh.importer.passes.opset import convert_opset

    if not path.is_file():
        raise ModelNotFound(f"{path} does not exist: give the path of an .onnx file")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise many types; all mean the file is not a whole ONNX model
        raise CorruptModel(f"{path} is not a whole ONNX model ({_first_line(error)}): export or download it again") from None
    if not len(model.graph.outputs):
        raise CorruptModel(f"{path} holds no graph: export or download it again")
    _check_external_data(path, model)
    if model.functions:
        model = passes.InlinePass()(model).model
    _take_cache_branch(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.RemoveInitializersFromInputsPass()(model)
    logits = _logits(path, model)
    del model.graph.outputs[:]
    model.graph.outputs.append(logits)
    roles = _roles(path, model)
    convert_opset(model)
    while True:
        rewrite_contrib(model, roles)
        rewrite_einsum(model)
        _drop_identities(model)
        graph = _decoder(path, model, roles)
        if not inline_branches(graph):
            break
    free_batch(graph)
    graph = _decoder(path, model, roles)
    while make_experts_static(graph):
        graph = _decoder(path, model, roles)
    if mask_chosen_rows(graph):
        graph = _decoder(path, model, roles)
    return graph


def _take_cache_branch(model: ir.Model) -> None:
    """Of optimum's merged decoders, which are one If on `use_cache_branch`: the decoder with a past."""
    from mesh.importer.passes.opset import inline_branch

    for node in list(model.graph):
        condition = node.inputs[0] if node.op_type == "If" and node.domain == "" else None
        if condition is not None and condition.name == _CACHE_BRANCH and condition.producer() is None:
            inline_branch(model, node, True)


def _decoder(path: Path, model: ir.Model, roles: dict[ir.Value, Role]) -> DecoderGraph:
    passes.RemoveUnusedNodesPass()(model)
    model.graph.sort()
    logits = model.graph.outputs[0]
    used = {value for node in model.graph for value in node.inputs}
    used |= {value for node in model.graph for graph in _subgraphs(node) for inner in graph for value in inner.inputs}
    if not any(role is Role.TOKENS and value in used for value, role in roles.items()):
        raise UnsupportedModel(f"{path}: the output {logits.name!r} does not depend on the token ids: export the model with its lm head")
    return DecoderGraph(path, model, list(model.graph), dict(roles), logits)


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for value in node.attributes.values():
        if value.type == ir.AttributeType.GRAPH:
            graph = value.as_graph()
            yield graph
            for inner in graph:
                yield from _subgraphs(inner)


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _check_external_data(path: Path, model: ir.Model) -> None:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = Path(tensor.path)
        if not file.is_file():
            raise CorruptModel(f"{path}: weights file {file.name} is missing: put it beside the .onnx file")
        end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if file.stat().st_size < end:
            raise CorruptModel(
                f"{path}: weights file {file.name} has {file.stat().st_size:,} bytes where {value.name} ends at {end:,}: download it again"
            )


def _logits(path: Path, model: ir.Model) -> ir.Value:
    outputs = list(model.graph.outputs)
    named = [value for value in outputs if value.name and value.name.split(".")[-1] == "logits"]
    if named:
        return named[0]
    floats = [v for v in outputs if v.dtype is not None and v.dtype.is_floating_point() and (v.shape is None or len(v.shape) == 3)]
    if len(floats) == 1 and len(outputs) == 1:
        return floats[0]
    names = ", ".join(str(value.name) for value in outputs[:4])
    raise UnsupportedModel(f"{path}: no output is named 'logits' (there are {names}): export a causal language model with its lm head")


def _roles(path: Path, model: ir.Model) -> dict[ir.Value, Role]:
    roles: dict[ir.Value, Role] = {}
    tokens: list[ir.Value] = []
    for value in list(model.graph.inputs):
        name = (value.name or "").lower()
        if name == _CACHE_BRANCH:
            _bind(model, value, np.array(True))
        elif name.endswith("logits_to_keep"):  # 0 keeps those of every position
            _bind(model, value, np.zeros(_static(value), np.int64))
        elif value.dtype is not None and value.dtype.is_floating_point():
            if value.shape is not None and len(value.shape) >= 4:
                roles[value] = Role.PAST
            elif any(True for _ in value.uses()):
                raise UnsupportedModel(f"{path}: input {value.name} is floating point and no key/value cache: export with input_ids")
        elif "mask" in name:
            roles[value] = Role.MASK
        elif "cache_position" in name:
            roles[value] = Role.CACHE_POSITION
        elif "position" in name:
            roles[value] = Role.POSITIONS
        elif "token_type" in name or "segment" in name:
            roles[value] = Role.SEGMENTS
        else:
            tokens.append(value)
    if len(tokens) > 1:
        tokens = [value for value in tokens if "ids" in (value.name or "").lower()] or tokens
    if len(tokens) != 1:
        seen = ", ".join(str(value.name) for value in model.graph.inputs)
        raise UnsupportedModel(
            f"{path}: one integer input of token ids is needed; the inputs are {seen}: export a decoder-only language model"
        )
    if tokens[0].shape is not None:
        if len(tokens[0].shape) != 2:
            raise UnsupportedModel(f"{path}: input {tokens[0].name} has shape {tokens[0].shape} where [batch, tokens] is needed")
        if isinstance(tokens[0].shape[1], int):
            raise UnsupportedModel(f"{path}: exported for exactly {tokens[0].shape[1]} tokens: export it with a dynamic sequence length")
    roles[tokens[0]] = Role.TOKENS
    return roles


def _static(value: ir.Value) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else 1 for dim in value.shape or ())


def _bind(model: ir.Model, value: ir.Value, array: np.ndarray) -> None:
    """Turn a graph input into a constant."""
    model.graph.inputs.remove(value)
    value.const_value = ir.tensor(array, name=value.name)
    model.graph.register_initializer(value)


def _drop_identities(model: ir.Model) -> None:
    """Replace the outputs of Identity, Dropout (at inference) and single-input Concat, Sum, Max, Min by their inputs."""
    for node in list(model.graph):
        single = node.op_type in ("Concat", "Sum", "Max", "Min", "Mean") and len(node.inputs) == 1
        if node.domain == "" and (node.op_type in ("Identity", "Dropout") or single):
            if node.op_type == "Dropout" and len(node.outputs) > 1 and node.outputs[1].uses():
                continue
            ir.convenience.replace_all_uses_with(node.outputs[0], argument(node, 0), replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
