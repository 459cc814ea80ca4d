"""Calls of the kernels inside a program that JAX traces.

    products           norm or activation of the input, one or more products of it, bias and residual: one custom call
    expert_products    each row times the weight of the expert that it has chosen, the rows of an expert together: one custom call
    attention          rotation, writing to the cache in place, and attention of tokens of any rows: one custom call
    likeliest          the likeliest token that the mask of a row allows

Products and attention take the number of tokens that are real, and compute only those: padding to a compiled size costs next to nothing.

The arguments of a custom call are checked in mesh/kernels/native/handlers.cpp, which reads the description of a weight in the order of
`KernelWeight.described`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

__all__ = [
    "KINDS",
    "MOST_WEIGHTS",
    "Gated",
    "InputNorm",
    "KernelFactors",
    "KernelWeight",
    "Kind",
    "attention",
    "expert_products",
    "likeliest",
    "products",
]

Kind = Literal[
    "float32", "float16", "bfloat16", "int8", "uint8", "4 bits", "5 bits", "6 bits", "tiles of 4 bits", "tiles of 6 bits", "tiles of 8 bits"
]
KINDS: tuple[Kind, ...] = (
    "float32",
    "float16",
    "bfloat16",
    "int8",
    "uint8",
    "4 bits",
    "5 bits",
    "6 bits",
    "tiles of 4 bits",
    "tiles of 6 bits",
    "tiles of 8 bits",
)
MOST_WEIGHTS = 8
"""Of one call."""

_AS_GIVEN, _NORM, _GATED = 0, 1, {"silu": 2, "gelu_tanh": 3}


@dataclass(frozen=True)
class KernelFactors:
    """A number for each output or group, [out, groups] or [out]; in two steps: `data` times the number of `step` [out, groups / n]."""

    data: Any
    step: Any = None

    @property
    def arrays(self) -> tuple[Any, ...]:
        return (self.data,) if self.step is None else (self.data, self.step)


@dataclass(frozen=True)
class KernelWeight:
    """A weight [out, in] as the kernels read it: (code - offset - zero) * scale - minimum. See mesh/kernels/native/weight.h."""

    kind: Kind
    shape: tuple[int, int]
    codes: Any
    high: Any = None
    group: int = 0
    offset: int = 0
    scale: KernelFactors | None = None
    zero: KernelFactors | None = None
    minimum: KernelFactors | None = None
    bias: Any = None

    @property
    def arrays(self) -> tuple[Any, ...]:
        factors = (array for each in (self.scale, self.zero, self.minimum) if each is not None for array in each.arrays)
        return (self.codes, *(() if self.high is None else (self.high,)), *factors, *(() if self.bias is None else (self.bias,)))

    @property
    def described(self) -> tuple[int, ...]:
        counts = (0 if each is None else len(each.arrays) for each in (self.scale, self.zero, self.minimum))
        return (KINDS.index(self.kind), *self.shape, self.group, self.offset, *counts, int(self.bias is not None))


@dataclass(frozen=True)
class InputNorm:
    """RMS normalisation of the input: its scale [in]."""

    scale: Any
    epsilon: float


@dataclass(frozen=True)
class Gated:
    """The input is a gate, whose activation is multiplied with `up` [rows, in]."""

    activation: Literal["silu", "gelu_tanh"]
    up: Any


def products(
    x: Any,
    weights: Sequence[KernelWeight],
    *,
    before: InputNorm | Gated | None = None,
    rounds: bool = False,
    residual: Any = None,
    count: Any = None,
) -> list[Any]:
    """x [rows, in], normalised or gated, times each weight -> [rows, out] float32 of each; `residual` is added to the only one. `rounds`:
    what is multiplied is rounded to bfloat16 before. `count` (int32 scalar): so many rows are computed, and the others are left as they are
    in memory."""
    first: tuple[Any, ...] = ()
    prologue, epsilon = _AS_GIVEN, 0.0
    if isinstance(before, InputNorm):
        prologue, epsilon, first = _NORM, before.epsilon, (before.scale,)
    elif before is not None:
        prologue, first = _GATED[before.activation], (before.up,)
    rows = x.shape[0]
    arrays = (array for weight in weights for array in weight.arrays)
    call = jax.ffi.ffi_call("mesh_products", [jax.ShapeDtypeStruct((rows, weight.shape[0]), np.float32) for weight in weights])
    described = np.array([number for weight in weights for number in weight.described], np.int64)
    results: Any = call(
        x,
        *first,
        *arrays,
        *(() if residual is None else (residual,)),
        *(() if count is None else (count.reshape(1),)),
        weights=described,
        rows=np.int64(rows),
        prologue=np.int64(prologue),
        epsilon=np.float32(epsilon),
        rounds=np.int64(rounds),
        residual=np.int64(residual is not None),
        counted=np.int64(count is not None),
    )
    return list(results)


def expert_products(x: Any, chosen: Any, weight: KernelWeight, experts: int, *, rounds: bool = False) -> Any:
    """x [rows, in], chosen int32 [rows], the weights of all experts one after the other [experts * out, in] -> [rows, out] float32: row r
    times the weight of expert chosen[r]. A row has the same bits in any company. `rounds`: x is rounded to bfloat16 before."""
    rows, out = x.shape[0], weight.shape[0] // experts
    call = jax.ffi.ffi_call("mesh_expert_products", jax.ShapeDtypeStruct((rows, out), np.float32))
    described = np.array(weight.described, np.int64)
    return call(x, chosen, *weight.arrays, weights=described, rows=np.int64(rows), experts=np.int64(experts), rounds=np.int64(rounds))


def attention(
    q: Any,
    k: Any,
    v: Any,
    rotation: tuple[Any, Any] | None,
    steps: tuple[Any, Any, Any, Any],
    caches: tuple[Any, Any],
    *,
    length: int,
    scale: float,
    softcap: float = 0.0,
    window: int | None = None,
    interleaved: bool = False,
) -> tuple[Any, Any, Any]:
    """Tokens of any rows: rotate them, write their keys and values into the caches, and attend over them.

    q [tokens, heads, dim], k, v [tokens, kv_heads, dim] float32; rotation: cosines and sines [tokens, pairs]; steps: positions, writes and
    rows [tokens], and how many of the tokens are real, int32; caches: keys and values [R, kv_heads, slots, dim], float32 or float16, or
    int8 [R, kv_heads, slots, dim + 4] with the scale of each at its end.
    Returns (context [tokens, heads, dim], keys, values); donated caches are written in place, all before any is read. A token sees the
    positions of its row up to its own, `window` of them at most. It has the same bits whatever other tokens there are.
    """
    tokens, heads, dim = q.shape
    positions, writes, rows, count = steps
    turned = () if rotation is None else rotation
    first = 3 + len(turned) + 4  # the place of the caches among the arguments
    shapes = [jax.ShapeDtypeStruct((tokens, heads, dim), np.float32)] + [jax.ShapeDtypeStruct(each.shape, each.dtype) for each in caches]
    call = jax.ffi.ffi_call("mesh_attention", shapes, input_output_aliases={first: 1, first + 1: 2})
    context, keys, values = call(
        q,
        k,
        v,
        *turned,
        positions,
        writes,
        rows,
        count.reshape(1),
        *caches,
        tokens=np.int64(tokens),
        heads=np.int64(heads),
        rotated_pairs=np.int64(0 if rotation is None else rotation[0].shape[-1]),
        interleaved=np.int64(interleaved),
        length=np.int64(length),
        window=np.int64(window or 0),
        scale=np.float32(scale),
        softcap=np.float32(softcap),
    )
    return context, keys, values


def likeliest(logits: Any, allowed: Any) -> Any:
    """logits [rows, vocabulary] float32, allowed [rows, ceil(vocabulary / 32)] int32 with a bit for each token, the lowest first -> the
    first of the likeliest allowed tokens of each row, int32 [rows]; 0 where no allowed token has more than -inf, the last token of the
    vocabulary where an allowed one has NaN."""
    rows, vocabulary = logits.shape
    call = jax.ffi.ffi_call("mesh_likeliest", jax.ShapeDtypeStruct((rows,), np.int32))
    return call(logits, allowed, rows=np.int64(rows), vocabulary=np.int64(vocabulary))
