"""Stages of a model whose layers carry states alone: no layer has keys and values, and every token is transformers' own."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import logits_of, make_model

from mesh.importer.run import import_model
from mesh.model.manifest import Manifest
from mesh.model.memory import predict
from mesh.runtime.programs import Compiled
from mesh.runtime.row_states import EVERY
from mesh.runtime.sampling import SamplingParams
from mesh.runtime.stage import Stage, StageConfig
from mesh.types import LayerRange

CONTEXT, PROMPT, STEPS = EVERY + 64, EVERY + 24, 8
MODEL: dict[str, Any] = {
    **{"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8},
    **{"pad_token_id": None, "chunk_size": 16},
}
TOKENS = np.random.default_rng(2).integers(0, 96, PROMPT + STEPS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """The imported model, and the token that transformers finds likeliest at each position of TOKENS."""
    folder = tmp_path_factory.mktemp("mamba2")
    model = make_model("Mamba2", MODEL, folder / "source")
    report = import_model(folder / "source", folder / "model").report
    assert report["source_error"] < 1e-4 and report["source_greedy_equal"] == 1.0 and report["late_positions"] == [EVERY + 56]
    return folder / "model", logits_of(model, TOKENS.tolist()).argmax(-1)


@pytest.mark.parametrize("cuts", [(), (1,), (1, 2)])
def test_the_tokens_are_those_of_transformers_past_a_checkpoint_and_after_a_replay(
    made: tuple[Path, np.ndarray], cuts: tuple[int, ...]
) -> None:
    directory, wanted = made
    compiled: Compiled = {}
    bounds = (0, *cuts, 3)
    stages = [
        Stage.load(directory, StageConfig(LayerRange(a, b), head=b == 3, rows=2, context=CONTEXT, chunk=64), compiled=compiled)
        for a, b in pairwise(bounds)
    ]
    stages[-1].open(1, SamplingParams(temperature=0.0), prompt_length=PROMPT)

    def prefill(start: int, stop: int) -> int:
        result: Any = None
        for stage in stages:
            result = stage.prefill(1, start, TOKENS[start:stop], result)
        return int(result.id)

    def decode(at: int) -> int:
        hidden: Any = None
        for stage in stages:
            hidden = stage.decode(np.array([1]), np.array([at]), TOKENS[at : at + 1], hidden)
        (token,) = hidden
        return int(token.id)

    assert [prefill(0, PROMPT), *map(decode, range(PROMPT, PROMPT + STEPS))] == wanted[PROMPT - 1 :].tolist()
    assert [prefill(EVERY, PROMPT), *map(decode, range(PROMPT, PROMPT + STEPS))] == wanted[PROMPT - 1 :].tolist()


def test_a_row_takes_its_states_alone(made: tuple[Path, np.ndarray]) -> None:
    manifest = Manifest.load(made[0])
    assert not any(layer.attends for layer in manifest.cache) and manifest.has_states
    few, many = (predict(manifest, LayerRange(0, 3), embed=True, head=True, rows=1, context=context) for context in (64, CONTEXT))
    assert few.cache_bytes == many.cache_bytes == 6 * sum(state.bytes for layer in manifest.cache for state in layer.states)
