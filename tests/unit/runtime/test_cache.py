"""Attention over a cache, block by block, against the formula."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
