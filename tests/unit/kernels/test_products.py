"""The kernels give what XLA's own forms give, for every kind of weight and odd shapes, and a row the same bits in any company."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.kernels import calls
from mesh.kernels.library import kernels
from mesh.lowering import linear
from mesh.lowering.linear import Codes, Factors

pytestmark = pytest.mark.skipif(kernels().name is None, reason=f"kernels: {kernels()}")

KINDS = (
    "float32", "float16", "bfloat16", "int8", "int8 groups", "int8 zero", "uint8 minimum",
    "4 bits", "4 bits minimum", "4 bits zero", "4 bits steps", "5 bits", "5 bits minimum", "5 bits steps", "6 bits steps",
)  # fmt: skip


def weight(kind: str, out: int, depth: int, group: int, seed: int) -> Codes:
    """Random codes of a kind; `depth` fits it."""
    rng = np.random.default_rng(seed)
    if kind in ("float32", "float16", "bfloat16"):
        return Codes(jnp.asarray(rng.standard_normal((out, depth)), kind))
    groups = -(-depth // group)

    def halves(*shape: int) -> Any:
        return jnp.asarray(rng.standard_normal(shape), np.float16)

    steps = {"4 bits steps": 8, "5 bits steps": 8, "6 bits steps": 16}.get(kind)
    if steps:
        sub = [jnp.asarray(rng.integers(0, 64, (out, groups)), np.uint8) for _ in range(2)]
        scale, minimum = (Factors(each, halves(out, groups // steps)) for each in sub)
    else:
        scale, minimum = Factors(halves(out, groups)), Factors(halves(out, groups))
    bits = 0 if "int8" in kind else int(kind[0])
    if not bits:
        kind_, zero = kind.partition(" ")[::2]
        codes = jnp.asarray(rng.integers(-128, 128, (out, depth)), np.int8).astype(kind_)
        if not zero:
            return Codes(codes, scale=Factors(halves(out)), dtype=np.dtype(np.float32))
        return Codes(
            codes,
            scale=scale,
            zero_point=Factors(jnp.asarray(rng.integers(-9, 9, (out, groups)), np.int8)) if zero == "zero" else None,
            minimum=minimum if zero == "minimum" else None,
            dtype=np.dtype(np.float32),
            group=group,
        )
    high = {4: 0, 5: depth // 8, 6: depth // 4}[bits]
    return Codes(
        jnp.asarray(rng.integers(0, 256, (out, depth // 2)), np.uint8),
        scale=scale,
        zero_point=Factors(jnp.asarray(rng.integers(0, 16, (out, groups)), np.uint8)) if kind.endswith("zero") else None,
        minimum=minimum if kind.endswith("minimum") or (bits < 6 and steps) else None,
        high=jnp.asarray(rng.integers(0, 256, (out, high)), np.uint8) if high else None,
        dtype=np.dtype(np.float32),
        group=group,
        bits=bits,
        offset=0 if minimum is not None and kind.endswith("minimum") else 1 << (bits - 1),
    )


def fitting(kind: str, size: int) -> int:
    """The length nearest to `size` that a weight of this kind may have."""
    unit = 256 if kind.endswith("steps") else 1 if kind.startswith(("int", "uint", "float", "bfloat")) else 32
    return -(-size // unit) * unit


def numbers(codes: Codes) -> np.ndarray:
    """What the codes stand for [out, in], in double precision: numpy's own reading of the layout."""
    out, depth = codes.shape
    data = np.asarray(codes.data)
    if codes.bits:
        blocks = data.reshape(out, -1, 16)
        data = np.concatenate([blocks & 15, blocks >> 4], axis=2).reshape(out, depth)
    if codes.bits == 5:
        data = data + 16 * np.unpackbits(np.asarray(codes.high), axis=1, bitorder="little")
    if codes.bits == 6:
        upper = np.asarray(codes.high).reshape(out, -1, 1, 16)
        data = data + 16 * np.concatenate([upper >> shift & 3 for shift in (0, 2, 4, 6)], axis=2).reshape(out, depth)
    values = data.astype(np.float64) - codes.offset

    def spread(factors: Factors | None) -> Any:
        if factors is None:
            return 0.0
        each = np.asarray(factors.data).astype(np.float64)
        if factors.step is not None:
            step = np.asarray(factors.step).astype(np.float64)
            each = each * np.repeat(step, each.shape[1] // step.shape[1], axis=1)
        return np.repeat(each, codes.group, axis=1)[:, :depth] if codes.group else each.reshape(-1, 1)

    values = values - spread(codes.zero_point)
    return values * (1.0 if codes.scale is None else spread(codes.scale)) - spread(codes.minimum)


_product = jax.jit(lambda x, w, variant: linear.product(x, w, variant=variant), static_argnames="variant")


def multiplied(x: Any, codes: Codes, variant: str = "kernel") -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        return np.asarray(_product(x, codes, variant=variant))


@pytest.mark.skipif(not kernels().reads_tiles, reason="the kernels of this processor read no tiles")
@pytest.mark.parametrize(
    "kind", ["4 bits", "4 bits minimum", "4 bits zero", "4 bits steps", "6 bits steps", "int8", "int8 groups", "int8 zero"]
)
def test_tiles_are_the_same_weight(kind: str) -> None:
    codes = weight(kind, 48, -(-fitting(kind, 96) // 32) * 32, 16 if kind[0] == "6" else 32, 7)
    x = np.random.default_rng(8).standard_normal((5, codes.shape[1])).astype(np.float32)
    tiles = codes.in_tiles()
    assert tiles.kernel_kind == f"tiles of {codes.bits or 8} bits"
    assert tiles.shape == codes.shape
    np.testing.assert_array_equal(tiles.widened(np.float32), codes.widened(np.float32))
    np.testing.assert_array_equal(multiplied(x, tiles, "dot"), multiplied(x, codes, "dot"))
    exact = multiplied(x, codes)
    among = multiplied(x, tiles)
    np.testing.assert_allclose(among, exact, rtol=0, atol=2e-6 * np.abs(x).max() * np.abs(numbers(codes)).sum(axis=1).max())
    for rows in (1, 2, 3, 4):
        np.testing.assert_array_equal(multiplied(x[:rows], tiles), among[:rows])


@settings(max_examples=3, deadline=None)
@given(st.integers(1, 70), st.integers(1, 300), st.sampled_from((16, 32, 128)), st.integers(1, 40), st.integers(0, 99))
@pytest.mark.parametrize("kind", KINDS)
def test_a_product_is_that_of_the_widened_weight(kind: str, out: int, size: int, group: int, rows: int, seed: int) -> None:
    depth = fitting(kind, size)
    group = {"6 bits steps": 16}.get(kind, 32 if kind.endswith("steps") else group)
    codes = weight(kind, out, depth, group, seed)
    assert linear.in_kernel(np.float32, codes)
    x = np.random.default_rng(seed).standard_normal((rows, depth)).astype(np.float32)
    wide = numbers(codes)
    bound = np.abs(x).astype(np.float64) @ np.abs(wide).T
    assert np.all(np.abs(multiplied(x, codes) - x.astype(np.float64) @ wide.T) <= 2e-6 * bound + 1e-30)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_has_the_same_bits_alone_and_among_others(kind: str) -> None:
    codes = weight(kind, 67, fitting(kind, 512), 16 if kind.startswith("6") else 32, 1)
    x = np.random.default_rng(2).standard_normal((33, codes.shape[1])).astype(np.float32)
    alone = np.concatenate([multiplied(x[row : row + 1], codes) for row in (0, 1, 15, 31, 32)])
    for rows in (2, 4, 7, 32, 33):
        among = multiplied(x[:rows], codes)
        for row, expected in zip((0, 1, 15, 31, 32), alone, strict=True):
            if row < rows:
                np.testing.assert_array_equal(among[row], expected)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind[0] in "456"])
@pytest.mark.parametrize("variant", ["dot", "rows", "stream"])
def test_the_forms_without_kernels_read_the_same_codes(kind: str, variant: str) -> None:
    codes = weight(kind, 64, fitting(kind, 256), 16 if kind.startswith("6") else 32, 3)
    x = np.random.default_rng(4).standard_normal((3, codes.shape[1])).astype(np.float32)
    exact = multiplied(x, codes)
    np.testing.assert_allclose(multiplied(x, codes, variant), exact, rtol=1e-4, atol=1e-5 * np.abs(exact).max())


@pytest.mark.parametrize("before", ["nothing", "norm", "silu", "gelu_tanh"])
@pytest.mark.parametrize(("rows", "depth"), [(1, 64), (9, 50)])
def test_what_comes_before_and_after_a_product(before: str, rows: int, depth: int) -> None:
    rng = np.random.default_rng(5)
    x, up, residual = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, depth), (rows, depth), (rows, 20)))
    scale, w, bias = (rng.standard_normal(shape).astype(np.float32) for shape in (depth, (20, depth), 20))
    first: Any = None
    expected: Any = x
    if before == "norm":
        first, expected = calls.InputNorm(scale, 1e-5), x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale
    elif before == "silu":
        first, expected = calls.Gated("silu", up), jax.nn.silu(x) * up
    elif before == "gelu_tanh":
        first, expected = calls.Gated("gelu_tanh", up), jax.nn.gelu(x, approximate=True) * up
    described = calls.KernelWeight("float32", (20, depth), w, bias=bias)
    (got,) = jax.jit(lambda x: calls.products(x, [described], before=first, residual=residual))(x)
    np.testing.assert_allclose(got, np.asarray(expected) @ w.T + bias + residual, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("before", ["nothing", "norm", "silu"])
@pytest.mark.parametrize(("kind", "depth"), [("bfloat16", 96), ("bfloat16", 50), ("int8", 96), ("float32", 33)])
def test_inputs_are_rounded_to_bfloat16(kind: str, depth: int, before: str) -> None:
    """Whatever multiplies them: a row has the same bits in any company, and what is not a number stays so."""
    rng = np.random.default_rng(9)
    codes = weight(kind, 37, depth, 32, 10)
    x, up = (rng.standard_normal((33, depth)).astype(np.float32) for _ in range(2))
    first = {"nothing": None, "norm": calls.InputNorm(np.ones(depth, np.float32), 1e-5), "silu": calls.Gated("silu", up)}[before]

    def products(rows: int) -> np.ndarray:
        given = calls.Gated("silu", up[:rows]) if before == "silu" else first
        call = jax.jit(lambda x: calls.products(x, [codes.for_kernels()], before=given, rounds=True))
        return np.asarray(call(x[:rows])[0])

    identity = calls.KernelWeight("float32", (depth, depth), np.eye(depth, dtype=np.float32))
    (given,) = jax.jit(lambda x: calls.products(x, [identity], before=first))(x)
    rounded = np.asarray(given).astype(jnp.bfloat16).astype(np.float64)
    assert np.abs(rounded - np.asarray(given)).max() > 1e-4
    wide = numbers(codes)
    among = products(33)
    assert np.all(np.abs(among - rounded @ wide.T) <= 2e-6 * (np.abs(rounded) @ np.abs(wide).T) + 1e-30)
    for rows in (1, 2, 3, 7, 17, 32):
        np.testing.assert_array_equal(products(rows), among[:rows])
    x[5, 3] = np.nan
    assert np.isnan(products(33)[5]).all() and np.isfinite(np.delete(products(33), 5, axis=0)).all()


def test_several_weights_of_one_input() -> None:
    x = np.random.default_rng(6).standard_normal((3, 256)).astype(np.float32)
    several = [
        weight(kind, 30 + 7 * place, 256, 16 if kind[0] == "6" else 32, place)
        for place, kind in enumerate(("4 bits", "6 bits steps", "int8"))
    ]
    together = jax.jit(lambda x: calls.products(x, [codes.for_kernels() for codes in several]))(x)
    for got, codes in zip(together, several, strict=True):
        np.testing.assert_array_equal(got, multiplied(x, codes))


def test_a_call_that_is_described_wrongly_is_refused() -> None:
    w = calls.KernelWeight(
        "4 bits", (8, 64), np.zeros((8, 16), np.uint8), group=32, scale=calls.KernelFactors(np.zeros((8, 2), np.float32))
    )
    with pytest.raises(Exception, match="has 128 elements where 256 are needed"):
        jax.jit(lambda x: calls.products(x, [w]))(np.zeros((1, 64), np.float32))[0].block_until_ready()
