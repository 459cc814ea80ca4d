"""The KV cache of one layer on one shard, and how a block's own ops read and write it in place.

    array [R, Hkv, S, D]    R rows (sessions), S positions: the key or value of each position of a row; of int8 with its scale at the end

A block takes `past_key`, scatters into it with TensorScatter and reads the result with Attention (docs/model-format.md). Run literally,
that would gather the rows of a step and copy them back. Instead a CacheView stands in the lowered graph in place of the past, and
answers those two ops on the whole array. New tokens are written in place. Attention reads only the rows of the step, block by block, up
to the last position that one of them sees.

The array has a few more positions than the context. The last one takes the writes of rows that have nothing to write in this step; the
others take the padding of a prefill chunk. No mask ever shows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mesh.dtypes import INT8_SCALE
from mesh.kernels import calls
from mesh.lowering.ops.attention import rotate

__all__ = ["SLACK", "CacheView", "PackedView", "attend", "in_blocks"]

SLACK = 16
"""Positions that a row has beyond its context; also the smallest prefill chunk."""

COARSE, FINE = 1024, 128
"""Positions that attention reads at a time: coarse blocks as long as they are full, then fine ones. A small block wastes little; large
blocks take fewer iterations."""
_BLOCK_BYTES = 3 << 20
"""The most a coarse block of keys should take, so that its copy stays in the processor's caches."""
_TINY = 1e-30  # smaller numbers are 0 in int8
_HIDDEN = -1e30  # finite, so that a row that sees nothing stays finite
_LOWEST = -1e20  # below the score of every visible position, and so far above a hidden one that the hidden one's weight is 0


class _View:
    """A cache as a block sees it: [rows, Hkv, length, D]."""

    array: Any  # [R, Hkv, S, D]
    length: int

    @property
    def row_count(self) -> int:
        """The rows that the block sees."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, int, int, int]:
        _, heads, _, width = self.array.shape
        return (self.row_count, heads, self.length, width - INT8_SCALE if self.array.dtype == jnp.int8 else width)

    @property
    def ndim(self) -> int:
        return 4

    @property
    def dtype(self) -> Any:
        """Of the numbers that are read."""
        return jnp.dtype(jnp.float32) if self.array.dtype == jnp.int8 else self.array.dtype

    def __lower_op__(self, op_type: str, args: tuple[Any, ...], attrs: Mapping[str, Any]) -> Any:
        if op_type == "Shape":
            start, end = attrs.get("start", 0), attrs.get("end", 4)
            return np.asarray(self.shape[start:end], np.int64)
        if op_type == "CachedAttention" and isinstance(args[3], type(self)) and isinstance(args[4], type(self)):
            return _decode_step(args, attrs)
        return self._lower(op_type, args, attrs)

    def _lower(self, op_type: str, args: tuple[Any, ...], attrs: Mapping[str, Any]) -> Any:
        """The other operations that read a cache."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CacheView(_View):
    """Rows `row` .. row + rows - 1 of a cache, as a block sees them: [rows, Hkv, length, D]. No query sees a position from `used` on.

    A step writes either one token for each row (a decode batch) or, if `rows` is 1, several tokens (a prefill chunk).
    """

    array: Any  # [R, Hkv, S, D]
    row: Any  # int32 scalar
    used: Any  # int32 scalar, at most `length`
    rows: int = field(metadata={"static": True})
    length: int = field(metadata={"static": True})

    @property
    def row_count(self) -> int:
        return self.rows

    def read(self, start: Any, size: int) -> jax.Array:
        """Positions start .. start + size - 1 as float32 [rows, Hkv, size, D]; a copy of just that, where XLA does not fuse it into its
        reader."""
        _, heads, _, width = self.array.shape
        return _read(jax.lax.dynamic_slice(self.array, (self.row, 0, start, 0), (self.rows, heads, size, width)))

    def write(self, update: jax.Array, indices: jax.Array) -> CacheView:
        """Write update [rows, Hkv, T, D] at positions indices[b] .. indices[b] + T - 1."""
        update = _stored(update, self.array.dtype)
        if update.shape[2] > 1:
            if self.rows > 1:
                raise ValueError("several tokens are written to one row at a time")
            return replace(self, array=jax.lax.dynamic_update_slice(self.array, update, (self.row, 0, indices[0], 0)))
        rows, tokens = self.row + jnp.arange(self.rows), update[:, :, 0]
        if self.rows == 1:
            # XLA merges a single update into its reader, which then needs the old array too: a copy of the cache. It does not
            # merge two updates, so a second one goes to the position that no query sees.
            rows, tokens = jnp.stack([self.row, self.row]), jnp.concatenate([tokens, tokens])
            indices = jnp.append(indices, self.array.shape[2] - 1)
        return replace(self, array=self.array.at[rows, :, indices].set(tokens, mode="promise_in_bounds"))

    def _lower(self, op_type: str, args: tuple[Any, ...], attrs: Mapping[str, Any]) -> Any:
        if op_type == "TensorScatter" and args[0] is self:
            return self.write(args[1], args[2])
        if op_type == "Attention" and isinstance(args[1], CacheView) and isinstance(args[2], CacheView):
            return attend(args[0], args[1], args[2], _mask(args, attrs), **_scores(args[0], attrs))
        if op_type == "Pad" and np.asarray(args[1]).tolist() == [0, 0, 0, 0, 0, 0, 1, 0]:
            return _PaddedView(self)
        return NotImplemented


def _stored(update: jax.Array, dtype: Any) -> jax.Array:
    """What a cache of that type holds of keys or values [..., D]. All numbers are finite: a weight of 0 does not remove a NaN. Of int8
    [..., D + INT8_SCALE]: the largest number of each is 127 times its scale. The kernels compute the same (products.inc)."""
    if dtype != jnp.int8:
        return jnp.nan_to_num(update.astype(dtype))
    numbers = jnp.nan_to_num(update.astype(jnp.float32))
    most = jnp.max(jnp.abs(numbers), axis=-1, keepdims=True)
    codes = jnp.rint(numbers * jnp.where(most > _TINY, 127 / most, 0)).astype(jnp.int8)
    scale = jax.lax.bitcast_convert_type(most * np.float32(1 / 127), jnp.int8)
    return jnp.concatenate([codes, scale.reshape(*codes.shape[:-1], INT8_SCALE)], axis=-1)


def _read(stored: jax.Array) -> jax.Array:
    """The keys or values [..., D] as float32."""
    if stored.dtype != jnp.int8:
        return stored.astype(jnp.float32)
    scale = jax.lax.bitcast_convert_type(stored[..., -INT8_SCALE:], jnp.float32)
    return stored[..., :-INT8_SCALE].astype(jnp.float32) * scale[..., None]


@dataclass(frozen=True)
class _PaddedView:
    """A view and one more position after it, of zeros: how a block writes attention sinks, each the bias of a head at that position."""

    view: CacheView

    def __lower_op__(self, op_type: str, args: tuple[Any, ...], attrs: Mapping[str, Any]) -> Any:
        if op_type != "Attention" or not all(isinstance(each, _PaddedView) for each in args[1:3]):
            raise ValueError(f"{op_type} cannot read a padded cache")
        mask = _mask(args, attrs)
        return attend(args[0], args[1].view, args[2].view, mask[..., :-1], **_scores(args[0], attrs), sinks=mask[..., -1:])


def _mask(args: tuple[Any, ...], attrs: Mapping[str, Any]) -> jax.Array:
    """The mask of a block's Attention."""
    if attrs.get("is_causal", 0) or args[3] is None:
        raise ValueError("a block's Attention has an explicit mask")
    return jnp.asarray(args[3])


def _scores(q: Any, attrs: Mapping[str, Any]) -> dict[str, Any]:
    """What a block's Attention does to its scores, as `attend` takes it."""
    return {"scale": attrs.get("scale") or float(q.shape[-1]) ** -0.5, "softcap": attrs.get("softcap", 0.0)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedView(_View):
    """A cache as a block sees it in a packed step: each of N tokens has its own row, and a row may have several of them, one after the
    other. To the block it is a cache of N rows, [N, Hkv, length, D]. Only the kernels read it (mesh/kernels/calls.py)."""

    array: Any  # [R, Hkv, S, D]
    rows: Any  # int32 [N]
    count: Any  # int32 scalar: the tokens that are real
    length: int = field(metadata={"static": True})

    @property
    def row_count(self) -> int:
        return int(self.rows.shape[0])

    def _lower(self, op_type: str, args: tuple[Any, ...], attrs: Mapping[str, Any]) -> Any:
        raise ValueError(f"{op_type} cannot read the cache of a packed step")


def _decode_step(args: tuple[Any, ...], attrs: Mapping[str, Any]) -> tuple[Any, CacheView, CacheView]:
    """CachedAttention of single tokens (mesh/lowering/fuse.py): rotation, writing and attention as one call of the kernels."""
    q, k, v, keys, values, positions, writes, *rotation = args
    rows = keys.shape[0]
    q, k, v = (x.reshape(rows, heads, -1) for x, heads in ((q, attrs["heads"]), (k, attrs["kv_heads"]), (v, attrs["kv_heads"])))
    tables = [jnp.broadcast_to(table, (rows, *table.shape[1:])).reshape(rows, -1) for table in rotation]
    if isinstance(keys, PackedView):
        own, count = keys.rows, keys.count
    elif _in_kernel(q, keys, values):
        own, count = keys.row + jnp.arange(rows, dtype=jnp.int32), jnp.int32(rows)
    else:
        return _decode_step_in_parts((q, k, v), tables, keys, values, positions.reshape(rows), writes, attrs)
    context, key_array, value_array = calls.attention(
        q,
        k,
        v,
        (tables[0], tables[1]) if tables else None,
        (positions.reshape(rows), writes, own, count),
        (keys.array, values.array),
        length=keys.length,
        scale=attrs["scale"],
        softcap=attrs["softcap"],
        window=attrs["window"] or None,
        interleaved=bool(attrs["interleaved"]),
    )
    return context.reshape(rows, 1, -1), replace(keys, array=key_array), replace(values, array=value_array)


def _in_kernel(q: Any, keys: CacheView, values: CacheView) -> bool:
    """Whether a kernel attends over these caches: float32, float16 or int8, keys as large as values."""
    of = np.dtype(keys.array.dtype)
    known = np.dtype(q.dtype) == np.float32 and of in (np.float32, np.float16, np.int8)
    return known and of == values.array.dtype and keys.array.shape == values.array.shape


def _decode_step_in_parts(
    heads: tuple[Any, Any, Any],
    tables: Sequence[Any],
    keys: CacheView,
    values: CacheView,
    positions: Any,
    writes: Any,
    attrs: Mapping[str, Any],
) -> tuple[Any, CacheView, CacheView]:
    """The same by the operations that it is made of."""
    q, k, v = (x[:, :, None] for x in heads)  # [rows, heads, 1, dim]
    if tables:
        cos, sin = (table[:, None, None] for table in tables)
        q, k = (rotate(x, cos, sin, bool(attrs["interleaved"]), 2 * cos.shape[-1]) for x in (q, k))
    keys, values = keys.write(k, writes), values.write(v, writes)
    slots, at = jnp.arange(keys.length), positions[:, None, None, None]
    mask = slots <= at
    if attrs["window"]:
        mask = mask & (slots > at - attrs["window"])
    context = attend(q, keys, values, mask, scale=attrs["scale"], softcap=attrs["softcap"])
    return context.reshape(len(positions), 1, -1), keys, values


def in_blocks() -> bool:
    """Whether attention goes through the cache in blocks. An accelerator would have to be asked before each block whether there is
    another one, so there `length` positions are read at once."""
    return jax.default_backend() == "cpu"


def attend(
    q: jax.Array,
    keys: CacheView,
    values: CacheView,
    mask: jax.Array,
    *,
    scale: float,
    softcap: float,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Attention of q [B, Hq, T, Dk] over the views; mask bool or additive [B or 1, Hq or 1, T, L] -> [B, Hq, T, Dv]. `sinks`
    [B, Hq, T, 1]: one more logit of each softmax, without a value.

    The softmax is computed block by block: the sums so far shrink when a higher score comes (Milakov, Gimelshein 2018). Scores and sums
    are float32. The content of a position that no query sees may overflow in its score; that score is dropped and has no weight.
    """
    batch, q_heads, tokens, dim = q.shape
    _, heads, length, value_dim = values.shape
    group = q_heads // heads
    q32 = q.astype(jnp.float32).reshape(batch, heads, group, tokens, dim) * scale
    mask = jnp.broadcast_to(mask, (*mask.shape[:3], length))

    def block(begin: Any, size: int, before: _Sums) -> _Sums:
        """The sums with positions begin .. begin + size - 1, as far as they exist."""
        start = jnp.minimum(begin, length - size)
        bias = _bias(jax.lax.dynamic_slice_in_dim(mask, start, size, axis=3), heads, group)  # [B or 1, Hkv or 1, G or 1, T, size]
        seen = (bias > _HIDDEN) & (start + jnp.arange(size) >= begin)
        # Keys are the left operand: XLA arranges both operands with the summed axis last, and would copy the right one.
        scores = jnp.einsum("bhld,bhgtd->bhlgt", keys.read(start, size), q32).transpose(0, 1, 3, 4, 2)
        if softcap:
            scores = softcap * jnp.tanh(scores / softcap)
        scores = jnp.where(seen, scores + bias, _HIDDEN)
        peak = jnp.maximum(before.peak, jnp.max(scores, axis=-1, keepdims=True))
        shrink, weights = jnp.exp(before.peak - peak), jnp.exp(scores - peak)
        context = jnp.einsum("bhgtl,bhld->bhgtd", weights, values.read(start, size))
        return _Sums(peak, before.total * shrink + jnp.sum(weights, axis=-1, keepdims=True), before.context * shrink + context)

    one = jnp.zeros((batch, heads, group, tokens, 1), jnp.float32)
    sums = _Sums(one + _LOWEST, one, jnp.zeros((batch, heads, group, tokens, value_dim), jnp.float32))
    if sinks is not None:
        sums = sums._replace(peak=one + _bias(sinks, heads, group), total=one + 1)
    sizes = _block_sizes(length, batch * heads * dim * 4)
    if sizes == (length,):
        sums = block(0, length, sums)
    else:
        at = jnp.int32(0)
        for size in sizes:
            left = keys.used - at
            count = -(-left // size) if size == sizes[-1] else left // size
            sums = jax.lax.fori_loop(0, count, lambda index, sums, at=at, size=size: block(at + index * size, size, sums), sums)
            at += count * size
    total = jnp.maximum(sums.total, 1.0)  # it is at least 1 if any position is visible: the highest score (or sink) has weight 1
    return (sums.context / total).reshape(batch, q_heads, tokens, value_dim).astype(q.dtype)


class _Sums(NamedTuple):
    """The sums over the blocks so far: the highest score [B, Hkv, G, T, 1], the sum of the weights [B, Hkv, G, T, 1], and the sum of the
    weighted values [B, Hkv, G, T, Dv], both as if the highest score were 0."""

    peak: Any
    total: Any
    context: Any


def _block_sizes(length: int, slot_bytes: int) -> tuple[int, ...]:
    """Block sizes in descending order; the whole length if it is one block. `slot_bytes`: the bytes of one position's keys of all rows."""
    if length <= FINE or not in_blocks():
        return (length,)
    coarse = COARSE
    while coarse > FINE and (coarse > length or coarse * slot_bytes > _BLOCK_BYTES):
        coarse //= 2
    return (coarse, FINE) if coarse > FINE else (FINE,)


def _bias(mask: jax.Array, heads: int, group: int) -> jax.Array:
    """Additive float32 mask, query heads split as the cache groups them."""
    if mask.dtype == jnp.bool_:
        mask = jnp.where(mask, 0.0, _HIDDEN)
    batch, mask_heads, tokens, length = mask.shape
    split = (heads, group) if mask_heads > 1 else (1, 1)
    return jnp.maximum(mask.astype(jnp.float32), _HIDDEN).reshape(batch, *split, tokens, length)
