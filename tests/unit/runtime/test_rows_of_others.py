"""A row that another session had gives the same tokens as a fresh one, whatever was left in it: nothing of one session reaches another."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams

CONTEXT, ROWS = 64, 3
PROMPT = [5, 17, 33, 90, 2]
PARAMS = {
    "greedy": SamplingParams(temperature=0.0),
    "penalties": SamplingParams(temperature=1.0, seed=7, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.5),
}


def left_by(pipeline: Pipeline, what: str) -> None:
    """Put something into every position of every row, and into the tokens that penalties look at."""
    rng = np.random.default_rng(1)

    def filled(array: jax.Array) -> jax.Array:
        if not jnp.issubdtype(array.dtype, jnp.floating):
            return jnp.asarray(rng.integers(0, 50, array.shape), array.dtype)
        limits = jnp.finfo(array.dtype)
        if what == "largest":
            return jnp.full_like(array, limits.max)
        if what == "smallest":
            return jnp.full_like(array, limits.min)
        return jnp.asarray(rng.standard_normal(array.shape) * 100, array.dtype)

    for stage in pipeline.stages:
        stage._caches = jax.tree.map(filled, stage._caches)
        stage._history = jax.tree.map(filled, stage._history)
        assert all(float(jnp.abs(array).max()) > 10 for array in jax.tree.leaves(stage._caches))


@pytest.mark.parametrize("params", PARAMS)
@pytest.mark.parametrize("shards", [1, 2])
def test_a_row_gives_the_tokens_of_a_fresh_one_whatever_was_in_it(model: Path, params: str, shards: int) -> None:
    chosen = PARAMS[params]
    expected = Pipeline.load(model, shards=shards, rows=ROWS, context=CONTEXT, chunk=16).complete(PROMPT, chosen, max_tokens=40).ids
    used = Pipeline.load(model, shards=shards, rows=ROWS, context=CONTEXT, chunk=16)
    secret = [int(token) for token in np.random.default_rng(0).integers(1, 90, 40)]
    used.complete(secret, SamplingParams(temperature=1.0, seed=3), max_tokens=20)  # another session, longer than this one
    assert used.complete(PROMPT, chosen, max_tokens=40).ids == expected
    for what in ("largest", "smallest", "random"):
        left_by(used, what)
        assert used.complete(PROMPT, chosen, max_tokens=40).ids == expected, what
