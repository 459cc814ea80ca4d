"""The sampler against plain numpy readings of the definitions it names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.errors import BadRequest
from mesh.runtime.sampling import MAX_LOGPROBS, RowTable, Sampled, SamplingParams, _filter, sample

VOCAB = 50
SLOTS = 24
FILTER = jax.jit(_filter)
SAMPLE = jax.jit(sample)


def run(
    logits: np.ndarray,
    params: Sequence[SamplingParams],
    history: np.ndarray | None = None,
    positions: np.ndarray | None = None,
    prompt_lengths: Sequence[int] | None = None,
) -> Sampled:
    batch = len(logits)
    table = RowTable(batch)
    for row, each in enumerate(params):
        table.set(row, each, prompt_length=(prompt_lengths or [0] * batch)[row])
    history = np.zeros((batch, SLOTS), np.int32) if history is None else history
    positions = np.zeros(batch, np.int32) if positions is None else positions
    return SAMPLE(jnp.asarray(logits), table.floats, table.ints, history, positions)


def random_logits(batch: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((batch, VOCAB)) * 3).astype(np.float32)


def test_temperature_zero_is_the_likeliest_token() -> None:
    logits = random_logits(5)
    sampled = run(logits, [SamplingParams(temperature=0)] * 5)
    assert np.array_equal(sampled.tokens, logits.argmax(-1))


def kept(scaled: np.ndarray, top_k: int, top_p: float | np.floating, min_p: float) -> np.ndarray:
    """Which tokens a row may draw, by sorting."""
    weights = np.exp(scaled.astype(np.float64) - scaled.max())
    order = np.argsort(-weights)
    if top_k:
        weights[order[min(top_k, len(order)) :]] = 0
    if top_p < 1:
        mass = np.cumsum(weights[order]) / weights.sum()
        weights[order[np.searchsorted(mass, top_p) + 1 :]] = 0
    weights[weights < min_p] = 0
    return weights > 0


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.integers(0, VOCAB + 5), st.floats(0.05, 1.0), st.sampled_from([0.0, 0.02, 0.2, 1.0]))
def test_filters_keep_what_sorting_keeps(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    logits = random_logits(1, seed)
    column = [np.array([[value]]) for value in (np.int32(top_k), np.float32(top_p), np.float32(min_p))]
    ours = np.isfinite(np.asarray(FILTER(logits, *column)))[0]
    assert np.array_equal(ours, kept(logits[0], top_k, np.float32(top_p), min_p))


def test_draws_follow_the_distribution() -> None:
    logits = np.tile(np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32)), (4000, 1))
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(4000)]
    tokens = np.asarray(run(logits, params).tokens)
    shares = np.bincount(tokens, minlength=4) / len(tokens)
    assert np.allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)


def test_a_row_draws_the_same_token_in_any_company() -> None:
    logits = random_logits(8, 3)
    params = [SamplingParams(temperature=0.9, top_k=7 * (row % 2), top_p=0.9, seed=row + 2**40) for row in range(8)]
    positions = np.arange(8, dtype=np.int32)
    together = np.asarray(run(logits, params, positions=positions).tokens)
    for row in range(8):
        alone = run(logits[row : row + 1], params[row : row + 1], positions=positions[row : row + 1])
        assert alone.tokens[0] == together[row]


def test_seed_and_position_each_change_the_draw() -> None:
    logits = np.zeros((1, VOCAB), np.float32)
    by_seed = {int(run(logits, [SamplingParams(temperature=1.0, seed=seed)]).tokens[0]) for seed in (0, 1, 2, 2**32, 2**33, 2**62)}
    by_position = {int(run(logits, [SamplingParams(temperature=1.0)], positions=np.array([p], np.int32)).tokens[0]) for p in range(6)}
    assert len(by_seed) > 2
    assert len(by_position) > 2


def test_penalties_are_those_of_their_definitions() -> None:
    logits = random_logits(1, 5)
    history = np.zeros((1, SLOTS), np.int32)
    history[0, :7] = [3, 4, 4, 9, 9, 9, 11]  # two prompt tokens, then output; what is after the position does not count
    history[0, 7:] = 20
    params = SamplingParams(temperature=0, repetition_penalty=1.3, presence_penalty=0.7, frequency_penalty=0.4)
    want = logits[0].copy()
    for token in (3, 4, 9, 11):
        want[token] = want[token] / 1.3 if want[token] > 0 else want[token] * 1.3
    for token, count in ((4, 1), (9, 3), (11, 1)):
        want[token] -= 0.4 * count + 0.7
    for lift in range(VOCAB):  # every token's own penalised score decides once
        raised = logits.copy()
        raised[0, lift] += 6.0
        expected = want.copy()
        if lift in (3, 4, 9, 11):
            base = raised[0, lift]
            expected[lift] = base / 1.3 if base > 0 else base * 1.3
            expected[lift] -= {4: 1.1, 9: 1.9, 11: 1.1}.get(lift, 0.0)
        else:
            expected[lift] = raised[0, lift]
        sampled = run(raised, [params], history, np.array([6], np.int32), [2])
        assert int(sampled.tokens[0]) == int(expected.argmax())


def test_logprobs_are_the_models_own() -> None:
    logits = random_logits(2, 6)
    sampled = run(logits, [SamplingParams(temperature=0, logprobs=4), SamplingParams(temperature=0)])
    reference = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert np.allclose(sampled.logprob[0], reference[0].max(), atol=1e-5)
    order = np.argsort(-reference[0])[:MAX_LOGPROBS]
    assert np.array_equal(sampled.top_tokens[0], order)
    assert np.allclose(sampled.top_logprobs[0], reference[0][order], atol=1e-5)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1), ("top_p", 0), ("top_p", 1.5), ("min_p", 2), ("top_k", -1), ("top_k", 1.5), ("seed", -1), ("seed", 2**63)]
    + [("repetition_penalty", 0), ("temperature", float("nan")), ("logprobs", MAX_LOGPROBS + 1), ("presence_penalty", True)],
)
def test_a_parameter_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(BadRequest, match=field) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
