"""x @ W for a weight kept as [out, in]: the variants of the product, and the choice among them.

XLA on a CPU runs the same product at very different speeds, depending on how it is written and on the number of rows. So the variant is
chosen by measuring (`measure`) for each weight shape and number of rows; where nothing was measured, `default_variant` chooses. The
variants, for x [rows, in] and W [out, in]:

    dot      one contraction: many rows are one large GEMM
    split    a batched product with parts of W, at least one a core: one row is a matrix-vector product a part
    tile32   einsum over tiles [out/32, 32, in], then a transpose of the small result: several rows share each read
    tile64   the same with 64, tile96 with 96
    rows     x_i @ W.T, row by row: XLA fuses the widening of a narrow weight into it, so that it reads 8 bits where float32 reads 32
    stream   a loop over tiles of at most 512 outputs: many rows of a narrow weight, widened a tile at a time

A narrow weight in any other variant is first widened whole, by one thread, into memory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["VARIANTS", "Codes", "candidates", "default_variant", "measure", "parts", "product"]

_TILES = {"tile32": 32, "tile64": 64, "tile96": 96}
VARIANTS = ("dot", "split", *_TILES, "rows", "stream")
_STREAMED = 512
_BEYOND_CACHE = 96 << 20
_LEAST_PART, _MOST_PART = 128 << 10, 512 << 10  # bytes: smaller parts cost more calls; with larger ones the last core works longer alone


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Codes:
    """A weight [out, in] as stored: value = (data - zero_point) * scale, seen as `dtype` (None: data's own).

    `scale` and `zero_point` are [out], [out, groups] along `in`, scalars, or None; a group is `group` elements, the last one maybe
    fewer. With `nibbles`, data is uint8 [out, in / 2], two 4-bit codes a byte, the even one low.
    """

    data: Any
    scale: Any = None
    zero_point: Any = None
    dtype: Any = field(default=None, metadata={"static": True})
    group: int = field(default=0, metadata={"static": True})
    nibbles: Literal["signed", "unsigned"] | None = field(default=None, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        out, width = self.data.shape
        return (out, width * 2 if self.nibbles else width)

    @property
    def narrow(self) -> bool:
        return self.nibbles is not None or np.dtype(self.data.dtype).itemsize < 4

    def integers(self, dtype: Any) -> Any:
        """The codes [out, in] as `dtype`, before zero point and scale."""
        if self.nibbles is None:
            return self.data.astype(dtype)
        low, high = self.data & 15, self.data >> 4
        if self.nibbles == "signed":
            low, high = ((nibble.astype(jnp.int8) ^ 8) - 8 for nibble in (low, high))
        return jnp.stack([low.astype(dtype), high.astype(dtype)], axis=-1).reshape(self.shape)

    def widened(self, dtype: Any) -> Any:
        """The weight [out, in] as `dtype`."""
        values = self.integers(dtype)
        if self.scale is None:
            return values
        if self.zero_point is not None:
            values = values - self._spread(self.zero_point.astype(dtype))
        return values * self._spread(self.scale.astype(dtype))

    def _spread(self, each: Any) -> Any:
        """One number a channel or a group, over the elements it is for: broadcasts to [out, in]."""
        if each.ndim < 2:
            return each.reshape(-1, 1)
        return jnp.repeat(each, self.group, axis=1)[:, : self.shape[1]]


def product(x: Any, weight: Codes, *, variant: str) -> Any:
    """x [rows, in] times the weight [out, in] transposed -> [rows, out], of x's type.

    A scale an output channel is applied to the result, so that the product reads the codes themselves.
    """
    if variant == "stream":
        return _stream(x, weight)
    if weight.scale is None:
        return _VARIANTS[variant](x, weight.integers(x.dtype))
    if weight.scale.ndim < 2 and weight.zero_point is None:
        return _VARIANTS[variant](x, weight.integers(x.dtype)) * weight.scale.astype(x.dtype)
    return _VARIANTS[variant](x, weight.widened(x.dtype))


def default_variant(rows: int, weight: Codes) -> str:
    """What measured best on the CPUs seen so far; on an accelerator always the plain product."""
    if jax.default_backend() != "cpu":
        return "dot"
    if weight.narrow:
        # XLA would widen a weight that needs more than a conversion once for all rows, into memory.
        few = 1 if weight.nibbles or (weight.scale is not None and weight.scale.ndim == 2) else 8
        return "rows" if rows <= few else "stream"
    if rows == 1:
        return "split"
    if rows > 64:
        return "dot"
    return "tile32" if rows <= 8 else "tile64"


def candidates(rows: int, weight: Codes) -> tuple[str, ...]:
    """The variants worth measuring: there is a choice for few rows of a wide weight on a CPU."""
    if jax.default_backend() != "cpu" or weight.narrow or rows == 1 or rows > 64:
        return (default_variant(rows, weight),)
    return ("dot", *(name for name, size in _TILES.items() if weight.shape[0] % size == 0))


def measure(weight: Codes, rows: int, *, repeats: int = 5) -> dict[str, float]:
    """Best seconds of each candidate for x [rows, in], over enough copies of the weight that none is still in a cache."""
    names = candidates(rows, weight)
    dtype = weight.data.dtype
    x = jnp.ones((rows, weight.shape[1]), dtype)
    copies = [weight.data + np.asarray(index, dtype) for index in range(max(1, -(-_BEYOND_CACHE // weight.data.nbytes)))]

    @partial(jax.jit, static_argnames="variant")
    def run(x: Any, copies: list[Any], variant: str) -> Any:
        return sum(product(x, Codes(each), variant=variant)[:, 0] for each in copies)

    seconds = dict.fromkeys(names, float("inf"))
    for name in names:
        run(x, copies, name).block_until_ready()
    for _ in range(repeats):
        for name in names:
            start = time.perf_counter()
            run(x, copies, name).block_until_ready()
            seconds[name] = min(seconds[name], (time.perf_counter() - start) / len(copies))
    return seconds


def _dot(x: Any, w: Any) -> Any:
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def parts(out: int, size: int, cores: int) -> int:
    """How many equal parts a weight of `out` outputs and `size` bytes is read in; 1 where no other number divides it."""
    least = max(min(cores, size // _LEAST_PART), -(-size // _MOST_PART), 1)
    return next((count for count in (*range(least, 2 * least), *range(least - 1, 1, -1)) if out % count == 0), 1)


def _split(x: Any, w: Any) -> Any:
    out, depth = w.shape
    count = parts(out, out * depth * w.dtype.itemsize, os.cpu_count() or 1)
    if count == 1:
        return _dot(x, w)
    each = jnp.broadcast_to(x, (count, *x.shape))
    y = jax.lax.dot_general(each, w.reshape(count, out // count, depth), (((2,), (2,)), ((0,), (0,))))  # [count, rows, out/count]
    return y.transpose(1, 0, 2).reshape(x.shape[0], out)


def _tile(size: int) -> Callable[[Any, Any], Any]:
    def tiled(x: Any, w: Any) -> Any:
        out, depth = w.shape
        if out % size:
            return _dot(x, w)
        y = jnp.einsum("bk,ntk->nbt", x, w.reshape(out // size, size, depth))  # [out/size, rows, size]
        return y.transpose(1, 0, 2).reshape(x.shape[0], out)

    return tiled


def _rows(x: Any, w: Any) -> Any:
    return jnp.concatenate([x[i : i + 1] @ w.T for i in range(x.shape[0])])


def _stream(x: Any, weight: Codes) -> Any:
    out = weight.shape[0]
    tile = max(size for size in range(1, min(out, _STREAMED) + 1) if out % size == 0)
    if tile * 8 < min(out, _STREAMED):  # no tile size that divides the outputs is worth a loop
        return _VARIANTS["dot"](x, weight.widened(x.dtype))
    tiles = jax.tree.map(lambda leaf: leaf.reshape(out // tile, tile, *leaf.shape[1:]) if leaf.ndim else leaf, _per_output(weight))
    y = jax.lax.map(lambda each: _dot(x, each.widened(x.dtype)), tiles)  # [out/tile, rows, tile]
    return y.transpose(1, 0, 2).reshape(x.shape[0], out)


def _per_output(weight: Codes) -> Codes:
    """The same with its scale and zero point spread over the outputs, where they are one number for all."""
    out = weight.shape[0]

    def spread(each: Any) -> Any:
        return jnp.broadcast_to(each.reshape(-1), (out,)) if each is not None and each.ndim < 2 else each

    return replace(weight, scale=spread(weight.scale), zero_point=spread(weight.zero_point))


_VARIANTS: dict[str, Callable[[Any, Any], Any]] = {
    "dot": _dot,
    "split": _split,
    **{name: _tile(size) for name, size in _TILES.items()},
    "rows": _rows,
}
