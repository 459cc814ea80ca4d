"""Stages that hold more layers than they serve, and stages without a cache, give the same tokens as all others."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.monitoring
import numpy as np
import pytest

from mesh.errors import BadLayerRange, DoesNotFit
from mesh.model.manifest import Manifest
from mesh.model.memory import predict
from mesh.runtime.device import memory_habits
from mesh.runtime.recompute import RecomputingStage
from mesh.runtime.sampling import SamplingParams
from mesh.runtime.stage import Stage, StageConfig
from mesh.types import LayerRange

ROWS, CONTEXT = 2, 48
PROMPTS = ([3, 44, 7, 99, 12, 8, 1, 60, 23, 17, 5, 90, 31, 2, 77, 6, 41, 19, 28], [101, 5, 13])
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=0.9, top_k=20, repetition_penalty=1.3, presence_penalty=0.2, seed=7)


def config(start: int, stop: int, **values: Any) -> StageConfig:
    return StageConfig(LayerRange(start, stop), rows=ROWS, context=CONTEXT, chunk=16, checksums=False, **values)


def generate(stages: Sequence[Any], count: int, params: SamplingParams) -> list[list[int]]:
    """Both prompts, each in a row of its own, decoded in one batch."""
    out: list[list[int]] = []
    for row, prompt in enumerate(PROMPTS):
        stages[-1].open(row, params, prompt_length=len(prompt))
        token: Any = None
        for start in range(0, len(prompt), 16):
            piece = np.array(prompt[start : start + 16], np.int32)
            hidden: Any = None
            for stage in stages:
                hidden = stage.prefill(row, start, piece, hidden)
            token = hidden
        out.append([token.id])
    while len(out[0]) < count:
        rows = np.arange(len(out))
        positions = np.array([len(prompt) + len(tokens) - 1 for prompt, tokens in zip(PROMPTS, out, strict=True)])
        last = np.array([tokens[-1] for tokens in out])
        hidden = None
        for stage in stages:
            hidden = stage.decode(rows, positions, last, hidden)
        for tokens, token in zip(out, hidden, strict=True):
            tokens.append(token.id)
    return out


@pytest.fixture(scope="module")
def expected(llama: Path) -> list[tuple[SamplingParams, list[list[int]]]]:
    """The tokens of the greedy and of the drawing request."""
    stage = Stage.load(llama, config(0, 5))
    return [(params, generate([stage], 12, params)) for params in (GREEDY, SAMPLED)]


def test_any_range_that_is_held_is_served_with_nothing_read_and_nothing_compiled(
    llama: Path, expected: list[tuple[SamplingParams, list[list[int]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: dict[Any, Any] = {}
    low = Stage.load(llama, config(0, 2, overlap=3), compiled=compiled)  # holds all
    high = Stage.load(llama, config(2, 5, overlap=1), compiled=compiled)  # holds 1 to 5
    assert (low.held, high.held) == (LayerRange(0, 5), LayerRange(1, 5))
    low.warm_up()
    high.warm_up()
    assert generate([low, high], 12, GREEDY) == expected[0][1]  # and whatever numpy and JAX compile on the way
    events: list[str] = []
    opened: list[Any] = []
    path_open, file_open = Path.open, builtins.open

    def open_path(self: Path, *arguments: Any, **more: Any) -> Any:
        opened.append(self)
        return path_open(self, *arguments, **more)

    def open_file(file: Any, *arguments: Any, **more: Any) -> Any:
        opened.append(file)
        return file_open(file, *arguments, **more)

    monkeypatch.setattr(Path, "open", open_path)
    monkeypatch.setattr(builtins, "open", open_file)

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        before = len(compiled)
        for cut in (1, 3, 4, 2):
            low.serve(LayerRange(0, cut))
            high.serve(LayerRange(cut, 5))
            for each, tokens in expected:
                assert generate([low, high], 12, each) == tokens, cut
        low.serve(LayerRange(0, 5))  # the other one is gone
        for each, tokens in expected:
            assert generate([low], 12, each) == tokens
        assert len(compiled) == before
        assert not events
        assert not [path for path in opened if str(llama) in str(path)]
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_layers_that_are_not_held_are_not_served(llama: Path) -> None:
    stage = Stage.load(llama, config(2, 4, overlap=1))
    assert stage.held == LayerRange(1, 5)
    with pytest.raises(BadLayerRange, match="layers 0-4 are not all held here, which are 1-5"):
        stage.serve(LayerRange(0, 4))
    assert stage.layers == LayerRange(2, 4)


def test_memory_counts_the_layers_that_are_held(llama: Path) -> None:
    manifest = Manifest.load(llama)
    held = predict(manifest, LayerRange(1, 5), embed=False, head=True, rows=ROWS, context=CONTEXT, chunk=16, **memory_habits()).total_bytes
    assert Stage.load(llama, config(2, 4, overlap=1)).need.total_bytes == held
    with pytest.raises(DoesNotFit, match="layers 2-4 and 1 more on either side"):
        Stage.load(llama, config(2, 4, overlap=1, max_memory_bytes=held - 1))


@pytest.mark.parametrize("ranges", [((0, 5),), ((0, 2), (2, 5)), ((0, 1), (1, 3), (3, 5))])
def test_without_a_cache_tokens_are_the_same(llama: Path, expected: list[tuple[SamplingParams, list[list[int]]]], ranges: Any) -> None:
    stages = [RecomputingStage.load(llama, config(*layers)) for layers in ranges]
    for params, tokens in expected:
        assert generate(stages, 12, params) == tokens


def test_a_stage_without_a_cache_keeps_as_little_as_predicted(llama: Path) -> None:
    for layers in ((0, 2), (1, 4), (2, 5)):
        stage, cached = RecomputingStage.load(llama, config(*layers)), Stage.load(llama, config(*layers))
        kept = sum(array.nbytes for cache in stage._inner._caches for array in (cache.key, cache.value)) + stage._tokens.nbytes
        kept += 0 if stage._hidden is None else stage._hidden.nbytes
        assert stage._inner.need.cache_bytes == kept
        assert kept < cached.need.cache_bytes


def test_a_mix_of_both_kinds_of_stage(llama: Path, expected: list[tuple[SamplingParams, list[list[int]]]]) -> None:
    stages = [Stage.load(llama, config(0, 2)), RecomputingStage.load(llama, config(2, 4)), Stage.load(llama, config(4, 5))]
    assert generate(stages, 12, SAMPLED) == expected[1][1]


def test_nothing_compiles_after_the_warm_up_without_a_cache(llama: Path, expected: list[tuple[SamplingParams, list[list[int]]]]) -> None:
    stage = RecomputingStage.load(llama, config(0, 5))
    stage.warm_up()
    before = stage._inner.programs.compiled
    assert generate([stage], 12, SAMPLED) == expected[1][1]
    assert stage._inner.programs.compiled == before
