"""A row may begin with a copy of another one: its tokens are those of a row that computed everything itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mesh.errors import BadRequest, PromptTooLong
from mesh.importer.run import import_model
from mesh.runtime.recompute import RecomputingStage
from mesh.runtime.sampling import SamplingParams
from mesh.runtime.stage import Stage, StageConfig
from mesh.types import LayerRange

ROWS, CONTEXT, CHUNK = 4, 96, 64
RANGES = (LayerRange(0, 2), LayerRange(2, 5))
PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0, seed=7, repetition_penalty=1.3, presence_penalty=0.5),
)


@pytest.fixture(scope="module")
def packing(tmp_path_factory: pytest.TempPathFactory, new_llama: Callable[..., Path]) -> Path:
    """A model whose heads the kernels take; that of `llama` has smaller ones."""
    directory = tmp_path_factory.mktemp("copies")
    import_model(new_llama(directory / "source", dim=16, hidden=96), directory / "model")
    return directory / "model"


def run(stages: list[Any], row: int, start: int, tokens: list[int]) -> int:
    """A part of the row's history through all stages: the token after it."""
    hidden, step = None, np.array(tokens, np.int32)
    for stage in stages:
        hidden = stage.prefill(row, start, step, hidden)
    assert hidden is not None
    return int(hidden.id)


def generate(stages: list[Any], row: int, prompt: list[int], params: SamplingParams, *, start: int = 0, count: int = 6) -> list[int]:
    stages[-1].open(row, params, prompt_length=len(prompt))
    tokens = [run(stages, row, start, prompt[start:])]
    while len(tokens) < count:
        tokens.append(run(stages, row, len(prompt) + len(tokens) - 1, tokens[-1:]))
    return tokens


@pytest.mark.parametrize(("model", "kind"), [("packing", Stage), ("llama", Stage), ("packing", RecomputingStage)])
def test_a_row_goes_on_after_a_copied_beginning(
    model: str, kind: type[Stage] | type[RecomputingStage], request: pytest.FixtureRequest
) -> None:
    """The row that is copied stays as it is, and what the target held before is gone. Row 0 computes everything itself."""
    directory = request.getfixturevalue(model)
    stages: list[Any] = [kind.load(directory, StageConfig(layers, rows=ROWS, context=CONTEXT, chunk=CHUNK)) for layers in RANGES]
    rng = np.random.default_rng(3)
    first, other = ([int(token) for token in rng.integers(0, 131, size)] for size in (40, 70))
    for params in PARAMS:
        generate(stages, 3, other, params)
        answer = generate(stages, 1, first, params)
        assert answer == generate(stages, 0, first, params)
        for positions in (32, 17, 1):
            for stage in stages:
                stage.copy(1, 3, positions)
            prompt = first[:positions] + other[: 50 - positions]
            assert generate(stages, 3, prompt, params, start=positions) == generate(stages, 0, prompt, params)
        going_on = [*first, *answer, 5, 6, 7]
        assert generate(stages, 1, going_on, params, start=len(first) + 3) == generate(stages, 0, going_on, params)


def test_copies_are_compiled_with_the_rest_and_refuse_what_is_not_there(llama: Path) -> None:
    stage = Stage.load(llama, StageConfig(LayerRange(0, 2), rows=2, context=CONTEXT, chunk=16))
    stage.warm_up()
    compiled = stage.compiled
    stage.copy(0, 1, CONTEXT)
    stage.copy(1, 1, 3)
    assert stage.compiled == compiled
    with pytest.raises(BadRequest):
        stage.copy(0, 2, 4)
    with pytest.raises(PromptTooLong):
        stage.copy(0, 1, CONTEXT + 1)
