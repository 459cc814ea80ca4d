"""The KV cache of one layer on one shard, and how a block's own ops read and write it in place.

    array [R, Hkv, S, D]    R rows (sessions), S slots; slot s of a row is the key or value of position s

A block takes `past_key`, scatters into it with TensorScatter and reads the result with Attention (docs/model-format.md). Run
literally, that would gather the rows of a step and copy them back. A CacheView stands where the past stood in the
lowered graph and answers those two ops on the whole array instead: new tokens are written where they belong, in
place, and attention reads only the rows and the first `length` slots of the step.

Slots beyond the context are slack: the last one takes the writes of rows that have nothing to write in this step, the others
the padding of a prefill chunk. No mask ever shows them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["SLACK", "CacheView", "attend"]

SLACK = 16
"""Slots a row has beyond its context; also the smallest prefill chunk."""

_HIDDEN = -1e30  # finite, so that a row that sees nothing stays finite


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CacheView:
    """Rows `row` .. row + rows - 1 of a cache as a block sees them: [rows, Hkv, length, D].

    Written either with one token a row (a decode wave) or, where `rows` is 1, with several (a prefill chunk).
    """

    array: Any  # [R, Hkv, S, D]
    row: Any  # int32 scalar
    rows: int = field(metadata={"static": True})
    length: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int, int, int]:
        _, heads, _, dim = self.array.shape
        return (self.rows, heads, self.length, dim)

    @property
    def ndim(self) -> int:
        return 4

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def read(self) -> jax.Array:
        """[rows, Hkv, length, D]; a copy of just that, where XLA does not fuse it into its reader."""
        return jax.lax.dynamic_slice(self.array, (self.row, 0, 0, 0), self.shape)

    def write(self, update: jax.Array, indices: jax.Array) -> CacheView:
        """update [rows, Hkv, T, D] at slots indices[b] .. indices[b] + T - 1."""
        update = update.astype(self.array.dtype)
        if update.shape[2] > 1:
            if self.rows > 1:
                raise ValueError("several tokens are written to one row at a time")
            return replace(self, array=jax.lax.dynamic_update_slice(self.array, update, (self.row, 0, indices[0], 0)))
        rows, tokens = self.row + jnp.arange(self.rows), update[:, :, 0]
        if self.rows == 1:
            # As one update XLA merges the write into its reader, which then needs the old array too: a copy of the cache. Two
            # updates it leaves alone, so the second goes to the slot nobody sees.
            rows, tokens = jnp.stack([self.row, self.row]), jnp.concatenate([tokens, tokens])
            indices = jnp.append(indices, self.array.shape[2] - 1)
        return replace(self, array=self.array.at[rows, :, indices].set(tokens, mode="promise_in_bounds"))

    def __lower_op__(self, op_type: str, args: tuple[Any, ...], attrs: Mapping[str, Any]) -> Any:
        if op_type == "Shape":
            start, end = attrs.get("start", 0), attrs.get("end", 4)
            return np.asarray(self.shape[start:end], np.int64)
        if op_type == "TensorScatter" and args[0] is self:
            return self.write(args[1], args[2])
        if op_type == "Attention" and isinstance(args[1], CacheView) and isinstance(args[2], CacheView):
            mask = args[3]
            if attrs.get("is_causal", 0) or mask is None:
                raise ValueError("a block's Attention has an explicit mask")
            scale = attrs.get("scale") or float(args[0].shape[-1]) ** -0.5
            return attend(args[0], args[1], args[2], jnp.asarray(mask), scale=scale, softcap=attrs.get("softcap", 0.0))
        return NotImplemented


def attend(q: jax.Array, keys: CacheView, values: CacheView, mask: jax.Array, *, scale: float, softcap: float) -> jax.Array:
    """Attention of q [B, Hq, T, Dk] over the views; mask bool or additive [B or 1, Hq or 1, T, L] -> [B, Hq, T, Dv].

    Scores and their softmax are float32. On a CPU the two products copy what they read; a fused multiply and sum need not, and takes
    longer all the same (docs/adr/0002-one-allocation-per-cache.md).
    """
    batch, q_heads, tokens, dim = q.shape
    _, heads, _, value_dim = values.shape
    group = q_heads // heads
    q32 = q.astype(jnp.float32).reshape(batch, heads, group, tokens, dim) * scale
    bias = _bias(mask, heads, group)  # [B or 1, Hkv or 1, G or 1, T, L]
    k, v = keys.read(), values.read()
    # Keys on the left: XLA lays both operands out with the sum last and would copy what stands on the right.
    scores = jnp.einsum("bhld,bhgtd->bhlgt", k.astype(jnp.float32), q32).transpose(0, 1, 3, 4, 2)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    # A slot nobody sees may hold anything, NaN included: neither NaN nor 0 * NaN may reach a sum.
    weights = jax.nn.softmax(jnp.where(bias > _HIDDEN, scores + bias, _HIDDEN), axis=-1)
    seen = jnp.any(bias > _HIDDEN, axis=(1, 2, 3))[:, None, :, None]  # [B or 1, 1, L, 1]
    v32 = jnp.where(seen, v.astype(jnp.float32), 0.0)
    context = jnp.einsum("bhgtl,bhld->bhgtd", weights, v32)
    return context.reshape(batch, q_heads, tokens, value_dim).astype(q.dtype)


def _bias(mask: jax.Array, heads: int, group: int) -> jax.Array:
    """Additive float32 mask, query heads split as the cache groups them."""
    if mask.dtype == jnp.bool_:
        mask = jnp.where(mask, 0.0, _HIDDEN)
    batch, mask_heads, tokens, length = mask.shape
    split = (heads, group) if mask_heads > 1 else (1, 1)
    return jnp.maximum(mask.astype(jnp.float32), _HIDDEN).reshape(batch, *split, tokens, length)
