"""Rewrite com.microsoft operators, as onnxruntime-genai and onnxruntime's optimizer write them, to standard ones.

A norm with a skip becomes an Add and a norm, so that the residual stream is one value; the attentions become Attention with
the cache as its own inputs; quantized weights become DequantizeLinear. What has no standard form is an UnsupportedModel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.analysis.attention import WINDOW
from mesh.importer.graph.decoder import Role, argument, attribute, maker
from mesh.importer.passes.opset import NEWEST, new_constant
from mesh.importer.write.nbits import unpack_matmul_nbits, unpack_rows

__all__ = ["rewrite_contrib"]


def rewrite_contrib(model: ir.Model, roles: dict[ir.Value, Role]) -> None:
    """In place; positions that the attentions count by themselves become an input in `roles`."""
    rewriter = _Rewriter(model, roles)
    for node in list(model.graph):
        rule = RULES.get(node.op_type)
        if rule is not None and (node.domain == "com.microsoft" or node.op_type == "SimplifiedLayerNormalization"):
            replacements = rule(rewriter, node)
            for old, new in zip(node.outputs, replacements, strict=False):
                if new is not None:
                    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            left = [output for output in node.outputs if output.uses()]
            if left:
                raise UnsupportedModel(f"{node.op_type} {node.name}: its output {left[0].name} is used, which is not supported")
            model.graph.remove(node, safe=True)
        elif node.domain not in ("", "ai.onnx"):
            raise UnsupportedModel(
                f"operator {node.domain}.{node.op_type} (node {node.name}) is not known: export with the standard ONNX operators, "
                "or with those of onnxruntime-genai"
            )


class _Rewriter:
    def __init__(self, model: ir.Model, roles: dict[ir.Value, Role]) -> None:
        self.model, self.graph, self.roles = model, model.graph, roles
        self._positions: ir.Value | None = None
        self.before: ir.Node | None = None

    def op(self, at: ir.Node, op_type: str, *inputs: ir.Value | None, outputs: int = 1, **attributes: Any) -> list[ir.Value]:
        """A node of the default domain in front of `at`; its outputs."""
        kept = {name: value for name, value in attributes.items() if value is not None}
        node = ir.node(op_type, list(inputs), attributes=kept, num_outputs=outputs, version=NEWEST)
        node.name = f"{at.name}/{op_type}" if at.name else None
        self.graph.insert_before(at, node)
        return list(node.outputs)

    def one(self, at: ir.Node, op_type: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        return self.op(at, op_type, *inputs, **attributes)[0]

    def ints(self, *numbers: int) -> ir.Value:
        return new_constant(self.graph, np.array(numbers, np.int64))

    def number(self, value: float, like: ir.Value | None) -> ir.Value:
        dtype = like.dtype.numpy() if like is not None and like.dtype is not None else np.dtype(np.float32)
        return new_constant(self.graph, np.array(value, dtype))

    def weight(self, name: str, produce: Callable[[], np.ndarray[Any, Any]], dtype: ir.DataType, shape: Sequence[int]) -> ir.Value:
        """A weight made from others when it is read."""
        number = len(self.graph.initializers)
        unique = f"{name}.{number}"
        tensor = ir.LazyTensor(lambda: ir.tensor(produce(), dtype=dtype), dtype=dtype, shape=ir.Shape(shape), name=unique)
        value = ir.Value(name=unique, const_value=tensor, shape=ir.Shape(shape), type=ir.TensorType(dtype))
        self.graph.register_initializer(value)
        return value

    def positions(self) -> ir.Value:
        """position_ids [batch, tokens]: the graph's own, or a new input for attentions that count by themselves."""
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


Result = Sequence[ir.Value | None]


def _optional(node: ir.Node, place: int) -> ir.Value | None:
    return node.inputs[place] if place < len(node.inputs) else None


def _refuse(node: ir.Node, what: str) -> UnsupportedModel:
    return UnsupportedModel(f"{node.op_type} {node.name}: {what} is not supported")


# --- norms and activations ----------------------------------------------------------------------------------------------


def _rms_norm(r: _Rewriter, node: ir.Node) -> Result:
    epsilon, axis = attribute(node, "epsilon", 1e-5), attribute(node, "axis", -1)
    return [r.one(node, "RMSNormalization", argument(node, 0), argument(node, 1), epsilon=epsilon, axis=axis)]


def _skip_sum(r: _Rewriter, node: ir.Node, bias: ir.Value | None) -> ir.Value:
    total = r.one(node, "Add", argument(node, 0), argument(node, 1))
    return total if bias is None else r.one(node, "Add", total, bias)


def _skip_rms_norm(r: _Rewriter, node: ir.Node) -> Result:
    total = _skip_sum(r, node, _optional(node, 3))
    out = r.one(node, "RMSNormalization", total, argument(node, 2), epsilon=attribute(node, "epsilon", 1e-5), axis=-1)
    return [out, None, None, total]


def _skip_layer_norm(r: _Rewriter, node: ir.Node) -> Result:
    total = _skip_sum(r, node, _optional(node, 4))
    epsilon = attribute(node, "epsilon", 1e-5)
    out = r.one(node, "LayerNormalization", total, argument(node, 2), _optional(node, 3), epsilon=epsilon, axis=-1)
    return [out, None, None, total]


def _gelu(r: _Rewriter, node: ir.Node) -> Result:
    x, bias = argument(node, 0), _optional(node, 1)
    if bias is not None:
        x = r.one(node, "Add", x, bias)
    return [r.one(node, "Gelu", x, approximate="tanh" if node.op_type == "FastGelu" else "none")]


def _quick_gelu(r: _Rewriter, node: ir.Node) -> Result:
    x = argument(node, 0)
    scaled = r.one(node, "Mul", x, r.number(attribute(node, "alpha", 1.702), x))
    return [r.one(node, "Mul", x, r.one(node, "Sigmoid", scaled))]


# --- matrix products ----------------------------------------------------------------------------------------------------


def _fused_matmul(r: _Rewriter, node: ir.Node) -> Result:
    if attribute(node, "transBatchA", 0) or attribute(node, "transBatchB", 0):
        raise _refuse(node, "a transposed batch")
    sides = []
    for place, flag in enumerate(("transA", "transB")):
        value = argument(node, place)
        if attribute(node, flag, 0):
            rank = len(value.shape) if value.shape is not None else 0
            if rank < 2:
                raise _refuse(node, f"{flag} of an input of unknown rank")
            value = r.one(node, "Transpose", value, perm=[*range(rank - 2), rank - 1, rank - 2])
        sides.append(value)
    product = r.one(node, "MatMul", *sides)
    alpha = attribute(node, "alpha", 1.0)
    return [product if alpha == 1.0 else r.one(node, "Mul", product, r.number(alpha, argument(node, 0)))]


def _matmul_nbits(r: _Rewriter, node: ir.Node) -> Result:
    bits, block, rows, columns = (
        int(attribute(node, name, default)) for name, default in (("bits", 4), ("block_size", 32), ("K", 0), ("N", 0))
    )
    if _optional(node, 4) is not None:
        raise _refuse(node, "a group index (act-order quantization)")
    if bits not in (4, 8):
        raise _refuse(node, f"a weight of {bits} bits")
    codes, scales, zeros = (
        value.const_value if value is not None else None for value in (argument(node, 1), argument(node, 2), _optional(node, 3))
    )
    if codes is None or scales is None:
        raise _refuse(node, "a weight that is computed")
    if zeros is not None and zeros.dtype not in (ir.DataType.UINT8, ir.DataType.INT8):
        raise _refuse(node, f"zero points of type {zeros.dtype}")
    groups = -(-rows // block)
    dtype = ir.DataType.INT4 if bits == 4 else ir.DataType.INT8
    name = str(argument(node, 1).name)
    inputs = [
        r.weight(name, lambda: unpack_matmul_nbits(codes.numpy(), bits, columns, rows), dtype, (rows, columns)),
        r.weight(str(argument(node, 2).name), lambda: scales.numpy().reshape(columns, groups).T, scales.dtype, (groups, columns)),
    ]
    if zeros is not None:
        packed = zeros
        inputs.append(
            r.weight(f"{name}.zero", lambda: unpack_matmul_nbits(packed.numpy(), bits, columns, groups), dtype, (groups, columns))
        )
    matrix = r.one(node, "DequantizeLinear", *inputs, axis=0, block_size=block)
    product = r.one(node, "MatMul", argument(node, 0), matrix)
    bias = _optional(node, 5)
    return [product if bias is None else r.one(node, "Add", product, bias)]


def _gather_block_quantized(r: _Rewriter, node: ir.Node) -> Result:
    """Rows of a quantized table: codes and scales are gathered, so that only the rows asked for are converted."""
    codes, ids, scales, zeros = argument(node, 0), argument(node, 1), argument(node, 2), _optional(node, 3)
    table, steps = codes.const_value, scales.const_value
    if table is None or steps is None:
        raise _refuse(node, "a table that is computed")
    rank = len(table.shape)
    axes = attribute(node, "gather_axis", 0) % rank, attribute(node, "quantize_axis", 1) % rank
    if rank != 2 or axes != (0, 1):
        raise _refuse(node, "a table other than [rows, width] quantized along its rows")
    bits, block = int(attribute(node, "bits", 4)), int(attribute(node, "block_size", 128))
    height, groups = (int(n) for n in steps.shape.numpy())
    if bits not in (4, 8):
        raise _refuse(node, f"a table of {bits} bits")
    offset = zeros.const_value if zeros is not None else None
    if zeros is not None and offset is None:
        raise _refuse(node, "a zero point that is computed")
    width = int(table.shape.numpy()[1]) * (2 if table.dtype is ir.DataType.UINT8 and bits == 4 else 1)
    if width != groups * block:
        raise _refuse(node, f"a width of {width} that is not a multiple of its block of {block}")
    rows = r.one(
        node,
        "Gather",
        r.weight(str(codes.name), lambda: unpack_rows(table.numpy(), bits, width), ir.DataType.INT8, (height, width)),
        ids,
        axis=0,
    )
    values = r.one(node, "Cast", rows, to=int(steps.dtype))
    grouped = r.one(node, "Reshape", values, r.ints(0, 0, groups, block))
    if offset is not None:
        shift = r.weight(f"{codes.name}.zero", lambda: unpack_rows(offset.numpy(), bits, groups), ir.DataType.INT8, (height, groups))
        shift = r.one(node, "Cast", r.one(node, "Gather", shift, ids, axis=0), to=int(steps.dtype))
        grouped = r.one(node, "Sub", grouped, r.one(node, "Unsqueeze", shift, r.ints(-1)))
    scale = r.one(node, "Unsqueeze", r.one(node, "Gather", scales, ids, axis=0), r.ints(-1))
    return [r.one(node, "Reshape", r.one(node, "Mul", grouped, scale), r.ints(0, 0, width))]


# --- attention ----------------------------------------------------------------------------------------------------------


def _rotary(r: _Rewriter, node: ir.Node) -> Result:
    x, given, cos, sin = (argument(node, place) for place in range(4))
    if attribute(node, "scale", 1.0) != 1.0 or attribute(node, "is_packed_batching", 0):
        raise _refuse(node, "a scaled or packed rotary embedding")
    # an offset of one element stands for offset, offset + 1, ...: the positions of the chunk
    positions = given if given.shape is None or len(given.shape) == 2 else r.positions()
    heads, width = int(attribute(node, "num_heads", 0)), int(attribute(node, "rotary_embedding_dim", 0))
    return [_rotate(r, node, x, positions, cos, sin, heads, width, bool(attribute(node, "interleaved", 0)))]


def _rotate(
    r: _Rewriter,
    at: ir.Node,
    x: ir.Value,
    positions: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    heads: int,
    rotary: int,
    interleaved: bool,
) -> ir.Value:
    common = {"interleaved": int(interleaved), "rotary_embedding_dim": rotary}
    if heads:
        return r.one(at, "RotaryEmbedding", x, cos, sin, positions, num_heads=heads, **common)
    if x.shape is not None and len(x.shape) == 4:
        return r.one(at, "RotaryEmbedding", x, cos, sin, positions, **common)
    # merged heads of unknown number: the whole head is rotated, so its width is twice the table's
    half = int(cos.shape[-1]) if cos.shape is not None and isinstance(cos.shape[-1], int) else 0
    if not half or rotary:
        raise _refuse(at, "a partial rotary embedding without num_heads")
    split = r.one(at, "Transpose", r.one(at, "Reshape", x, r.ints(0, 0, -1, 2 * half)), perm=[0, 2, 1, 3])
    turned = r.one(at, "RotaryEmbedding", split, cos, sin, positions, **common)
    return r.one(at, "Reshape", r.one(at, "Transpose", turned, perm=[0, 2, 1, 3]), r.ints(0, 0, -1))


def _group_query_attention(r: _Rewriter, node: ir.Node) -> Result:
    heads, kv_heads = int(attribute(node, "num_heads")), int(attribute(node, "kv_num_heads"))
    past_key, past_value = _optional(node, 3), _optional(node, 4)
    if attribute(node, "smooth_softmax", 0) == 1 or _optional(node, 11) is not None:
        raise _refuse(node, "a smooth softmax or an attention sink")
    if attribute(node, "k_quant_type", "NONE") != "NONE" or attribute(node, "v_quant_type", "NONE") != "NONE":
        raise _refuse(node, "a quantized cache")
    query, key, value = argument(node, 0), _optional(node, 1), _optional(node, 2)
    cos, sin = _optional(node, 7), _optional(node, 8)
    if key is None or value is None:
        width = _head_width(node, past_key)
        query, key, value = r.op(node, "Split", query, r.ints(heads * width, kv_heads * width, kv_heads * width), outputs=3, axis=-1)
    if attribute(node, "do_rotary", 0):
        if cos is None or sin is None:
            raise _refuse(node, "do_rotary without cos_cache and sin_cache")
        given = _optional(node, 9)
        positions = given if given is not None else r.positions()
        interleaved = bool(attribute(node, "rotary_interleaved", 0))
        half = cos.shape[-1] if cos.shape is not None else None
        rotary = 2 * half if isinstance(half, int) and 2 * half != _head_width(node, past_key) else 0
        query = _rotate(r, node, query, positions, cos, sin, heads, rotary, interleaved)
        key = _rotate(r, node, key, positions, cos, sin, kv_heads, rotary, interleaved)
    window = int(attribute(node, "local_window_size", -1))
    outputs = r.op(
        node,
        "Attention",
        query,
        key,
        value,
        _optional(node, 10),
        past_key,
        past_value,
        outputs=3,
        q_num_heads=heads,
        kv_num_heads=kv_heads,
        scale=attribute(node, "scale", 0.0) or None,
        softcap=attribute(node, "softcap", 0.0) or None,
        is_causal=1,
    )
    if window > 0:
        maker(outputs[0]).meta[WINDOW] = window
    return outputs


def _head_width(node: ir.Node, past_key: ir.Value | None) -> int:
    width = past_key.shape[-1] if past_key is not None and past_key.shape is not None else None
    if not isinstance(width, int):
        raise _refuse(node, "a past key of unknown head size")
    return width


def _multi_head_attention(r: _Rewriter, node: ir.Node) -> Result:
    query, key, value = argument(node, 0), _optional(node, 1), _optional(node, 2)
    heads, bias = int(attribute(node, "num_heads")), _optional(node, 3)
    if key is None or value is None:
        raise _refuse(node, "a packed query, key and value")
    if bias is not None:
        size = bias.shape[0] // 3 if bias.shape is not None and isinstance(bias.shape[0], int) else 0
        if not size:
            raise _refuse(node, "a bias of unknown size")
        parts = r.op(node, "Split", bias, r.ints(size, size, size), outputs=3, axis=0)
        query, key, value = (r.one(node, "Add", x, part) for x, part in zip((query, key, value), parts, strict=True))
    mask = _optional(node, 5)
    return r.op(
        node,
        "Attention",
        query,
        key,
        value,
        mask,
        _optional(node, 6),
        _optional(node, 7),
        outputs=3,
        q_num_heads=heads,
        kv_num_heads=heads,
        scale=attribute(node, "scale", 0.0) or None,
        is_causal=int(attribute(node, "unidirectional", 0)),
    )


def _fused_attention(r: _Rewriter, node: ir.Node) -> Result:
    """com.microsoft Attention: the projection to queries, keys and values is part of it, the cache is stacked."""
    heads = int(attribute(node, "num_heads"))
    if attribute(node, "do_rotary", 0):
        raise _refuse(node, "do_rotary")
    weights, bias, past = argument(node, 1), _optional(node, 2), _optional(node, 4)
    width = weights.shape[-1] if weights.shape is not None else None
    if not isinstance(width, int):
        raise _refuse(node, "a weight of unknown size")
    sizes = attribute(node, "qkv_hidden_sizes") or [width // 3] * 3
    packed = r.one(node, "MatMul", argument(node, 0), weights)
    if bias is not None:
        packed = r.one(node, "Add", packed, bias)
    query, key, value = r.op(node, "Split", packed, r.ints(*sizes), outputs=3, axis=-1)
    cache = [r.one(node, "Gather", past, new_constant(r.graph, np.array(i)), axis=0) for i in (0, 1)] if past is not None else [None, None]
    outputs = r.op(
        node,
        "Attention",
        query,
        key,
        value,
        _optional(node, 5),
        *cache,
        outputs=3,
        q_num_heads=heads,
        kv_num_heads=heads,
        scale=attribute(node, "scale", 0.0) or None,
        is_causal=int(attribute(node, "unidirectional", 0)),
    )
    return [outputs[0]]


RULES: dict[str, Callable[[_Rewriter, ir.Node], Result]] = {
    "SimplifiedLayerNormalization": _rms_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
    "SkipLayerNormalization": _skip_layer_norm,
    "Gelu": _gelu,
    "FastGelu": _gelu,
    "BiasGelu": _gelu,
    "QuickGelu": _quick_gelu,
    "FusedMatMul": _fused_matmul,
    "MatMulNBits": _matmul_nbits,
    "GatherBlockQuantized": _gather_block_quantized,
    "RotaryEmbedding": _rotary,
    "GroupQueryAttention": _group_query_attention,
    "MultiHeadAttention": _multi_head_attention,
    "Attention": _fused_attention,
}
