"""Packed steps give every session the bits, and the tokens, of a session alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mesh.errors import BadRequest, PromptTooLong
from mesh.importer.run import import_model
from mesh.kernels.library import kernels
from mesh.runtime import stage as stage_module
from mesh.runtime.buckets import Buckets
from mesh.runtime.engine import Segments
from mesh.runtime.generate import Pipeline
from mesh.runtime.packing import token_sizes
from mesh.runtime.recompute import RecomputingStage
from mesh.runtime.sampling import SamplingParams
from mesh.runtime.stage import Stage, StageConfig
from mesh.types import LayerRange

ROWS, CONTEXT, CHUNK, VOCAB = 5, 96, 32, 131
PARAMS = (
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=11, top_k=20),
    SamplingParams(temperature=1.0, seed=7, repetition_penalty=1.3, presence_penalty=0.5, logprobs=3),
)
needs_kernels = pytest.mark.skipif(kernels().name is None, reason=f"kernels: {kernels()}")


@pytest.fixture(scope="module")
def packing(tmp_path_factory: pytest.TempPathFactory, new_llama: Callable[..., Path]) -> Path:
    """A model whose heads the kernels take."""
    directory = tmp_path_factory.mktemp("packing")
    import_model(new_llama(directory / "source", dim=16, hidden=96), directory / "model")
    return directory / "model"


@dataclass
class Asked:
    prompt: list[int]
    params: SamplingParams
    length: int
    tokens: list[int] = field(default_factory=list)
    done: int = 0  # positions that are computed

    @property
    def history(self) -> list[int]:
        return self.prompt + self.tokens


def alone(pipeline: Pipeline, asked: Asked) -> list[int]:
    return pipeline.complete(asked.prompt, asked.params, max_tokens=asked.length).ids


def packed_step(stages: list[Stage], parts: list[tuple[int, Asked, int]]) -> None:
    """A step of `parts`: (row, request, how many tokens of its history)."""
    rows, requests, counts = zip(*parts, strict=True)
    wants = [asked.done + count == len(asked.history) for _, asked, count in parts]
    segments = Segments(rows, [asked.done for asked in requests], counts, wants)
    tokens = np.array([token for _, asked, count in parts for token in asked.history[asked.done : asked.done + count]], np.int32)
    hidden: Any = None
    for stage in stages[:-1]:
        hidden = stage.packed(segments, tokens, hidden)
    answers = stages[-1].packed(segments, tokens, hidden)
    for (_, asked, count), wanted, answer in zip(parts, wants, answers, strict=True):
        asked.done += count
        assert (answer is not None) == wanted
        if answer is not None:
            asked.tokens.append(answer.id)


def run_packed(
    stages: list[Stage], requests: list[Asked], draw: Callable[[list[tuple[int, Asked, int]]], list[tuple[int, Asked, int]]]
) -> None:
    """Run all requests, a row each; `draw` chooses the parts of each step out of what could be sent."""
    for row, asked in enumerate(requests):
        stages[-1].open(row, asked.params, prompt_length=len(asked.prompt))
    while left := [(row, asked) for row, asked in enumerate(requests) if len(asked.tokens) < asked.length]:
        packed_step(stages, draw([(row, asked, len(asked.history) - asked.done) for row, asked in left]))


def asked_of(numbers: np.random.Generator, count: int) -> list[Asked]:
    return [
        Asked(
            [int(t) for t in numbers.integers(0, VOCAB, numbers.integers(1, 60))], PARAMS[index % len(PARAMS)], int(numbers.integers(1, 12))
        )
        for index in range(count)
    ]


@pytest.fixture(scope="module", params=["kernels", "in turn"])
def both(request: pytest.FixtureRequest, packing: Path) -> tuple[Pipeline, Pipeline]:
    """(a pipeline that packs, one in which each session is alone); the stages of the second kind are told that they cannot pack."""
    if request.param == "kernels" and kernels().name is None:
        pytest.skip(f"kernels: {kernels()}")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "in turn":
            patch.setattr(stage_module, "can_pack", lambda *_: False)
        together, lone = (Pipeline.load(packing, shards=2, rows=rows, context=CONTEXT, chunk=CHUNK) for rows in (ROWS, 1))
    assert all(stage.packs == (request.param == "kernels") for stage in together.stages)
    return together, lone


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_tokens_are_those_of_each_session_alone_however_steps_are_packed(both: tuple[Pipeline, Pipeline], data: st.DataObject) -> None:
    together, lone = both
    requests = asked_of(np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))), data.draw(st.integers(1, ROWS)))

    def draw(could: list[tuple[int, Asked, int]]) -> list[tuple[int, Asked, int]]:
        chosen = data.draw(st.lists(st.sampled_from(could), min_size=1, unique_by=lambda each: each[0]))
        return [(row, asked, data.draw(st.integers(1, most))) for row, asked, most in chosen]

    run_packed(together.stages, requests, draw)
    for asked in requests:
        assert asked.tokens == alone(lone, asked)


@needs_kernels
def test_every_bit_is_that_of_a_session_alone(packing: Path) -> None:
    """The hidden state of each token: alone, one by one, in chunks, and packed with others, in windows of any alignment."""
    stage, other = (Pipeline.load(packing, shards=2, rows=ROWS, context=CONTEXT, chunk=CHUNK).stages[0] for _ in range(2))
    numbers = np.random.default_rng(5)
    tokens = numbers.integers(0, VOCAB, (ROWS, 70)).astype(np.int32)
    alone = [np.concatenate([np.asarray(stage.prefill(0, at, tokens[row, at : at + 1])) for at in range(70)]) for row in range(ROWS)]
    for _ in range(3):
        at = [0] * ROWS
        while any(done < 70 for done in at):
            rows = [int(row) for row in numbers.permutation(ROWS) if at[row] < 70][: int(numbers.integers(1, ROWS + 1))]
            counts = [min(int(numbers.integers(1, 40)), 70 - at[row]) for row in rows]
            flat = np.concatenate([tokens[row, at[row] : at[row] + count] for row, count in zip(rows, counts, strict=True)])
            hidden = np.asarray(other.packed(Segments(rows, [at[row] for row in rows], counts, [False] * len(rows)), flat))
            begin = 0
            for row, count in zip(rows, counts, strict=True):
                np.testing.assert_array_equal(hidden[begin : begin + count], alone[row][at[row] : at[row] + count])
                at[row], begin = at[row] + count, begin + count


@needs_kernels
def test_nothing_compiles_after_warm_up_and_fewer_programs_do_before(packing: Path) -> None:
    stage = Pipeline.load(packing, rows=ROWS, context=CONTEXT, chunk=CHUNK).stages[0]
    stage.warm_up()
    stage.exercise()
    before = stage.compiled
    buckets = Buckets.plan(rows=ROWS, context=CONTEXT, chunk=CHUNK)
    shapes = len(buckets.rows) + len(buckets.chunks)
    drawing = 4 * len(buckets.rows)  # the head, the likeliest allowed token, shaping, sampling
    apart = 2 * shapes + len(buckets.chunks) + drawing  # embedding and layers; the last of a chunk
    copies_and_states = len(buckets.copies) + 1
    assert before - copies_and_states == 2 * len(token_sizes(CHUNK)) + drawing <= apart
    numbers = np.random.default_rng(2)
    run_packed([stage], asked_of(numbers, ROWS), lambda could: could[: int(numbers.integers(1, len(could) + 1))])
    assert stage.compiled == before


@needs_kernels
def test_a_step_that_is_larger_than_any_program_is_cut(packing: Path) -> None:
    pipeline = Pipeline.load(packing, rows=ROWS, context=CONTEXT, chunk=16)
    requests = asked_of(np.random.default_rng(9), ROWS)
    run_packed(pipeline.stages, requests, lambda could: could)
    for asked in requests:
        assert asked.tokens == alone(pipeline, asked)


def test_a_stage_that_keeps_its_input_takes_packed_steps_too(llama: Path) -> None:
    whole = StageConfig(LayerRange(0, 5), rows=ROWS, context=CONTEXT, chunk=CHUNK)
    requests = asked_of(np.random.default_rng(4), 3)
    run_packed([RecomputingStage.load(llama, whole)], requests, lambda could: could)  # type: ignore[list-item]  # an engine as well
    pipeline = Pipeline.load(llama, context=CONTEXT, chunk=CHUNK)
    for asked in requests:
        assert asked.tokens == alone(pipeline, asked)


@pytest.mark.parametrize(
    ("segments", "tokens", "error"),
    [
        (Segments([0], [0], [2], [True]), 3, BadRequest),
        (Segments([], [], [], []), 0, BadRequest),
        (Segments([0, 1], [0, 0], [2, 0], [True] * 2), 2, BadRequest),
        (Segments([0, 0], [0, 1], [1, 1], [True] * 2), 2, BadRequest),
        (Segments([ROWS], [0], [1], [True]), 1, BadRequest),
        (Segments([0], [-1], [1], [True]), 1, BadRequest),
        (Segments([0], [CONTEXT - 1], [2], [True]), 2, PromptTooLong),
    ],
)
def test_a_packed_step_that_does_not_add_up_is_refused(
    both: tuple[Pipeline, Pipeline], segments: Segments, tokens: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        both[0].stages[0].packed(segments, np.zeros(tokens, np.int32))


def test_pieces_hold_every_token_once() -> None:
    segments = Segments([3, 1, 2], [0, 5, 9], [7, 1, 12], [False, True, True])

    def tokens(of: Segments) -> Iterator[tuple[int, int]]:
        for row, start, count in zip(of.rows, of.starts, of.counts, strict=True):
            yield from ((row, start + offset) for offset in range(count))

    for most in range(1, 25):
        pieces = segments.pieces(most)
        assert [each for part, _ in pieces for each in tokens(part)] == list(tokens(segments))
        assert all(sum(part.counts) == piece.stop - piece.start <= most for part, piece in pieces)
        assert [row for part, _ in pieces for row, wants in zip(part.rows, part.wants, strict=True) if wants] == [1, 2]


def test_the_cache_of_a_packed_step_is_written_where_it_lies(packing: Path) -> None:
    if kernels().name is None or jax.default_backend() != "cpu":
        pytest.skip("no kernels")
    stage = Pipeline.load(packing, rows=4, context=60, chunk=16).stages[0]
    stage.warm_up()
    cache = stage._caches[0].key.nbytes
    steps = [program for key, program in stage.programs._compiled.items() if key[0] == "layers"]
    assert steps
    for program in steps:
        assert program.memory_analysis().temp_size_in_bytes < 2 * cache
        assert program.memory_analysis().alias_size_in_bytes >= 2 * cache * len(stage._caches)
