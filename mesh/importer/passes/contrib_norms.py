"""Rules for com.microsoft's norms and activations. A norm with a skip becomes an Add and a norm: the residual stream stays one value."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from mesh.importer.graph.decoder import attribute, input_of
from mesh.importer.passes.contrib_rewriter import Result, Rewriter, Rule, optional

__all__ = ["NORMS"]


def _rms_norm(r: Rewriter, node: ir.Node) -> Result:
    epsilon, axis = attribute(node, "epsilon", 1e-5), attribute(node, "axis", -1)
    return [r.one(node, "RMSNormalization", input_of(node, 0), input_of(node, 1), epsilon=epsilon, axis=axis)]


def _skip_sum(r: Rewriter, node: ir.Node, bias: ir.Value | None) -> ir.Value:
    total = r.one(node, "Add", input_of(node, 0), input_of(node, 1))
    return total if bias is None else r.one(node, "Add", total, bias)


def _skip_rms_norm(r: Rewriter, node: ir.Node) -> Result:
    total = _skip_sum(r, node, optional(node, 3))
    out = r.one(node, "RMSNormalization", total, input_of(node, 2), epsilon=attribute(node, "epsilon", 1e-5), axis=-1)
    return [out, None, None, total]


def _skip_layer_norm(r: Rewriter, node: ir.Node) -> Result:
    total = _skip_sum(r, node, optional(node, 4))
    epsilon = attribute(node, "epsilon", 1e-5)
    out = r.one(node, "LayerNormalization", total, input_of(node, 2), optional(node, 3), epsilon=epsilon, axis=-1)
    return [out, None, None, total]


def _gelu(r: Rewriter, node: ir.Node) -> Result:
    x, bias = input_of(node, 0), optional(node, 1)
    if bias is not None:
        x = r.one(node, "Add", x, bias)
    return [r.one(node, "Gelu", x, approximate="tanh" if node.op_type == "FastGelu" else "none")]


def _quick_gelu(r: Rewriter, node: ir.Node) -> Result:
    x = input_of(node, 0)
    scaled = r.one(node, "Mul", x, r.number(attribute(node, "alpha", 1.702), x))
    return [r.one(node, "Mul", x, r.one(node, "Sigmoid", scaled))]


NORMS: Mapping[str, Rule] = {
    "SimplifiedLayerNormalization": _rms_norm,
    "SkipSimplifiedLayerNormalization": _skip_rms_norm,
    "SkipLayerNormalization": _skip_layer_norm,
    "Gelu": _gelu,
    "FastGelu": _gelu,
    "BiasGelu": _gelu,
    "QuickGelu": _quick_gelu,
}
