"""Stages give the same tokens for any cut, beside any other rows and when steps are repeated. Nothing compiles after warm-up."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mesh.errors import BadLayerRange, BadRequest, CorruptModel, DoesNotFit, PromptTooLong
from mesh.model.manifest import Manifest
from mesh.runtime import programs
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams
from mesh.runtime.stage import Stage, StageConfig
from mesh.types import LayerRange, even_ranges

GREEDY = SamplingParams(temperature=0)
PROMPT = [5, 17, 33, 90, 2, 2, 61]


@pytest.fixture(scope="module")
def pipeline(llama: Path) -> Pipeline:
    return Pipeline.load(llama, shards=2, rows=4, chunk=32)


@pytest.fixture(scope="module")
def greedy_tokens(pipeline: Pipeline) -> list[int]:
    return pipeline.complete(PROMPT, GREEDY, max_tokens=60).ids


def test_greedy_tokens_vary(greedy_tokens: list[int]) -> None:
    assert len(set(greedy_tokens)) > 10  # else the tests below would show little


@pytest.mark.parametrize("shards", [1, 3, 4, 5])
def test_any_number_of_shards_gives_the_same_tokens(llama: Path, greedy_tokens: list[int], shards: int) -> None:
    assert Pipeline.load(llama, shards=shards, chunk=32).complete(PROMPT, GREEDY, max_tokens=60).ids == greedy_tokens


def test_a_prompt_in_chunks_is_the_prompt(pipeline: Pipeline) -> None:
    rng = np.random.default_rng(1)
    prompt = rng.integers(0, 131, 80)
    pipeline.stages[-1].open(0, GREEDY, prompt_length=80)
    whole = pipeline.prefill(0, 0, prompt)
    for size in (1, 7, 16, 33):
        for start in range(0, 80, size):
            token = pipeline.prefill(2, start, prompt[start : start + size])
        assert token.id == whole.id


def test_the_last_positions_of_the_context_can_be_used(llama: Path) -> None:
    prompt = np.random.default_rng(2).integers(0, 131, 90).tolist()
    wide = Pipeline.load(llama, chunk=64).complete(prompt, GREEDY, max_tokens=6)
    narrow = Pipeline.load(llama, chunk=16).complete(prompt, GREEDY, max_tokens=6)
    assert wide.ids == narrow.ids
    assert len(wide.ids) == 6


def test_rows_join_and_leave_a_decode_batch_without_touching_each_other(pipeline: Pipeline) -> None:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 131, length).tolist() for length in (3, 20, 9, 31)]
    alone = [pipeline.complete(prompt, GREEDY, max_tokens=24).ids for prompt in prompts]
    tokens: dict[int, list[int]] = {}
    waiting = [2, 0, 3, 1]
    while waiting or any(len(got) < 24 for got in tokens.values()):
        if waiting:
            row = waiting.pop()
            tokens[row] = [pipeline.start(row, prompts[row], GREEDY, max_tokens=24).id]
        live = [row for row, got in tokens.items() if len(got) < 24]
        rng.shuffle(live)
        positions = [len(prompts[row]) + len(tokens[row]) - 1 for row in live]
        step = pipeline.decode(np.array(live), np.array(positions), np.array([tokens[row][-1] for row in live]))
        for row, token in zip(live, step, strict=True):
            tokens[row].append(token.id)
    assert [tokens[row] for row in range(4)] == alone


def test_sampled_tokens_do_not_depend_on_the_batch(pipeline: Pipeline) -> None:
    params = [SamplingParams(temperature=1.1, top_p=0.9, seed=row, repetition_penalty=1.2) for row in range(3)]
    alone = [pipeline.complete(PROMPT, each, max_tokens=12).ids for each in params]
    assert len({tuple(ids) for ids in alone}) == 3
    tokens = [[pipeline.start(row, PROMPT, params[row], max_tokens=12).id] for row in range(3)]
    for step in range(11):
        at = np.full(3, len(PROMPT) + step)
        for got, token in zip(tokens, pipeline.decode(np.arange(3), at, np.array([got[-1] for got in tokens])), strict=True):
            got.append(token.id)
    assert tokens == alone


def test_a_row_that_is_opened_again_takes_nothing_from_a_row_of_the_same_parameters(pipeline: Pipeline) -> None:
    """A CPU device keeps an array of the host where it is, if its address is a multiple of 64: here the table's is."""
    params = SamplingParams(temperature=1.1, top_k=40, seed=3)
    alone = pipeline.complete(PROMPT, params, max_tokens=24).ids
    assert alone != pipeline.complete(PROMPT, GREEDY, max_tokens=24).ids
    table = pipeline.stages[-1]._table
    table.floats, table.ints = _aligned(table.floats), _aligned(table.ints)
    pipeline.complete(PROMPT, SamplingParams(temperature=1.1, seed=4), max_tokens=2)  # the parameters of a step are kept for the next
    for row in (0, 2):
        pipeline.start(row, PROMPT, params, max_tokens=24)
    pipeline.stages[-1].open(0, GREEDY, prompt_length=len(PROMPT))
    tokens = [alone[0]]
    for at in range(len(PROMPT), len(PROMPT) + 23):
        tokens += [token.id for token in pipeline.decode(np.array([2]), np.array([at]), np.array([tokens[-1]]))]
    assert tokens == alone


def _aligned(array: np.ndarray) -> np.ndarray:
    room = np.zeros(array.nbytes + 64, np.uint8)
    begin = -room.ctypes.data % 64
    copy = room[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


def test_high_rows_cost_as_much_as_low_rows(llama: Path, greedy_tokens: list[int]) -> None:
    stages = Pipeline.load(llama, shards=2, rows=16, chunk=32)
    history = [*PROMPT, *greedy_tokens]
    for row in (13, 15):
        stages.start(row, PROMPT, GREEDY, max_tokens=40)
    for at in range(len(PROMPT), len(PROMPT) + 20):
        tokens = stages.decode(np.array([15, 13]), np.array([at, at]), np.array([history[at], history[at]]))
        assert [token.id for token in tokens] == [history[at + 1]] * 2
    sizes = {key[1].size for key in stages.stages[0].programs._compiled if key[0] == "layers" and not key[1].prefill}
    assert sizes == ({8} if stages.stages[0].packs else {4})  # packed tokens lie side by side; else a block has the rows 12 to 15


def test_a_replayed_step_changes_nothing(pipeline: Pipeline, greedy_tokens: list[int]) -> None:
    pipeline.start(0, PROMPT, GREEDY, max_tokens=60)
    history = [*PROMPT, *greedy_tokens]
    for position in range(len(PROMPT), len(PROMPT) + 20):
        for again in (0, 0, -1, -3):  # the step, itself again, and steps before it
            at = max(len(PROMPT), position + again)
            token = pipeline.decode(np.array([0]), np.array([at]), np.array([history[at]]))[0]
            assert token.id == history[at + 1]


def test_whatever_a_row_held_before_cannot_be_seen(llama: Path, greedy_tokens: list[int]) -> None:
    stages = Pipeline.load(llama, shards=2, chunk=32)
    for stage in stages.stages:
        stage._caches = [jax.tree.map(lambda array: array + np.finfo(array.dtype).max, cache) for cache in stage._caches]
    assert stages.complete(PROMPT, GREEDY, max_tokens=60).ids == greedy_tokens
    last = stages.stages[1]
    for filler in (np.nan, np.inf, -np.inf):
        hidden = np.full((32, last.manifest.hidden.size), filler, np.float32)
        for start in (0, 32):
            last.prefill(0, start, np.zeros(32, np.int32), hidden)
        last.decode(np.array([0]), np.array([64]), np.array([0]), hidden[:1])
        assert stages.complete(PROMPT, GREEDY, max_tokens=60).ids == greedy_tokens


def test_nothing_compiles_after_warm_up(llama: Path) -> None:
    compilations = []

    def count(event: str, duration_secs: float, **_: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compilations.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        pipeline = Pipeline.load(llama, shards=2, rows=3, chunk=16)
        pipeline.warm_up()
        assert compilations  # the listener hears compilations
        pipeline.prefill(0, 0, np.array([1]))
        pipeline.decode(np.array([0]), np.array([1]), np.array([1]))
        compilations.clear()
        rng = np.random.default_rng(4)
        for row in range(3):
            prompt = rng.integers(0, 131, 11 + 30 * row).tolist()
            params = SamplingParams(temperature=row, top_k=5, presence_penalty=row, logprobs=row)
            pipeline.start(row, prompt, params, max_tokens=3)
            pipeline.decode(np.arange(row + 1), np.full(row + 1, 75 + row), np.arange(row + 1))
        pipeline.decode(np.array([2, 0]), np.array([95, 40]), np.array([7, 8]))
        assert not compilations
    finally:
        jax.monitoring.unregister_event_duration_listener(count)


def test_threads_that_warm_up_compile_shared_programs_once(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    gate = threading.Barrier(4)

    def counted(program: Any, *args: Any) -> Any:
        made.append((program, args[0]))
        return program(*args)

    monkeypatch.setattr(programs, "_PROGRAM", {kind: partial(counted, program) for kind, program in programs._PROGRAM.items()})
    stage = Stage.load(llama, StageConfig(LayerRange(0, 5), rows=2, chunk=16))

    def warm_up() -> None:
        gate.wait(60)
        stage.warm_up()

    threads = [threading.Thread(target=warm_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == stage.programs.compiled > 4


@pytest.mark.parametrize(("prefill", "size"), [(False, 1), (False, 4), (True, 16), (True, 32)])
def test_no_step_copies_a_cache(llama: Path, prefill: bool, size: int) -> None:
    from mesh.runtime.programs import ShapeBucket

    stage = Stage.load(llama, StageConfig(LayerRange(0, 5), rows=64, chunk=32))
    stage._compile(ShapeBucket(prefill, size, 96))
    cache_bytes = stage._caches[0].key.nbytes
    (program,) = [program for key, program in stage.programs._compiled.items() if key[0] == "layers"]
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= 10 * cache_bytes  # five keys, five values: updated where they lie
    assert memory.temp_size_in_bytes < cache_bytes


def test_a_cut_stage_gives_and_takes_the_hidden_state(llama: Path) -> None:
    first = Stage.load(llama, StageConfig(LayerRange(0, 2)))
    hidden = first.prefill(0, 0, np.array([4, 5, 6]))
    assert isinstance(hidden, np.ndarray)
    assert hidden.shape == (3, 48)
    assert hidden.dtype == np.float32
    second = Stage.load(llama, StageConfig(LayerRange(2, 5)))
    with pytest.raises(BadRequest, match="hidden"):
        second.prefill(0, 0, np.array([4, 5, 6]), hidden[:2])


@pytest.mark.parametrize("layers", [(0, 6), (3, 3), (4, 2), (-1, 2), (5, 6)])
def test_a_range_outside_the_model_is_refused(llama: Path, layers: LayerRange) -> None:
    with pytest.raises(BadLayerRange, match="0-5"):
        Stage.load(llama, StageConfig(LayerRange(*layers)))


def test_too_little_memory_is_refused_with_the_figures(llama: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"need .* \(weights .*, KV cache .*, workspace .*\) but 100 kB are allowed") as caught:
        Stage.load(llama, StageConfig(LayerRange(0, 5), max_memory_bytes=100_000))
    assert caught.value.needed_bytes > caught.value.allowed_bytes == 100_000


def test_the_predicted_weights_and_cache_are_what_is_held(llama: Path) -> None:
    stage = Stage.load(llama, StageConfig(LayerRange(0, 5), rows=3))
    cache = sum(array.nbytes for array in jax.tree.leaves(stage._caches))
    assert cache == pytest.approx(stage.need.cache_bytes, rel=0.2)
    manifest = Manifest.load(llama)
    assert stage.need.weights_bytes == sum(block.weight_bytes for block in manifest.blocks)


def test_bad_steps_are_refused_and_change_nothing(pipeline: Pipeline, greedy_tokens: list[int]) -> None:
    pipeline.start(0, PROMPT, GREEDY, max_tokens=60)
    first = pipeline.stages[0]
    with pytest.raises(PromptTooLong, match="96"):
        first.decode(np.array([0]), np.array([96]), np.array([1]))
    with pytest.raises(BadRequest, match="row 4"):
        first.prefill(4, 0, np.array([1]))
    with pytest.raises(BadRequest, match="twice"):
        first.decode(np.array([0, 0]), np.array([8, 8]), np.array([1, 1]))
    with pytest.raises(PromptTooLong):
        pipeline.complete(PROMPT, GREEDY, max_tokens=96)
    with pytest.raises(BadRequest, match="131"):
        pipeline.complete([131], GREEDY, max_tokens=2)
    token = pipeline.decode(np.array([0]), np.array([len(PROMPT)]), np.array([greedy_tokens[0]]))[0]
    assert token.id == greedy_tokens[1]


def test_damaged_files_are_named(llama: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    data = copy / "layer_001.onnx.data"
    raw = bytearray(data.read_bytes())
    raw[100] ^= 1
    data.write_bytes(raw)
    Stage.load(copy, StageConfig(LayerRange(0, 5), checksums=False))  # sizes are right: only checksums tell
    with pytest.raises(CorruptModel, match=r"layer_001\.onnx\.data does not match its checksum"):
        Stage.load(copy, StageConfig(LayerRange(0, 5)))
    data.write_bytes(raw[:-10])
    with pytest.raises(CorruptModel, match=r"layer_001\.onnx\.data has"):
        Stage.load(copy, StageConfig(LayerRange(0, 2)))
    Stage.load(copy, StageConfig(LayerRange(2, 5)))  # another range does not need that file
    data.unlink()
    with pytest.raises(CorruptModel, match="is missing"):
        Stage.load(copy, StageConfig(LayerRange(1, 2)))


def test_even_ranges_cover_every_layer_once() -> None:
    for layers in range(1, 14):
        for shards in range(1, layers + 1):
            ranges = even_ranges(layers, shards)
            assert [layer for each in ranges for layer in each] == list(range(layers))
            assert max(map(len, ranges)) - min(map(len, ranges)) <= 1
