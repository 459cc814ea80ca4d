"""Attention over a cache, block by block, against the formula."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.dtypes import INT8_SCALE
from mesh.kernels import calls
from mesh.kernels.library import kernels
from mesh.runtime import cache
from mesh.runtime.cache import SLACK, CacheView, attend

HEADS, GROUP, DIM, VALUE_DIM = 2, 3, 8, 4
LENGTH = 200


@pytest.fixture
def few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks small enough that a short cache has several of both sizes."""
    monkeypatch.setattr(cache, "COARSE", 64)
    monkeypatch.setattr(cache, "FINE", 16)


def by_formula(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, mask: np.ndarray, *, scale: float, softcap: float, sinks: np.ndarray | None = None
) -> np.ndarray:
    """In float64; mask bool [B, 1, T, L], sinks [B, H, T, 1]."""
    keys, values = (np.repeat(each.astype(np.float64), GROUP, axis=1) for each in (keys, values))
    scores = np.einsum("bhtd,bhld->bhtl", q.astype(np.float64), keys) * scale
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(mask, scores, -np.inf)
    if sinks is not None:
        scores = np.concatenate([scores, sinks], -1)
        values = np.concatenate([values, np.zeros_like(values[:, :, :1])], 2)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("bhtl,bhld->bhtd", weights / weights.sum(axis=-1, keepdims=True), values)


@settings(max_examples=30, deadline=None)
@given(
    positions=st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=3),
    chunk=st.sampled_from([0, 16]),
    window=st.sampled_from([None, 1, 30]),
    additive=st.booleans(),
    softcap=st.sampled_from([0.0, 2.0]),
    sunk=st.sampled_from([None, -40.0, 0.0, 40.0]),
    sizes=st.sampled_from([(64, 16), (1024, 128), (1024, 1024)]),
    seed=st.integers(0, 2**31),
)
def test_attention_in_blocks_is_attention(
    positions: list[int],
    chunk: int,
    window: int | None,
    additive: bool,
    softcap: float,
    sunk: float | None,
    sizes: tuple[int, int],
    seed: int,
) -> None:
    """Rows of any length side by side, or a chunk of one row. Positions that are masked hold the largest float. `sunk`: about what the
    sinks are, so far below the scores, among them, or far above."""
    rng = np.random.default_rng(seed)
    if chunk:
        first = min(positions[0], LENGTH - chunk)
        at = np.arange(first, first + chunk)[None]  # [1, T]
    else:
        at = np.array(positions)[:, None]  # [B, 1]
    batch, tokens = at.shape
    below, rows = 2, 2 + batch + 1
    slots = LENGTH + SLACK
    keys = rng.standard_normal((rows, HEADS, slots, DIM)).astype(np.float32)
    values = rng.standard_normal((rows, HEADS, slots, VALUE_DIM)).astype(np.float32)
    q = rng.standard_normal((batch, HEADS * GROUP, tokens, DIM)).astype(np.float32)
    slot = np.arange(LENGTH)
    mask = (slot <= at[..., None]) & (slot > at[..., None] - (window or slots))
    mask = mask[:, None]  # [B, 1, T, L]
    mine = slice(below, below + batch)
    sinks = None if sunk is None else np.float32(sunk) + rng.standard_normal((batch, HEADS * GROUP, tokens, 1)).astype(np.float32)
    expected = by_formula(q, keys[mine, :, :LENGTH], values[mine, :, :LENGTH], mask, scale=0.5, softcap=softcap, sinks=sinks)
    unseen = np.asarray(~mask.any(axis=(1, 2)))  # [B, L]
    for array in (keys, values):
        array[mine, :, :LENGTH][np.broadcast_to(unseen[:, None], (batch, HEADS, LENGTH))] = np.finfo(np.float32).max
    past_keys, past_values = (
        CacheView(jnp.asarray(array), jnp.int32(below), jnp.int32(at.max() + 1), batch, LENGTH) for array in (keys, values)
    )
    given_mask = np.where(mask, 0, np.finfo(np.float32).min).astype(np.float32) if additive else mask
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "COARSE", sizes[0])
        patch.setattr(cache, "FINE", sizes[1])
        column = None if sinks is None else jnp.asarray(sinks)
        got = attend(jnp.asarray(q), past_keys, past_values, jnp.asarray(given_mask), scale=0.5, softcap=softcap, sinks=column)
    np.testing.assert_allclose(np.asarray(got), expected, rtol=2e-5, atol=2e-5)


def test_a_longer_neighbour_changes_no_bit(few_slots: None) -> None:
    rng = np.random.default_rng(1)
    keys, values = (jnp.asarray(rng.standard_normal((2, HEADS, LENGTH + SLACK, DIM)), jnp.float32) for _ in range(2))
    q = jnp.asarray(rng.standard_normal((2, HEADS * GROUP, 1, DIM)), jnp.float32)

    def first(other: int) -> np.ndarray:
        at = np.array([70, other])
        past_keys, past_values = (CacheView(array, jnp.int32(0), jnp.int32(at.max() + 1), 2, LENGTH) for array in (keys, values))
        mask = jnp.asarray(np.arange(LENGTH)[None, None, None] <= at[:, None, None, None])
        return np.asarray(attend(q, past_keys, past_values, mask, scale=1.0, softcap=0.0))[0]

    for other in (3, 71, 128, 199):
        np.testing.assert_array_equal(first(other), first(70))


def test_a_cache_holds_finite_numbers_only() -> None:
    """A weight of 0 hides finite numbers only."""
    array = jnp.zeros((2, 1, 32 + SLACK, 3), jnp.float16)
    view = CacheView(array, jnp.int32(1), jnp.int32(1), 1, 32)
    for tokens in (1, 16):
        update = jnp.asarray(np.resize([np.nan, np.inf, -np.inf], (1, 1, tokens, 3)), jnp.float32)
        written = np.asarray(view.write(update, jnp.array([4])).array)
        most = np.finfo(np.float16).max
        np.testing.assert_array_equal(written[1, 0, 4 : 4 + tokens], np.resize([0, most, -most], (tokens, 3)))
        assert not written[0].any()


def test_a_cache_of_8_bits_holds_the_nearest_of_255_numbers() -> None:
    """Of each key: the largest number is 127 steps, and no number is more than half a step off."""
    array = jnp.zeros((2, HEADS, 32 + SLACK, DIM + INT8_SCALE), jnp.int8)
    view = CacheView(array, jnp.int32(1), jnp.int32(32), 1, 32)
    assert view.shape == (1, HEADS, 32, DIM)
    assert view.dtype == np.float32
    keys = np.random.default_rng(5).standard_normal((1, HEADS, 16, DIM)).astype(np.float32)
    keys[0, 0, 0] = 0
    keys[0, 0, 1] = np.resize([np.nan, np.inf, -np.inf, 1], DIM)
    keys[0, 0, 2] *= 1e-34
    expected = np.nan_to_num(keys)
    expected[0, 0, 2] = 0
    step = np.abs(expected).max(-1, keepdims=True) / 127
    for tokens in (16, 1):  # a prefill chunk, and a token of a decode step
        written = view.write(jnp.asarray(keys[:, :, :tokens]), jnp.array([4]))
        read = np.asarray(written.read(4, tokens))
        assert np.isfinite(read).all()
        assert (np.abs(read - expected[:, :, :tokens]) <= step[:, :, :tokens] * 0.50001).all()
        assert not np.asarray(written.array)[0].any()


@pytest.mark.skipif(kernels().name is None, reason=f"kernels: {kernels()}")
@pytest.mark.parametrize("dim", [16, 20, 64])
def test_the_kernels_write_the_same_8_bits(dim: int) -> None:
    rng = np.random.default_rng(dim)
    q, k, v = (
        jnp.asarray(rng.standard_normal((3, HEADS, dim)) * 10.0 ** rng.integers(-8, 8, (3, HEADS, 1)), jnp.float32) for _ in range(3)
    )
    empty = jnp.zeros((3, HEADS, 32 + SLACK, dim + INT8_SCALE), jnp.int8)
    at, rows = jnp.array([4, 0, 31], jnp.int32), jnp.arange(3, dtype=jnp.int32)
    _, *written = calls.attention(q, k, v, None, (at, at, rows, jnp.int32(3)), (empty, empty), length=32, scale=1.0)
    for array, new in zip(written, (k, v), strict=True):
        expected = CacheView(empty, jnp.int32(0), jnp.int32(32), 3, 32).write(new[:, :, None], at)
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected.array))
