"""Fewer, larger calls: what stands beside the products of a step goes into the calls of the kernels.

The products of a narrow weight are short, and a step of one row has several operations beside each of them. These patterns, found in any
lowered graph, become one call each (mesh/kernels/calls.py):

    products    RMSNormalization(x) --> MatMul, MatMul ...      the products of one input, which is normalised on the way
                Mul(act(gate), up)  --> MatMul                  gated on the way
                Cast(Cast(x))       --> MatMul                  rounded to bfloat16 on the way, after either of these
                                        MatMul --> Add(x)       with the residual added to the sums
    attention   RotaryEmbedding(q), RotaryEmbedding(k), TensorScatter of k and v, Attention with a causal mask

The second is for a decode step, where each row has one token: `fuse` makes a graph of its own for it. All that is not found stays as it is.
A graph that is not fused computes the same, and the tests compare them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh.kernels import calls
from mesh.lowering import registry
from mesh.lowering.prepare import Graph, GraphNode, with_nodes
from mesh.lowering.registry import register
from mesh.lowering.rounding import before_rounding
from mesh.lowering.weights import PackedWeight

__all__ = ["COUNT", "KERNELS", "fuse"]

KERNELS = "mesh.kernels"
"""The domain of the operations that are made here."""

COUNT = "step_tokens"
"""An input that graphs for single tokens have besides the block's: how many of the tokens are real (int32 scalar). The others are padding
to a compiled size, for which the calls compute nothing."""


@register(domain=KERNELS)
def Products(*inputs: Any, weights: int, before: str, epsilon: float, rounds: int, residual: int, counted: int) -> tuple[Any, ...]:
    """x [..., in], what comes before (the scale of a norm, or the other side of a gate), the weights, maybe a residual, and maybe how many
    tokens are real -> the products [..., out]."""
    x, rest = jnp.asarray(inputs[0], jnp.float32), list(inputs[1:])
    first: Any = None
    if before == "norm":
        first = calls.InputNorm(jnp.broadcast_to(jnp.asarray(rest.pop(0)), x.shape[-1:]), epsilon)
    elif before:
        other = rest.pop(0)
        if other.shape != x.shape:  # a gate that broadcasts
            x = _gate(before, x) * other
        else:
            first = calls.Gated(before, other.reshape(-1, x.shape[-1]))  # type: ignore[arg-type]
    packed, added = rest[:weights], rest[weights] if residual else None
    count = jnp.asarray(rest[-1], jnp.int32) if counted else None
    known = [weight.codes.for_kernels() for weight in packed]
    lead, size = x.shape[:-1], x.shape[-1]
    shape = (*lead, packed[0].shape[1])
    inside = added is not None and added.shape == shape
    flat = None if added is None or not inside else added.reshape(-1, shape[-1])
    results = calls.products(x.reshape(-1, size), known, before=first, rounds=bool(rounds), residual=flat, count=count)
    whole = [y.reshape(*lead, y.shape[-1]) for y in results]
    if added is not None and not inside:
        whole[0] = whole[0] + added
    return tuple(whole)


def _gate(activation: str, x: Any) -> Any:
    return jax.nn.silu(x) if activation == "silu" else jax.nn.gelu(x, approximate=True)


@register(domain=KERNELS)
def CachedAttention(
    q: Any, k: Any, v: Any, past_key: Any, past_value: Any, positions: Any, writes: Any, cos: Any = None, sin: Any = None,
    *, heads: int, kv_heads: int, scale: float, softcap: float, window: int, interleaved: int,
) -> tuple[Any, Any, Any]:  # fmt: skip
    """q [B, 1, heads * dim], k and v [B, 1, kv_heads * dim] -> the context [B, 1, heads * dim] and the caches. The cache itself answers
    (mesh/runtime/cache.py)."""
    raise NotImplementedError("attention over something that is no cache")


def fuse(graph: Graph, packed: Mapping[str, Any], *, decode: bool) -> Graph:
    """The graph with kernels' calls in place of what they compute. `packed`: the weights that have taken the place of right operands.
    `decode`: for steps of one token a row."""
    made = _Made(graph)
    if decode:
        graph = _attention(graph, made)
        made = _Made(graph)
    graph = _products(graph, made, {name for name, weight in packed.items() if _readable(weight)}, counted=decode)
    return replace(graph, inputs=(*graph.inputs, COUNT)) if decode else graph


def _readable(weight: Any) -> bool:
    if not isinstance(weight, PackedWeight):
        return False
    return np.dtype(weight.codes.dtype or weight.codes.data.dtype) == np.float32 and weight.variant(1) == "kernel"


class _Made:
    """Which node makes a value, and how often it is read."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.by = {name: node for node in graph.nodes for name in node.outputs}
        self.uses = Counter(name for node in graph.nodes for name in (*node.inputs, *node.captured()) if name)
        self.uses.update(graph.outputs)

    def node(self, name: str, op_type: str) -> GraphNode | None:
        """The node of that type that makes the value."""
        node = self.by.get(name)
        return node if node is not None and (node.op.domain, node.op.op_type) == ("", op_type) else None

    def only(self, name: str, op_type: str) -> GraphNode | None:
        """The same, if the value is read once."""
        return self.node(name, op_type) if self.uses[name] == 1 else None

    def constant(self, name: str) -> Any:
        """The value as a list or a number, if it is known."""
        value = self.graph.constants.get(name)
        return None if value is None or value.dtype == object else value.tolist()


def _new(op_type: str, like: GraphNode, inputs: Sequence[str], outputs: Sequence[str], attributes: Mapping[str, Any]) -> GraphNode:
    op = registry.find(op_type, KERNELS, 1)
    assert op is not None
    return GraphNode(like.name, op, tuple(inputs), tuple(outputs), attributes, f"{KERNELS}.{op_type}")


def _rebuilt(graph: Graph, replaced: Mapping[int, GraphNode | None]) -> Graph:
    """The graph with some nodes replaced, in an order in which every value is made before it is read."""
    nodes = [node for index, old in enumerate(graph.nodes) if (node := replaced.get(index, old)) is not None]
    return with_nodes(graph, _ordered(nodes))


def _ordered(nodes: Sequence[GraphNode]) -> list[GraphNode]:
    maker = {name: node for node in nodes for name in node.outputs}
    done: set[int] = set()
    order: list[GraphNode] = []

    def visit(node: GraphNode) -> None:
        stack = [(node, iter((*node.inputs, *node.captured())))]
        done.add(id(node))
        while stack:
            current, names = stack[-1]
            for name in names:
                before = maker.get(name)
                if before is not None and id(before) not in done:
                    done.add(id(before))
                    stack.append((before, iter((*before.inputs, *before.captured()))))
                    break
            else:
                order.append(current)
                stack.pop()

    for node in nodes:
        if id(node) not in done:
            visit(node)
    return order


# -- products ------------------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """Products of one input, on their way to one call."""

    products: list[tuple[int, GraphNode]]
    inputs: tuple[str, ...]
    before: str = ""
    epsilon: float = 0.0
    rounds: bool = False


def _products(graph: Graph, made: _Made, readable: set[str], *, counted: bool) -> Graph:
    together: dict[str, list[tuple[int, GraphNode]]] = defaultdict(list)
    for index, node in enumerate(graph.nodes):
        if (node.op.domain, node.op.op_type) == ("", "MatMul") and node.inputs[1] in readable:
            together[node.inputs[0]].append((index, node))
    place = {id(node): index for index, node in enumerate(graph.nodes)}
    replaced: dict[int, GraphNode | None] = {}
    for x, products in together.items():
        for start in range(0, len(products), calls.MOST_WEIGHTS):
            call = _prepared(made, x, products[start : start + calls.MOST_WEIGHTS], alone=len(products) <= calls.MOST_WEIGHTS)
            outputs = [product.outputs[0] for _, product in call.products]
            weights = [product.inputs[1] for _, product in call.products]
            residual: tuple[str, ...] = ()
            if len(outputs) == 1:
                added = _added(made, outputs[0])
                if added is not None and place[id(added[0])] not in replaced:  # the sum of two products is made once
                    replaced[place[id(added[0])]] = None
                    outputs, residual = list(added[0].outputs), (added[1],)
            first = call.products[0]
            attributes = {
                "weights": len(weights),
                "before": call.before,
                "epsilon": call.epsilon,
                "rounds": int(call.rounds),
                "residual": len(residual),
                "counted": int(counted),
            }
            count = (COUNT,) if counted else ()
            replaced |= dict.fromkeys((index for index, _ in call.products), None)
            replaced[first[0]] = _new("Products", first[1], (*call.inputs, *weights, *residual, *count), outputs, attributes)
    return _rebuilt(graph, replaced)


def _prepared(made: _Made, x: str, products: list[tuple[int, GraphNode]], *, alone: bool) -> _Call:
    """The products with what computes their input, where nothing else reads that."""
    given = before_rounding(made.by, x)
    rounds = given is not None
    plain = _Call(products, (x if given is None else given,), rounds=rounds)
    alone = alone and made.uses[x] == len(products)
    if given is not None:
        alone, x = alone and made.uses[made.by[x].inputs[0]] == made.uses[given] == 1, given
    if not alone:
        return plain
    norm = made.node(x, "RMSNormalization")
    if norm is not None and norm.attributes.get("axis", -1) == -1 and norm.attributes.get("stash_type", 1) == 1:
        return _Call(products, norm.inputs[:2], "norm", float(norm.attributes.get("epsilon", 1e-5)), rounds)
    gated = made.node(x, "Mul")
    if gated is not None:
        for gate, up in (gated.inputs, gated.inputs[::-1]):
            activated = _activated(made, gate)
            if activated is not None:
                return _Call(products, (activated[0], up), activated[1], rounds=rounds)
    return plain


def _activated(made: _Made, name: str) -> tuple[str, str] | None:
    """(input, name) of the activation that makes the value."""
    gelu = made.only(name, "Gelu")
    if gelu is not None and gelu.attributes.get("approximate") == "tanh":
        return gelu.inputs[0], "gelu_tanh"
    product = made.only(name, "Mul")
    if product is None:
        return None
    for x, other in (product.inputs, product.inputs[::-1]):
        sigmoid = made.only(other, "Sigmoid")
        if sigmoid is not None and sigmoid.inputs[0] == x:
            return x, "silu"
    return None


def _added(made: _Made, name: str) -> tuple[GraphNode, str] | None:
    """(the Add, its other side) if all that becomes of the value is that a computed one is added."""
    if made.uses[name] != 1 or name in made.graph.outputs:
        return None
    for node in made.graph.nodes:
        if name in node.inputs:
            if (node.op.domain, node.op.op_type) != ("", "Add") or node.inputs[0] == node.inputs[1]:
                return None
            other = node.inputs[1] if node.inputs[0] == name else node.inputs[0]
            return (node, other) if other in made.by or other in made.graph.inputs else None
    return None


# -- attention -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Heads:
    """q, k or v [B, heads, T, dim] as it comes from its product: the value [B, T, heads * dim], and what rotates it."""

    value: str
    heads: int
    rotary: GraphNode | None


def _attention(graph: Graph, made: _Made) -> Graph:
    replaced: dict[int, GraphNode | None] = {}
    for index, node in enumerate(graph.nodes):
        if (node.op.domain, node.op.op_type) == ("", "Attention"):
            call = _one_call(made, node)
            if call is not None:
                made_by_it = set(call.outputs)
                replaced |= {at: None for at, other in enumerate(graph.nodes) if made_by_it & set(other.outputs)}
                replaced[index] = call
    return _rebuilt(graph, replaced) if replaced else graph


def _one_call(made: _Made, node: GraphNode) -> GraphNode | None:
    """Attention over the cache, with all that only it needs."""
    keys, values = (made.node(name, "TensorScatter") for name in node.inputs[1:3])
    if keys is None or values is None or len(node.inputs) != 4 or keys.inputs[2:] != values.inputs[2:] or len(keys.inputs) != 3:
        return None
    if any(made.uses[scatter.outputs[0]] > 2 or scatter.attributes.get("mode", "linear") != "linear" for scatter in (keys, values)):
        return None
    if not _only(node.attributes, {"is_causal": 0, "scale": None, "softcap": None}) or "scale" not in node.attributes:
        return None
    window = _window(made, node.inputs[3], keys.inputs[0])
    sides = [_heads(made, name) for name in (node.inputs[0], keys.inputs[1], values.inputs[1])]
    merged = _merged(made, node.outputs[0])
    if window is None or merged is None or any(side is None for side in sides):
        return None
    q, k, v = (side for side in sides if side is not None)
    if v.rotary is not None or (q.rotary is None) != (k.rotary is None):
        return None
    rotation: tuple[str, ...] = ()
    interleaved = 0
    if q.rotary is not None and k.rotary is not None:
        known = {"interleaved": None, "rotary_embedding_dim": None, "num_heads": 0}
        if q.rotary.inputs[1:] != k.rotary.inputs[1:] or len(q.rotary.inputs) != 3 or q.rotary.attributes != k.rotary.attributes:
            return None
        if not _only(q.rotary.attributes, known):
            return None
        rotation, interleaved = q.rotary.inputs[1:], int(q.rotary.attributes.get("interleaved", 0))
    inputs = (q.value, k.value, v.value, keys.inputs[0], values.inputs[0], window[1], keys.inputs[2], *rotation)
    attributes = {
        "heads": q.heads,
        "kv_heads": k.heads,
        "scale": float(node.attributes["scale"]),
        "softcap": float(node.attributes.get("softcap", 0.0)),
        "window": window[0],
        "interleaved": interleaved,
    }
    return _new("CachedAttention", node, inputs, (merged, keys.outputs[0], values.outputs[0]), attributes)


def _only(attributes: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether nothing but these attributes is there, and those with a value have it."""
    return all(name in known and known[name] in (None, value) for name, value in attributes.items())


def _heads(made: _Made, name: str) -> _Heads | None:
    rotary = made.only(name, "RotaryEmbedding")
    turned = made.only(name if rotary is None else rotary.inputs[0], "Transpose")
    if turned is None or tuple(turned.attributes.get("perm", ())) != (0, 2, 1, 3):
        return None
    split = made.only(turned.inputs[0], "Reshape")
    shape = None if split is None else made.constant(split.inputs[1])
    if split is None or shape is None or len(shape) != 4 or shape[:2] != [0, 0] or shape[2] < 1:
        return None
    return _Heads(split.inputs[0], shape[2], rotary)


def _merged(made: _Made, name: str) -> str | None:
    """The value [B, T, heads * dim] that the context becomes."""
    if made.uses[name] != 1:
        return None
    turned = next((node for node in made.graph.nodes if name in node.inputs), None)
    if turned is None or turned.op.op_type != "Transpose" or tuple(turned.attributes.get("perm", ())) != (0, 2, 1, 3):
        return None
    joined = next((node for node in made.graph.nodes if turned.outputs[0] in node.inputs), None)
    shape = None if joined is None or made.uses[turned.outputs[0]] != 1 else made.constant(joined.inputs[1])
    flat = joined is not None and joined.op.op_type == "Reshape" and shape is not None and len(shape) == 3 and shape[:2] == [0, 0]
    return joined.outputs[0] if flat and joined is not None else None


def _window(made: _Made, mask: str, past: str) -> tuple[int, str] | None:
    """(tokens that a token sees, 0 for all, and the positions [B, T]) of a mask as a block writes it: slots up to the position, and maybe
    slots after the position less the window."""
    window, recent = 0, made.node(mask, "And")
    if recent is not None:
        later = made.node(recent.inputs[1], "Greater")
        begin = None if later is None else made.node(later.inputs[1], "Sub")
        size = None if begin is None else made.constant(begin.inputs[1])
        if later is None or begin is None or not isinstance(size, int) or size < 1:
            return None
        seen = made.node(recent.inputs[0], "LessOrEqual")
        if seen is None or seen.inputs != (later.inputs[0], begin.inputs[0]):
            return None
        window, mask = size, recent.inputs[0]
    seen = made.node(mask, "LessOrEqual")
    slots = None if seen is None else made.node(seen.inputs[0], "Range")
    lifted = None if seen is None else made.node(seen.inputs[1], "Unsqueeze")
    if slots is None or lifted is None or made.constant(lifted.inputs[1]) != [1, 3] or lifted.inputs[0] not in made.graph.inputs:
        return None
    if (made.constant(slots.inputs[0]), made.constant(slots.inputs[2])) != (0, 1):
        return None
    squeezed = made.node(slots.inputs[1], "Squeeze")
    length = None if squeezed is None else made.node(squeezed.inputs[0], "Shape")
    if length is None or length.inputs[0] != past or (length.attributes.get("start"), length.attributes.get("end")) != (2, 3):
        return None
    return window, lifted.inputs[0]
