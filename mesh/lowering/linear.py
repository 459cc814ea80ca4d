"""x @ W for a weight kept [out, in]: the forms XLA compiles it from, and the choice among them.

XLA on a CPU runs the same product at very different speeds depending on how it is written and on the number of rows, so
the form is chosen per weight shape and number of rows by measuring (`measure`), and `default_form` stands in where nothing
was measured. Forms, for x [rows, in] and W [out, in]:

    dot      x @ W.T: one row is a matrix-vector product that reads narrow weights directly; many rows are one large GEMM
    tile32   einsum over tiles [out/32, 32, in], then a transpose of the small result: several rows share each read
    tile64   the same with 64, tile96 with 96
    rows     one matrix-vector product a row: few rows of narrow weights
    reduce   multiply and sum, fused: narrow weights are widened in registers, never in memory
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["FORMS", "Codes", "candidates", "default_form", "measure", "product"]

_TILES = {"tile32": 32, "tile64": 64, "tile96": 96}
FORMS = ("dot", *_TILES, "rows", "reduce")


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


def product(x: Any, weight: Codes, *, form: str) -> Any:
    """x [rows, in] times the weight [out, in] transposed -> [rows, out], of x's type.

    A scale an output channel is applied to the result, so that the product reads the codes themselves.
    """
    if weight.scale is None:
        return _FORMS[form](x, weight.integers(x.dtype))
    if weight.scale.ndim < 2 and weight.zero_point is None:
        return _FORMS[form](x, weight.integers(x.dtype)) * weight.scale.astype(x.dtype)
    return _FORMS[form](x, weight.widened(x.dtype))


def default_form(rows: int, weight: Codes) -> str:
    """What measured best on the CPUs seen so far; on an accelerator always the plain product."""
    if jax.default_backend() != "cpu" or rows == 1 or rows > 64:
        return "dot"
    if weight.narrow:
        return "rows" if rows <= 4 else "dot"
    return "tile32" if rows <= 8 else "tile64"


def candidates(rows: int, weight: Codes) -> tuple[str, ...]:
    """The forms worth measuring."""
    if jax.default_backend() != "cpu" or rows > 64:
        return ("dot",)
    if weight.narrow:
        return ("dot",) if rows == 1 else ("dot", "reduce", "rows") if rows <= 8 else ("dot", "reduce")
    return ("dot", *(name for name, size in _TILES.items() if weight.shape[0] % size == 0))


def measure(weight: Codes, rows: int, dtype: Any, *, repeats: int = 3) -> str:
    """The fastest candidate for x [rows, in] of `dtype`, each by the best of `repeats` timed runs."""
    names = candidates(rows, weight)
    if len(names) == 1:
        return names[0]
    x = jnp.ones((rows, weight.shape[1]), dtype)
    seconds: dict[str, float] = {}
    for name in names:
        run = jax.jit(product, static_argnames="form")
        run(x, weight, form=name).block_until_ready()
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            run(x, weight, form=name).block_until_ready()
            best = min(best, time.perf_counter() - start)
        seconds[name] = best
    return min(seconds, key=lambda name: seconds[name])


def _dot(x: Any, w: Any) -> Any:
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def _tile(size: int) -> Callable[[Any, Any], Any]:
    def tiled(x: Any, w: Any) -> Any:
        out, depth = w.shape
        if out % size:
            return _dot(x, w)
        y = jnp.einsum("bk,ntk->nbt", x, w.reshape(out // size, size, depth))  # [out/size, rows, size]
        return y.transpose(1, 0, 2).reshape(x.shape[0], out)

    return tiled


def _rows(x: Any, w: Any) -> Any:
    return jnp.concatenate([_dot(x[i : i + 1], w) for i in range(x.shape[0])])


def _reduce(x: Any, w: Any) -> Any:
    return jnp.sum(x[:, None, :] * w[None], axis=-1)


_FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "dot": _dot,
    **{name: _tile(size) for name, size in _TILES.items()},
    "rows": _rows,
    "reduce": _reduce,
}
