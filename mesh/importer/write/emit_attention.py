"""Write an attention pattern of an exported graph in the form of a block: two cache writes, one Attention, and the source's layouts
around them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from mesh.errors import UnsupportedModel
from mesh.importer.analysis.attention import AttentionPattern
from mesh.importer.analysis.layout import Layout, Operand
from mesh.importer.analysis.mask import ScoreRule
from mesh.importer.write.blocks import attention_block
from mesh.importer.write.emit_values import Values

__all__ = ["emit_attention"]


def emit_attention(values: Values, pattern: AttentionPattern, rule: ScoreRule | None) -> str:
    """Emit one attention with its cache writes. Returns the value that stands in place of `pattern.output`.

    UnsupportedModel if the part has no `rule`: then the attention is not in a layer of its own.
    """
    if rule is None:
        raise UnsupportedModel(f"attention {pattern.number} is not in a layer of its own")
    q, k, v = (_operand(values, operand) for operand in (pattern.q, pattern.k, pattern.v))
    context, _, _ = attention_block(
        values.builder,
        q,
        k,
        v,
        scale=rule.scale,
        softcap=rule.softcap,
        window=rule.window,
        chunk=rule.chunk,
        alibi_slopes=rule.slopes,
        sinks=pattern.sinks,
    )
    if pattern.v.scale != 1.0:  # a sum of scaled values is the scaled sum
        context = values.builder.op("Mul", context, values.builder.const(np.float32(pattern.v.scale)))
    values.uses_positions = True
    values.types[context] = values.compute
    own = values.dims(pattern.output)
    if len(own) == 4 and len(values.inputs.probes[0].shape(pattern.output)) == 4:
        heads_first = own[1] == (pattern.heads, 0, 0, 0)
        if heads_first:
            return context
    return _merge(values, context, pattern, own)


def _merge(values: Values, context: str, pattern: AttentionPattern, own: list[tuple[int, int, int, int] | None]) -> str:
    """The context [B, H, T, Dv] with axes merged or split as the source's product has them."""
    if any(dim is None for dim in own):
        raise UnsupportedModel(f"attention {pattern.number}: the shape of its output is not understood")
    if len(own) == 3 and own[1] == (0, 0, 1, 0) and own[0] == (0, 1, 0, 0):
        swapped = values.builder.op("Transpose", context, perm=[0, 2, 1, 3])
        return values.like(context, values.builder.op("Reshape", swapped, values.builder.const([0, 0, -1])))
    target = values.size_vector([values.factor(dim) for dim in own if dim is not None])
    return values.like(context, values.builder.op("Reshape", context, target))


def _operand(values: Values, operand: Operand) -> str:
    """The operand as [B, H, T, D] of the compute type."""
    builder, layout = values.builder, operand.layout
    name = values.typed(values.names[operand.value], values.compute)
    if len(values.inputs.probes[0].shape(operand.value)) != len(layout.split):
        name = _split(values, name, operand.value, layout)
    if layout.perm != tuple(range(len(layout.perm))):
        name = builder.op("Transpose", name, perm=list(layout.perm))
    if len(layout.perm) != 4:
        target = values.size_vector([_letter(values, "B"), layout.heads, _letter(values, "T"), layout.width])
        name = builder.op("Reshape", name, target)
    values.types[name] = values.compute
    return name


def _split(values: Values, name: str, value: ir.Value, layout: Layout) -> str:
    symbols = {"B": (0, 1, 0, 0), "T": (0, 0, 1, 0)}
    factors = [symbols[s] if isinstance(s, str) else (s, 0, 0, 0) for s in layout.split]
    return values.builder.op("Reshape", name, values.size_vector(values.short_target("Reshape", value, factors)))


def _letter(values: Values, symbol: str) -> str:
    name = values.factor((0, 1, 0, 0) if symbol == "B" else (0, 0, 1, 0))
    return str(name)
