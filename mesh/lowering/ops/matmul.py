"""Matrix products."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from mesh.lowering.op_helpers import Array
from mesh.lowering.registry import register


@register()
def MatMul(A: Array, B: Array) -> Array:
    return jnp.matmul(A, B)


@register(since=7)
def Gemm(A: Array, B: Array, C: Array | None = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0, transB: int = 0) -> Array:
    product = jnp.matmul(A.T if transA else A, B.T if transB else B)
    if alpha != 1:
        product = _scaled(product, alpha)
    if C is None or beta == 0:
        return product
    return product + (C if beta == 1 else _scaled(C, beta))


def _scaled(x: Array, factor: float) -> Array:
    return (x * factor).astype(x.dtype)


@register()
def Einsum(*Inputs: Array, equation: str) -> Array:
    return jnp.einsum(equation.replace(" ", ""), *Inputs)


@register()
def MatMulInteger(A: Array, B: Array, a_zero_point: Array | None = None, b_zero_point: Array | None = None) -> Array:
    """8-bit integers to int32. a_zero_point: scalar or [M]; b_zero_point: scalar or [N]."""
    a, b = A.astype(np.int32), B.astype(np.int32)
    if a_zero_point is not None:
        zero = a_zero_point.astype(np.int32)
        a = a - (zero[:, None] if zero.ndim == 1 and zero.size > 1 else zero)
    if b_zero_point is not None:
        b = b - b_zero_point.astype(np.int32)
    return jnp.matmul(a, b)


@register()
def Det(X: Array) -> Array:
    return jnp.linalg.det(X)
