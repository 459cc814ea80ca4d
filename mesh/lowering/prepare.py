"""What happens before the first trace: functions are inlined, dead nodes are dropped, every op and attribute is checked, and weights are
separated from constants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from mesh.errors import CorruptModel, UnsupportedModel
from mesh.lowering import ops, registry
from mesh.lowering.registry import Op
from mesh.lowering.tensors import PackedFormat, TensorReader

__all__ = ["WEIGHT_ELEMENTS", "Graph", "GraphNode", "Prepared", "prepare", "with_last_use", "with_nodes"]

WEIGHT_ELEMENTS = 1024  # initializers of at least this many elements are arguments of the compiled code, not constants in it

_MOST_FUNCTION_LEVELS = 16


@dataclass(frozen=True)
class GraphNode:
    """One node, ready to evaluate. Subgraph attributes are Graphs, tensors are numpy, strings are str."""

    name: str
    op: Op
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    label: str

    def captured(self) -> set[str]:
        """Names that its subgraphs take from the graphs around them."""
        return {name for value in self.attributes.values() if isinstance(value, Graph) for name in value.captured()}


@dataclass(frozen=True)
class Graph:
    """Live nodes in topological order. `last_use`: after which node (its index) which values are no longer needed."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[GraphNode, ...]
    constants: Mapping[str, np.ndarray]
    last_use: Mapping[int, tuple[str, ...]] = field(default_factory=dict)

    def captured(self) -> set[str]:
        """Names it takes from the graphs around it."""
        local = {*self.inputs, *self.constants, *(name for node in self.nodes for name in node.outputs)}
        used = {name for node in self.nodes for name in _uses(node)} | set(self.outputs)
        return {name for name in used if name} - local


@dataclass(frozen=True)
class Prepared:
    graph: Graph
    weights: dict[str, np.ndarray]
    packed: dict[str, PackedFormat]
    static_inputs: frozenset[str]


def prepare(model: ModelProto, *, base_dir: Path | None) -> Prepared:
    """See mesh.lowering.lower."""
    ops.load()
    model = _inline(model)
    opsets = _opsets(model)
    problems = list(_problems(model.graph, opsets))
    if problems:
        raise UnsupportedModel("cannot be run here: " + "; ".join(_grouped(problems)))
    reader = TensorReader(base_dir)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    tensors |= {node.output[0]: tensor for node in model.graph.node if (tensor := _constant_tensor(node)) is not None}
    graph = _graph(model.graph, opsets, reader, skip=set(tensors))
    used = graph.captured()
    _check_defined(model.graph, graph, used, set(tensors))
    needed = _static_names(graph)
    constants, weights, packed = dict(graph.constants), {}, {}
    for name in sorted(used & set(tensors)):
        tensor = tensors[name]
        if _elements(tensor) >= WEIGHT_ELEMENTS and name not in needed and tensor.data_type != TensorProto.STRING:
            layout = reader.packed_format(tensor)
            if layout is not None:
                packed[name] = layout
            weights[name] = reader.read(tensor) if layout is None else reader.read_packed(tensor)
        else:
            constants[name] = reader.read(tensor)
    graph = with_last_use(Graph(graph.inputs, graph.outputs, graph.nodes, constants))
    return Prepared(graph, weights, packed, frozenset(needed & set(graph.inputs)))


def _inline(model: ModelProto) -> ModelProto:
    """Model functions replaced by their bodies, and so are standard functions that have no lowering of their own."""
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    for _ in range(_MOST_FUNCTION_LEVELS):
        opsets = _opsets(model)
        functions: dict[tuple[str, str], Any] = {}
        for node in _live_nodes(model.graph):
            domain = _domain(node)
            if registry.find(node.op_type, domain, opsets.get(domain, 1)) is None and domain in opsets:
                schema = _function_schema(node.op_type, opsets[domain], domain)
                if schema is not None:
                    functions[domain, node.op_type] = schema
        if not functions:
            return model
        complete = ModelProto()
        complete.CopyFrom(model)
        _set_defaults(complete.graph, functions)
        try:
            model = onnx.inliner.inline_selected_functions(complete, sorted(functions), inline_schema_functions=True)
        except RuntimeError:  # the standard's expansion needs types that the graph does not state
            return model
        if set(functions) & {(_domain(node), node.op_type) for node in _live_nodes(model.graph)}:
            return model
    return model


def _function_schema(op_type: str, opset: int, domain: str) -> Any:
    """The schema of a standard op that is defined as a function of others, or None."""
    try:
        schema: Any = onnx.defs.get_schema(op_type, opset, domain)
    except onnx.defs.SchemaError:
        return None
    return schema if schema.has_function or schema.has_context_dependent_function else None


def _set_defaults(graph: GraphProto, functions: Mapping[tuple[str, str], Any]) -> None:
    """Write out default attributes of function ops: the inliner drops references to attributes that are not there."""
    for node in graph.node:
        schema = functions.get((_domain(node), node.op_type))
        if schema is not None:
            given = {attribute.name for attribute in node.attribute}
            node.attribute.extend(
                attribute.default_value
                for name, attribute in schema.attributes.items()
                if name not in given and attribute.default_value.name
            )
        for sub in _subgraphs(node):
            _set_defaults(sub, functions)


def _problems(graph: GraphProto, opsets: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """(what is wrong, node name) for each live node that cannot be evaluated."""
    for node in _live_nodes(graph):
        domain = _domain(node)
        opset = opsets.get(domain, 1)
        what = f"{domain + '.' if domain else ''}{node.op_type} (opset {opset})"
        name = node.name or (node.output[0] if node.output else "")
        if node.op_type == "Constant" and domain == "":
            if _constant_tensor(node) is None:
                yield f"{what} with a sparse value", name
            continue
        op = registry.find(node.op_type, domain, opset)
        if op is None:
            yield what, name
            continue
        given = {attribute.name: attribute for attribute in node.attribute}
        sparse = [a.name for a in given.values() if a.type in (AttributeProto.SPARSE_TENSOR, AttributeProto.SPARSE_TENSORS)]
        scalars = {key: None if key in sparse or _subgraphs_of(a) else _scalar(a) for key, a in given.items()}
        problem = op.problem(scalars, len(node.input))
        if problem or sparse:
            yield f"{what}: {problem or 'sparse attribute ' + sparse[0]}", name
    for tensor in graph.sparse_initializer:
        yield "a sparse initializer", tensor.values.name


def _grouped(problems: Iterable[tuple[str, str]]) -> list[str]:
    by_problem: dict[str, list[str]] = {}
    for what, name in problems:
        by_problem.setdefault(what, []).append(name)
    return [
        f"{what} at node {names[0]!r}" + (f" and {len(names) - 1} more" if len(names) > 1 else "") for what, names in by_problem.items()
    ]


def _graph(proto: GraphProto, opsets: Mapping[str, int], reader: TensorReader, skip: set[str] | None = None) -> Graph:
    """A graph without its initializers when they are in `skip` (the caller reads those it needs), with them otherwise."""
    held: dict[str, np.ndarray] = {}
    if skip is None:
        held = {tensor.name: reader.read(tensor) for tensor in proto.initializer}
    nodes = []
    for node in _live(proto):
        tensor = _constant_tensor(node)
        if tensor is not None:
            if skip is None:
                held[node.output[0]] = reader.read(tensor)
            continue
        domain = _domain(node)
        op = registry.find(node.op_type, domain, opsets.get(domain, 1))
        assert op is not None, node.op_type  # _problems has been here
        attributes = {
            attribute.name: _graph(attribute.g, opsets, reader) if attribute.type == AttributeProto.GRAPH else _value(attribute, reader)
            for attribute in node.attribute
        }
        name = node.name or (node.output[0] if node.output else node.op_type)
        label = f"{domain}.{node.op_type}" if domain else node.op_type
        nodes.append(GraphNode(name, op, tuple(node.input), tuple(node.output), attributes, label))
    initialized = {tensor.name for tensor in proto.initializer}
    inputs = tuple(value.name for value in proto.input if value.name not in initialized)
    return Graph(inputs, tuple(value.name for value in proto.output), tuple(nodes), held)


def _check_defined(proto: GraphProto, graph: Graph, captured: set[str], tensors: set[str]) -> None:
    undefined = sorted(captured - tensors)
    if undefined:
        raise CorruptModel(f"graph {proto.name!r} uses {undefined[0]!r}, which nothing defines; export it again")
    seen = {*graph.inputs, *tensors}
    for node in graph.nodes:
        for name in _uses(node):
            if name and name not in seen:
                raise CorruptModel(f"graph {proto.name!r}: node {node.name!r} uses {name!r} before it is computed; export it again")
        seen.update(node.outputs)


def _static_names(graph: Graph, needed: Iterable[str] = ()) -> set[str]:
    """Names of values that must be known at trace time, because a shape follows from them."""
    names = set(needed)
    for node in reversed(graph.nodes):
        for attribute in node.attributes.values():
            if isinstance(attribute, Graph):
                inside = _static_names(attribute)
                names |= inside & attribute.captured()
                if inside & set(attribute.inputs):
                    names.update(node.inputs)
        names.update(node.inputs[i] for i in node.op.static if i < len(node.inputs))
        if not node.op.shape_only and names & set(node.outputs):
            names.update(name for i, name in enumerate(node.inputs) if i not in node.op.type_only)
    return names - {""}


def with_last_use(graph: Graph) -> Graph:
    """The same graph, knowing after which node each value is no longer needed."""
    seen = set(graph.outputs)
    result: dict[int, tuple[str, ...]] = {}
    for index in reversed(range(len(graph.nodes))):
        dead = tuple(sorted({name for name in (*_uses(graph.nodes[index]), *graph.nodes[index].outputs) if name and name not in seen}))
        seen.update(dead)
        if dead:
            result[index] = dead
    return replace(graph, last_use=result)


def with_nodes(graph: Graph, nodes: Sequence[GraphNode]) -> Graph:
    """The graph with these nodes, less those whose results nothing needs, and the constants that they read."""
    wanted = set(graph.outputs)
    kept = []
    for node in reversed(nodes):
        if wanted & set(node.outputs):
            kept.append(node)
            wanted |= _uses(node)
    constants = {name: value for name, value in graph.constants.items() if name in wanted}
    return with_last_use(Graph(graph.inputs, graph.outputs, tuple(reversed(kept)), constants))


def _uses(node: GraphNode) -> set[str]:
    """Names a node reads, its subgraphs' captures included."""
    return {*node.inputs} | node.captured()


def _live(graph: GraphProto) -> list[NodeProto]:
    """The nodes on which an output depends, in order."""
    wanted = {value.name for value in graph.output}
    live = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            live.append(node)
            wanted.update(node.input)
            for sub in _subgraphs(node):
                wanted.update(_mentioned(sub))
    return live[::-1]


def _live_nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Live nodes of a graph and of its subgraphs."""
    for node in _live(graph):
        yield node
        for sub in _subgraphs(node):
            yield from _live_nodes(sub)


def _mentioned(graph: GraphProto) -> set[str]:
    names = {value.name for value in graph.output}
    for node in graph.node:
        names.update(node.input)
        for sub in _subgraphs(node):
            names |= _mentioned(sub)
    return names


def _subgraphs(node: NodeProto) -> list[GraphProto]:
    return [graph for attribute in node.attribute for graph in _subgraphs_of(attribute)]


def _subgraphs_of(attribute: AttributeProto) -> list[GraphProto]:
    return [attribute.g] if attribute.type == AttributeProto.GRAPH else list(attribute.graphs)


def _opsets(model: ModelProto) -> dict[str, int]:
    return {"" if entry.domain == "ai.onnx" else entry.domain: entry.version for entry in model.opset_import}


def _domain(node: NodeProto) -> str:
    return "" if node.domain == "ai.onnx" else node.domain


def _elements(tensor: TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64))


def _value(attribute: AttributeProto, reader: TensorReader) -> Any:
    return reader.read(attribute.t) if attribute.type == AttributeProto.TENSOR else _scalar(attribute)


def _scalar(attribute: AttributeProto) -> Any:
    value = onnx.helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if attribute.type in (AttributeProto.INTS, AttributeProto.FLOATS):
        return tuple(value)
    if attribute.type == AttributeProto.STRINGS:
        return tuple(item.decode() for item in value)
    return value


def _constant_tensor(node: NodeProto) -> TensorProto | None:
    """The value of a Constant node; None when it is not one, or a sparse one."""
    if node.op_type != "Constant" or _domain(node) or not node.attribute:
        return None
    attribute = node.attribute[0]
    if attribute.name == "value":
        tensor: TensorProto = attribute.t
        return tensor
    arrays: dict[str, Callable[[], np.ndarray]] = {
        "value_float": lambda: np.array(attribute.f, np.float32),
        "value_floats": lambda: np.array(attribute.floats, np.float32),
        "value_int": lambda: np.array(attribute.i, np.int64),
        "value_ints": lambda: np.array(attribute.ints, np.int64),
        "value_string": lambda: np.array(attribute.s.decode(), object),
        "value_strings": lambda: np.array([item.decode() for item in attribute.strings], object),
    }
    return onnx.numpy_helper.from_array(arrays[attribute.name]()) if attribute.name in arrays else None
