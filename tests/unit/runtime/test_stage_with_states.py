"""Stages of a model whose layers carry states: padding, neighbours, repeated steps and replays leave no trace in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import logits_of, make_model

from mesh.errors import BadRequest
from mesh.importer.run import import_model
from mesh.model.manifest import Manifest
from mesh.model.memory import predict
from mesh.runtime.programs import Compiled
from mesh.runtime.recompute import RecomputingStage
from mesh.runtime.row_states import EVERY
from mesh.runtime.sampling import SamplingParams
from mesh.runtime.segments import Segments
from mesh.runtime.stage import Stage, StageConfig
from mesh.types import LayerRange

CONTEXT, ROWS = 2 * EVERY + 64, 3
MODEL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "layer_types": ["conv", "full_attention", "conv"],
    "pad_token_id": None,
}
Whole = tuple[np.ndarray, np.ndarray]
TOKENS = np.random.default_rng(2).integers(0, 96, CONTEXT)
OTHERS = np.random.default_rng(3).integers(0, 96, CONTEXT)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("states")
    model = make_model("Lfm2", MODEL, folder / "source")
    report = import_model(folder / "source", folder / "model").report
    assert report["oracle"] == "onnxruntime" and report["source_error"] < 1e-4 and report["source_greedy_equal"] == 1.0
    return folder / "model", model


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return {}


@pytest.fixture
def stage(made: tuple[Path, Any], compiled: Compiled) -> Stage:
    """All layers without the head, so that a step's result is its hidden state."""
    return Stage.load(made[0], StageConfig(LayerRange(0, 3), head=False, rows=ROWS, context=CONTEXT, chunk=64), compiled=compiled)


@pytest.fixture(scope="module")
def whole(made: tuple[Path, Any], compiled: Compiled) -> Whole:
    """The hidden states of TOKENS and of OTHERS, each in a row of its own from its beginning to its end."""
    stage = Stage.load(made[0], StageConfig(LayerRange(0, 3), head=False, rows=ROWS, context=CONTEXT, chunk=64), compiled=compiled)
    return np.asarray(stage.prefill(0, 0, TOKENS)), np.asarray(stage.prefill(1, 0, OTHERS))


def same(got: Any, want: np.ndarray) -> bool:
    return bool(np.allclose(np.asarray(got), want, rtol=1e-4, atol=1e-4))


def test_the_likeliest_token_at_every_position_is_that_of_transformers(made: tuple[Path, Any], compiled: Compiled) -> None:
    directory, model = made
    stage = Stage.load(directory, StageConfig(LayerRange(0, 3), rows=1, context=CONTEXT, chunk=64), compiled=compiled)
    stage.open(0, SamplingParams(temperature=0.0), prompt_length=1)
    wanted = logits_of(model, TOKENS[:40].tolist()).argmax(-1)
    first: Any = stage.prefill(0, 0, TOKENS[:9])
    got = [int(first.id)]
    for at in range(9, 40):
        (token,) = stage.decode(np.array([0]), np.array([at]), TOKENS[at : at + 1])
        got.append(int(token.id))
    assert got == wanted[8:].tolist()


@pytest.mark.parametrize("length", [1, 2, 3, 5, 15, 17, 63, 64, 65, 107])
def test_a_chunk_of_any_length_leaves_the_states_of_its_tokens_alone(stage: Stage, whole: Whole, length: int) -> None:
    """A program's size is no length of a chunk: padding would be in the states of what follows."""
    assert same(stage.prefill(0, 0, TOKENS[:length]), whole[0][:length])
    assert same(stage.prefill(0, length, TOKENS[length : length + 7]), whole[0][length : length + 7])


def test_rows_beside_each_other_do_not_touch(stage: Stage, whole: Whole) -> None:
    stage.prefill(0, 0, TOKENS[:20])
    stage.prefill(2, 0, OTHERS[:31])
    for step in range(6):  # row 1, between them, has no session
        got = np.asarray(stage.decode(np.array([0, 2]), np.array([20 + step, 31 + step]), np.array([TOKENS[20 + step], OTHERS[31 + step]])))
        assert same(got[0], whole[0][20 + step]) and same(got[1], whole[1][31 + step])
    packed = stage.packed(Segments([2, 1, 0], [37, 0, 26], [4, 9, 1], [True] * 3), np.r_[OTHERS[37:41], TOKENS[:9], TOKENS[26:27]])
    assert same(packed, np.r_[whole[1][37:41], whole[0][:9], whole[0][26:27]])


def test_a_repeated_step_gives_the_same_and_is_harmless(stage: Stage, whole: Whole) -> None:
    one = np.array([0])
    stage.prefill(0, 0, TOKENS[:30])
    first = np.asarray(stage.decode(one, np.array([30]), TOKENS[30:31]))
    assert np.array_equal(np.asarray(stage.decode(one, np.array([30]), TOKENS[30:31])), first)
    assert same(stage.decode(one, np.array([31]), TOKENS[31:32]), whole[0][31:32])
    stage.prefill(0, 32, TOKENS[32:50])
    assert same(stage.prefill(0, 32, TOKENS[32:50]), whole[0][32:50])
    assert same(stage.decode(one, np.array([50]), TOKENS[50:51]), whole[0][50:51])


def test_a_replay_goes_on_from_a_checkpoint(stage: Stage, whole: Whole) -> None:
    """Also where the tokens after it are others than those that were there: nothing of those stays."""
    stage.prefill(0, 0, OTHERS[:1])
    stage.prefill(0, 0, np.r_[TOKENS[: 2 * EVERY], OTHERS[:30]])
    assert same(stage.prefill(0, 2 * EVERY, TOKENS[2 * EVERY :]), whole[0][2 * EVERY :])
    assert same(stage.prefill(0, EVERY, TOKENS[EVERY:]), whole[0][EVERY:])


def test_a_row_of_another_session_begins_with_zeros(stage: Stage, whole: Whole) -> None:
    stage.prefill(0, 0, OTHERS[:100])
    assert same(stage.decode(np.array([0]), np.array([0]), TOKENS[:1]), whole[0][:1])
    assert same(stage.prefill(0, 1, TOKENS[1:40]), whole[0][1:40])


def test_a_step_that_begins_where_no_states_stand_is_refused_and_changes_nothing(stage: Stage, whole: Whole) -> None:
    stage.prefill(0, 0, TOKENS[:50])
    stage.prefill(1, 0, OTHERS[:50])
    with pytest.raises(BadRequest, match=r"row 0 has no states at position 49: begin at one of \(0,\)"):
        stage.prefill(0, 49, TOKENS[49:60])
    with pytest.raises(BadRequest, match=r"row 1 has no states at position 51"):
        stage.decode(np.array([0, 1]), np.array([50, 51]), np.array([TOKENS[50], OTHERS[51]]))
    with pytest.raises(BadRequest, match="no row begins with a part of another"):
        stage.copy(0, 1, 16)
    got = np.asarray(stage.decode(np.array([0, 1]), np.array([50, 50]), np.array([TOKENS[50], OTHERS[50]])))
    assert same(got[0], whole[0][50]) and same(got[1], whole[1][50])


def test_nothing_compiles_after_the_warm_up(made: tuple[Path, Any]) -> None:
    stage = Stage.load(made[0], StageConfig(LayerRange(0, 3), rows=2, context=80, chunk=32))
    stage.warm_up()
    stage.exercise()
    before = stage.compiled
    stage.open(1, SamplingParams(temperature=0.7), prompt_length=1)
    for length in (1, 2, 7, 31, 41):
        stage.prefill(0, 0, TOKENS[:length])
        stage.prefill(1, 0, TOKENS[:length])
        stage.decode(np.array([0, 1]), np.array([length, length]), TOKENS[:2])
    assert stage.compiled == before


def test_the_memory_of_states_is_predicted(made: tuple[Path, Any], stage: Stage) -> None:
    manifest = Manifest.load(made[0])
    held = sum(array.nbytes for cache in stage._caches for array in (cache.key, cache.value, *cache.states) if array is not None)
    need = predict(manifest, LayerRange(0, 3), embed=True, head=False, rows=ROWS, context=CONTEXT, chunk=64)
    assert need.cache_bytes == held
    less = predict(manifest, LayerRange(0, 3), embed=True, head=False, rows=ROWS - 1, context=CONTEXT, chunk=64)
    per_row = sum(layer.kv_heads * (layer.key_dim + layer.value_dim) * 4 * (CONTEXT + 16) for layer in manifest.cache)
    assert need.cache_bytes - less.cache_bytes == per_row + 4 * 2 * 32 * 3 * 4  # four places of two layers' 32 x 3 numbers


def test_a_stage_that_keeps_input_in_place_of_a_cache_gives_the_same(made: tuple[Path, Any], whole: Whole) -> None:
    config = StageConfig(LayerRange(0, 3), head=False, rows=2, context=CONTEXT, chunk=64)
    stage = RecomputingStage.load(made[0], config)
    assert same(stage.prefill(1, 0, TOKENS[:37]), whole[0][:37])
    assert same(stage.prefill(1, 20, TOKENS[20:37]), whole[0][20:37])
    assert same(stage.decode(np.array([1]), np.array([37]), TOKENS[37:38]), whole[0][37:38])
