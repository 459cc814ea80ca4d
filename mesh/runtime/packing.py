"""Packed steps: tokens of several sessions in one step, each session with a segment of consecutive positions of its row (segments.py).

A stage whose blocks the kernels compute as a whole runs a packed step as one: products, norms and activations over all tokens, attention
for each token over its own row (docs/adr/0015). Any other engine runs it as a decode step and a prefill chunk for each segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import jax
import numpy as np

from mesh.kernels.library import kernels
from mesh.model.manifest import Manifest
from mesh.runtime.engine import Engine, SampledToken
from mesh.runtime.loading import Block
from mesh.runtime.segments import Segments

__all__ = ["can_pack", "in_turn", "token_sizes"]

_SIZES: Final = (1, 8, 64)
"""Padding is not computed, so few sizes do. What stands beside the calls of the kernels still runs over the whole size."""


def token_sizes(tokens: int) -> tuple[int, ...]:
    """The sizes that packed steps of up to `tokens` tokens are padded to."""
    return (*(size for size in _SIZES if size < tokens), tokens)


def can_pack(blocks: Sequence[Block], manifest: Manifest, layers: Sequence[int]) -> bool:
    """Whether these layers can run packed steps as one: on a CPU, with kernels, where one call of them is a layer's whole attention."""
    if kernels().name is None or jax.default_backend() != "cpu":
        return False
    caches = [manifest.cache[layer] for layer in layers]
    if any(cache.states for cache in caches):  # tokens of one row would have to be computed one after the other
        return False
    floats = manifest.hidden.dtype == "float32" and manifest.cache_dtype in ("float32", "float16", "int8")
    sizes = all(cache.key_dim == cache.value_dim for cache in caches)
    return floats and sizes and all(map(_attention_is_one_call, blocks))


def _attention_is_one_call(block: Block) -> bool:
    ops = {node.op.op_type for node in block.decode.graph.nodes}
    return "CachedAttention" in ops and not ops & {"Attention", "TensorScatter"}


def in_turn(engine: Engine, segments: Segments, tokens: np.ndarray, hidden: np.ndarray | None) -> np.ndarray | list[SampledToken | None]:
    """A packed step as steps of the two other kinds. Segments of one token are one decode step; the others follow one by one."""
    ends = segments.ends()
    answers: list[Any] = [None] * len(segments)
    single = [index for index, count in enumerate(segments.counts) if count == 1]
    if single:
        at = [ends[index] - 1 for index in single]
        rows, starts = (np.array([values[index] for index in single], np.int32) for values in (segments.rows, segments.starts))
        answer = engine.decode(rows, starts, tokens[at], None if hidden is None else hidden[at])
        for order, index in enumerate(single):
            answers[index] = answer[order] if engine.last else answer[order : order + 1]
    computed, sampled_s = (engine.bucket, engine.sampled_s) if single else (0, 0.0)
    for index, count in enumerate(segments.counts):
        if count > 1:
            part = slice(ends[index] - count, ends[index])
            chunk = None if hidden is None else hidden[part]
            answers[index] = engine.prefill(segments.rows[index], segments.starts[index], tokens[part], chunk)
            computed, sampled_s = computed + engine.bucket, sampled_s + engine.sampled_s
    engine.bucket, engine.sampled_s = computed, sampled_s
    if engine.last:
        return [answer if wants else None for answer, wants in zip(answers, segments.wants, strict=True)]
    return np.concatenate(answers)
