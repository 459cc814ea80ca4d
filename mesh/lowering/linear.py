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
    kernel   a call of mesh/kernels, for any number of rows; see docs/adr/0013-kernels.md

A narrow weight in any variant before those two is first widened whole, by one thread, into memory. All variants but the kernel are XLA's
own forms: they are what the kernel is compared with, and what a machine without kernels uses.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mesh.host.pages import in_large_pages
from mesh.kernels import calls
from mesh.kernels.library import kernels

__all__ = ["TILE", "VARIANTS", "Codes", "Factors", "candidates", "default_variant", "in_kernel", "measure", "parts", "product"]

_TILES = {"tile32": 32, "tile64": 64, "tile96": 96}
VARIANTS = ("dot", "split", *_TILES, "rows", "stream", "kernel")
_STREAMED = 512
TILE = 16
"""Outputs of a tile."""
_BYTE_OFFSET = 128
"""Of codes of 8 bits in tiles, which are from 0 on."""
_BEYOND_CACHE = 96 << 20
_LEAST_PART, _MOST_PART = 128 << 10, 512 << 10  # bytes: smaller parts cost more calls; with larger ones the last core works longer alone


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors:
    """A number for each output or group of a weight: [out], [out, groups] or one for all. In two steps, `data` [out, groups] is multiplied
    with the numbers of `step` [out, groups / n]."""

    data: Any
    step: Any = None

    def values(self, dtype: Any) -> Any:
        if self.step is None:
            return self.data.astype(dtype)
        each = self.data.shape[1] // self.step.shape[1]
        return self.data.astype(dtype) * jnp.repeat(self.step.astype(dtype), each, axis=1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Codes:
    """A weight [out, in] as stored: (code - offset - zero_point) * scale - minimum, seen as `dtype` (None: data's own).

    A group is `group` elements along `in`, the last one maybe fewer (0: an output is one group). With `bits`, data is uint8 [out, in / 2]
    with the low four bits of codes in blocks of 32: those of code j in the low half of byte j, those of code j + 16 in its high half. 5
    bits have the others in `high` [out, in / 8], the first code lowest; 6 bits in `high` [out, in / 4], in blocks of 64: byte j has two
    bits each of the codes j, j + 16, j + 32 and j + 48.
    `tiles`: the codes and the numbers of groups of 16 outputs lie side by side, int8 as uint8: see mesh/kernels/native/weight.h.
    """

    data: Any
    scale: Factors | None = None
    zero_point: Factors | None = None
    minimum: Factors | None = None
    high: Any = None
    dtype: Any = field(default=None, metadata={"static": True})
    group: int = field(default=0, metadata={"static": True})
    bits: int = field(default=0, metadata={"static": True})
    offset: int = field(default=0, metadata={"static": True})
    tiles: bool = field(default=False, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, int]:
        out, width = self.data.shape
        return (out, width * 2 if self.bits else width)

    @property
    def narrow(self) -> bool:
        return bool(self.bits) or np.dtype(self.data.dtype).itemsize < 4

    @property
    def stored_as(self) -> str:
        """The width and type of the codes, for a reader."""
        return f"{self.bits} bits" if self.bits else "int8" if self.tiles else str(np.dtype(self.data.dtype).name)

    def in_rows(self) -> Codes:
        """The same, output by output."""
        if not self.tiles:
            return self

        def rows(array: Any) -> Any:
            out, width = array.shape
            return array.reshape(out // TILE, width // 4, TILE, 4).transpose(0, 2, 1, 3).reshape(out, width)

        codes, high = rows(self.data), None if self.high is None else rows(self.high)
        turned: Any = {name: _turned(each, back=True) for name, each in self._factors()}
        if not self.bits:
            codes = (codes ^ np.uint8(_BYTE_OFFSET)).view(jnp.int8)
        return replace(self, data=codes, high=high, tiles=False, **turned)

    def in_tiles(self) -> Codes:
        """The same for kernels that read tiles: of 4 or 6 bits, or int8."""

        def tiles(array: Any) -> Any:
            out, width = array.shape
            words = np.ascontiguousarray(array).view(np.uint32).reshape(out // TILE, TILE, width // 4)
            turned = in_large_pages((out // TILE, width // 4, TILE), np.uint32)
            turned[...] = words.transpose(0, 2, 1)
            if not self.bits:
                turned ^= np.uint32(_BYTE_OFFSET * 0x01010101)
            return jax.device_put(turned.view(np.uint8).reshape(out, width), may_alias=True)

        codes, high = tiles(self.data), None if self.high is None else tiles(self.high)
        # by numpy: XLA would compile and start a program for each of many small arrays
        known = {name: jax.tree.map(np.asarray, each) for name, each in self._factors()}
        turned: Any = {name: jax.device_put(_turned(each, back=False)) for name, each in known.items()}
        return replace(self, data=codes, high=high, tiles=True, **turned)

    def _factors(self) -> list[tuple[str, Factors]]:
        each = (("scale", self.scale), ("zero_point", self.zero_point), ("minimum", self.minimum))
        return [(name, factors) for name, factors in each if factors is not None]

    def integers(self, dtype: Any) -> Any:
        """The codes [out, in] as `dtype`, less the offset, before zero point and scale."""
        if self.tiles:
            return self.in_rows().integers(dtype)
        codes = self.data
        if self.bits:
            blocks = codes.reshape(codes.shape[0], -1, 16)
            codes = jnp.concatenate([blocks & 15, blocks >> 4], axis=-1).reshape(self.shape)
        if self.bits == 5:
            codes = codes | ((self.high[..., None] >> np.arange(8, dtype=np.uint8)) & 1).reshape(self.shape) << 4
        if self.bits == 6:
            blocks = self.high.reshape(self.shape[0], -1, 1, 16)
            codes = codes | ((blocks >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]) & 3).reshape(self.shape) << 4
        if self.offset:
            codes = codes.astype(jnp.int8) - np.int8(self.offset)
        return codes.astype(dtype)

    def widened(self, dtype: Any) -> Any:
        """The weight [out, in] as `dtype`. Its arithmetic is the blocks' own, rounded to the type that they widen to."""
        if self.tiles:
            return self.in_rows().widened(dtype)
        work = np.dtype(self.dtype or dtype)
        values = self.integers(work)
        if self.zero_point is not None:
            values = values - self._spread(self.zero_point.values(work))
        if self.scale is not None:
            values = values * self._spread(self.scale.values(work))
        if self.minimum is not None:
            values = values - self._spread(self.minimum.values(work))
        return values.astype(dtype)

    def _spread(self, each: Any) -> Any:
        """One number a channel or a group, over the elements it is for: broadcasts to [out, in]."""
        if each.ndim < 2:
            return each.reshape(-1, 1)
        return jnp.repeat(each, self.group, axis=1)[:, : self.shape[1]] if self.group else each

    @property
    def kernel_kind(self) -> calls.Kind | None:
        """What the kernels call such a weight; None where none reads it."""
        depth = self.shape[1]
        names = {np.dtype(name): name for name in ("float32", "float16", "bfloat16", "int8", "uint8")}
        kind: Any = f"{self.bits} bits" if self.bits else "int8" if self.tiles else names.get(np.dtype(self.data.dtype))
        floating = kind in ("float32", "float16", "bfloat16")
        if kind is None or floating == (self.scale is not None) or (floating and (self.zero_point or self.minimum) is not None):
            return None
        if self.group and self.group < depth and (self.group < 16 or self.group & (self.group - 1)):
            return None
        if self.zero_point is not None and self.minimum is not None:
            return None
        if (kind in ("int8", "6 bits") and self.minimum is not None) or (kind in ("5 bits", "6 bits") and self.zero_point is not None):
            return None
        return f"tiles of {self.bits or 8} bits" if self.tiles else kind  # type: ignore[return-value]

    def for_kernels(self) -> calls.KernelWeight:
        """The same as the kernels are given it."""
        kind, (out, depth) = self.kernel_kind, self.shape
        if kind is None:
            raise ValueError(f"no kernel reads a weight of {self.stored_as}")
        groups = -(-depth // self.group) if self.group else 1
        scale, zero, minimum = (_each_group(each, out, groups, tiles=self.tiles) for each in (self.scale, self.zero_point, self.minimum))
        offset = _BYTE_OFFSET if self.tiles and not self.bits else self.offset
        return calls.KernelWeight(kind, (out, depth), self.data, self.high, self.group, offset, scale, zero, minimum)


def _turned(factors: Factors, *, back: bool) -> Factors:
    """Numbers [out, groups] with those of 16 outputs side by side, as in tiles, or back."""

    def one(array: Any) -> Any:
        if array is None or array.ndim < 2:
            return array
        out, groups = array.shape
        tiles = array.reshape((out // TILE, groups, TILE) if back else (out // TILE, TILE, groups))
        return tiles.transpose(0, 2, 1).reshape(out, groups)

    return Factors(one(factors.data), one(factors.step))


def _each_group(factors: Factors | None, out: int, groups: int, *, tiles: bool) -> calls.KernelFactors | None:
    """The same with a number for every group of every output."""
    if factors is None:
        return None
    data = factors.data if factors.data.ndim == 2 else factors.data.reshape(-1, 1)
    if data.shape != (out, groups):
        data = jnp.broadcast_to(data, (out, groups))
        data = _turned(Factors(data), back=False).data if tiles else data
    return calls.KernelFactors(data, factors.step)


def product(x: Any, weight: Codes, *, variant: str) -> Any:
    """x [rows, in] times the weight [out, in] transposed -> [rows, out], of x's type.

    A scale an output channel is applied to the result, so that the product reads the codes themselves.
    """
    if variant == "kernel":
        return calls.products(x, [weight.for_kernels()])[0]
    weight = weight.in_rows()
    if variant == "stream":
        return _stream(x, weight)
    scale = weight.scale
    if scale is not None and scale.data.ndim < 2 and weight.zero_point is None and weight.minimum is None:
        return _VARIANTS[variant](x, weight.integers(x.dtype)) * scale.values(x.dtype)
    return _VARIANTS[variant](x, weight.widened(x.dtype))


def in_kernel(dtype: Any, weight: Codes) -> bool:
    """Whether the kernels of this process multiply x of this type with the weight."""
    return kernels().name is not None and np.dtype(dtype) == np.float32 and weight.kernel_kind is not None


def default_variant(rows: int, weight: Codes) -> str:
    """What measured best on the CPUs seen so far; on an accelerator always the plain product."""
    if jax.default_backend() != "cpu":
        return "dot"
    if weight.narrow:
        # XLA would widen a weight that needs more than a conversion once for all rows, into memory.
        few = 1 if weight.bits or (weight.scale is not None and weight.scale.data.ndim == 2) else 8
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

    def spread(each: Factors | None) -> Factors | None:
        return Factors(jnp.broadcast_to(each.data.reshape(-1), (out,))) if each is not None and each.data.ndim < 2 else each

    return replace(weight, scale=spread(weight.scale), zero_point=spread(weight.zero_point))


_VARIANTS: dict[str, Callable[[Any, Any], Any]] = {
    "dot": _dot,
    "split": _split,
    **{name: _tile(size) for name, size in _TILES.items()},
    "rows": _rows,
}
