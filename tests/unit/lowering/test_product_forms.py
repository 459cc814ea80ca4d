"""Every variant of a product is the product, and how a weight is cut into parts."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh.kernels.library import kernels
from mesh.lowering import linear
from mesh.lowering.linear import Codes

only_with_kernels = pytest.mark.skipif(kernels().name is None, reason=f"kernels: {kernels()}")
VARIANTS = [pytest.param(each, marks=only_with_kernels if each == "kernel" else ()) for each in linear.VARIANTS]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("shape", [(1536, 192), (1031, 130), (96, 64)])  # parts, no parts as it is a prime, too small for parts
def test_every_form_is_the_product(variant: str, rows: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    weight, x = (rng.standard_normal(dims).astype(np.float32) for dims in (shape, (rows, shape[1])))
    with jax.default_matmul_precision("highest"):
        got = jax.jit(lambda x, w: linear.product(x, Codes(w), variant=variant))(x, jnp.asarray(weight))
    np.testing.assert_allclose(got, x.astype(np.float64) @ weight.T.astype(np.float64), rtol=1e-4, atol=1e-4)


def test_one_row_of_a_large_weight_is_read_in_parts() -> None:
    weight = Codes(jnp.ones((4096, 512)))
    compiled = jax.jit(lambda x, w: linear.product(x, w, variant=linear.default_variant(1, w))).lower(jnp.ones((1, 512)), weight).compile()
    text = compiled.as_text()
    assert text is not None
    assert "f32[4096,512]" in text  # as it was given
    assert "lhs_batch_dims={0}" in text
    assert " copy(" not in text


def test_a_weight_that_nothing_divides_is_one_part() -> None:
    assert linear.parts(1031, 8 << 20, 2) == 1
    assert linear.parts(50257, 147 << 20, 2) == 29  # larger ones than wanted are better than none


@pytest.mark.parametrize("cores", [1, 2, 6, 64])
@pytest.mark.parametrize(("out", "size"), [(49152, 108 << 20), (3072, 7 << 20), (576, 1 << 20), (960, 2 << 20), (64, 1 << 14)])
def test_parts_are_equal_and_neither_tiny_nor_huge(cores: int, out: int, size: int) -> None:
    parts = linear.parts(out, size, cores)
    assert out % parts == 0
    assert parts == 1 or size // parts >= 64 << 10
    assert size // parts <= 512 << 10
    assert parts >= min(cores, size // (128 << 10))
