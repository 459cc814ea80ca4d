"""ONNX graph -> pure function of (weights, inputs), by interpreting the graph once at trace time.

    numpy values (constants, shapes, Range of those ...) --> every op on them is evaluated at once, exactly, and stays numpy
    traced values (weights, run-time inputs)             --> every op on them becomes jax.numpy / lax

So shape arithmetic disappears from the compiled code, and whatever must be static is static by construction.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx

from mesh.errors import UnsupportedModel
from mesh.lowering import static
from mesh.lowering.prepare import Graph, GraphNode, prepare
from mesh.lowering.registry import Op
from mesh.lowering.tensors import PackedFormat, unpack

__all__ = ["Lowered", "Scope", "evaluate", "lower"]


@dataclass(frozen=True)
class Scope:
    """What a subgraph sees of the graphs around it."""

    values: Mapping[str, Any]

    def run(self, graph: Graph, args: Sequence[Any]) -> list[Any]:
        """Evaluate a subgraph; `args` are its inputs in order, other names come from the scope."""
        env = {**self.values, **graph.constants, **dict(zip(graph.inputs, args, strict=True))}
        interpret(graph, env, {})
        return [env[name] for name in graph.outputs]


class Lowered:
    """One ONNX graph as a pure function, traceable by jax.jit.

    `inputs`, `outputs`: names, in the model's order. `weights`: the initializers passed as traced arguments, as views of the
    file where they are external data. Weights of 4 and 2 bits are the packed bytes as ONNX stores them, uint8 [ceil(n / 2)] or
    [ceil(n / 4)]; `packed` names them with their shape and type, and the call unpacks them to int8 or uint8 [shape].
    `static_inputs`: inputs that decide shapes; give those as numpy, the others may be traced.

    int64 and float64 values that are traced are int32 and float32 unless JAX runs with x64.
    """

    def __init__(
        self, graph: Graph, weights: dict[str, np.ndarray], packed: dict[str, PackedFormat], static_inputs: frozenset[str]
    ) -> None:
        self.graph = graph
        self.inputs = graph.inputs
        self.outputs = graph.outputs
        self.weights = weights
        self.packed = packed
        self.static_inputs = static_inputs

    def __call__(self, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs by name. `weights` are the model's own or any pytree objects of the same names (see `evaluate`)."""
        env = self._environment(weights, inputs)
        interpret(self.graph, env, self.graph.last_use)
        return {name: env[name] for name in self.outputs}

    def trace(self, weights: Mapping[str, Any], inputs: Mapping[str, Any], until: str | None = None) -> dict[str, Any]:
        """Every value by name, up to and including the node (or the value) called `until`. For debugging: nothing is freed."""
        env = self._environment(weights, inputs)
        if until is not None and not any(until == node.name or until in node.outputs for node in self.graph.nodes):
            raise KeyError(f"no node or value is called {until!r}")
        interpret(self.graph, env, {}, until=until)
        return env

    def _environment(self, weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
        missing = [name for name in self.inputs if name not in inputs] + [name for name in self.weights if name not in weights]
        if missing:
            raise TypeError(f"no value for {', '.join(missing)}")
        env: dict[str, Any] = dict(self.graph.constants)
        for name in self.weights:
            env[name] = unpack(weights[name], self.packed[name]) if name in self.packed else weights[name]
        for name in self.inputs:
            value = inputs[name]
            env[name] = np.asarray(value) if isinstance(value, (bool, int, float, list, np.generic)) else value
        return env


def lower(model: onnx.ModelProto, *, base_dir: Path | None = None) -> Lowered:
    """Check that every node can be evaluated and make the graph callable; nothing is traced or copied yet.

    `base_dir` is the folder of the model's file, where external data lies. Raises UnsupportedModel with all the ops or
    attributes that are missing, each with domain, opset and node; CorruptModel when external data is not there.
    """
    prepared = prepare(model, base_dir=base_dir)
    return Lowered(prepared.graph, prepared.weights, prepared.packed, prepared.static_inputs)


def interpret(graph: Graph, env: dict[str, Any], last_use: Mapping[int, tuple[str, ...]], until: str | None = None) -> None:
    """Evaluate nodes in order into `env`, dropping values after their last use so that an eager run keeps few alive."""
    for index, node in enumerate(graph.nodes):
        args = [env[name] if name else None for name in node.inputs]
        results = evaluate(node, args, Scope(env) if node.op.takes_scope else None)
        for name, value in zip(node.outputs, results, strict=False):
            if name:
                env[name] = value
        if until is not None and (until == node.name or until in node.outputs):
            return
        for name in last_use.get(index, ()):
            env.pop(name, None)


def evaluate(node: GraphNode, args: Sequence[Any], scope: Scope | None = None) -> tuple[Any, ...]:
    """The outputs of one node.

    An argument with a method `__lower_op__(op_type, args, attributes)` is asked first (as numpy asks `__array_function__`):
    its answer is the node's output, or outputs as a tuple, unless it is NotImplemented.
    """
    op = node.op
    for arg in args:
        hook = getattr(arg, "__lower_op__", None)
        if hook is not None:
            answer = hook(op.op_type, tuple(args), node.attributes)
            if answer is not NotImplemented:
                return answer if isinstance(answer, tuple) else (answer,)
    keywords = dict(node.attributes)
    if op.takes_outputs:
        keywords["n_outputs"] = len(node.outputs)
    if op.takes_scope:
        keywords["scope"] = scope
    try:
        static.require_static(op.static, args, node.inputs)
        traced = any(static.is_traced(arg) and position not in op.type_only for position, arg in enumerate(args))
        if scope is not None:
            traced = traced or any(static.is_traced(scope.values[name]) for name in node.captured())
        if traced:
            kept = (*op.static, *op.static_if_known)
            if scope is None and not op.shape_only:
                args = [arg if position in kept else static.adopt(arg) for position, arg in enumerate(args)]
            with jax.named_scope(node.label):
                results = _tuple(op.function(*args, **keywords))
        elif op.numpy:
            with np.errstate(all="ignore"):
                results = tuple(None if value is None else np.asarray(value) for value in _tuple(op.function(*args, **keywords)))
        else:
            with _exact():
                if scope is not None:
                    results = _tuple(op.function(*args, **keywords))
                else:
                    results = _compiled_once(op, args, keywords)
                results = tuple(None if value is None else np.asarray(value) for value in results)
    except UnsupportedModel as error:
        raise UnsupportedModel(f"node {node.name!r} ({node.label}): {error}") from None
    except Exception as error:
        error.add_note(f"in node {node.name!r} ({node.label}), inputs {', '.join(map(_describe, args))}")
        raise
    return results


@contextmanager
def _exact() -> Iterator[None]:
    """Evaluate at once, on the CPU, with 64-bit types, even inside a trace."""
    with jax.ensure_compile_time_eval(), jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        yield


def _compiled_once(op: Op, args: Sequence[Any], keywords: Mapping[str, Any]) -> tuple[Any, ...]:
    """An op on known values, as one compilation instead of one for each primitive in it."""
    arrays = {i: arg for i, arg in enumerate(args) if isinstance(arg, np.ndarray) and arg.dtype != object and i not in op.static}

    def call(arrays: dict[int, Any]) -> tuple[Any, ...]:
        return _tuple(op.function(*[arrays.get(i, arg) for i, arg in enumerate(args)], **keywords))

    return jax.jit(call)(arrays)


def _tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def _describe(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") and hasattr(value, "shape") else type(value).__name__
