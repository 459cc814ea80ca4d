"""Steps of rows with a grammar: the tokens are the same whichever program chooses them, alone or beside any other rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_chat_model import END, byte_level, make_chat_model

from mesh.importer.run import import_model
from mesh.kernels.library import kernels
from mesh.model.grammar import grammar_of
from mesh.protocol.frame import NOT_ALLOWED
from mesh.protocol.structured import StructuredOutputs
from mesh.runtime.engine import Segments
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams
from mesh.runtime.shaping import Pending

ROWS, TOKENS = 4, 8
PROMPT = [5, 17, 33, 8]
UNSHAPED = SamplingParams()
OTHERS = [UNSHAPED, SamplingParams(temperature=1.0, seed=3), SamplingParams(repetition_penalty=1.3), SamplingParams(logprobs=2)]


@pytest.fixture(scope="module")
def packing(tmp_path_factory: pytest.TempPathFactory, new_llama: Callable[..., Path]) -> Path:
    """A model whose heads the kernels take, with a tokenizer that grammars can read."""
    directory = tmp_path_factory.mktemp("packing")
    source = new_llama(directory / "source", dim=16, hidden=96)
    byte_level().save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    import_model(source, directory / "model")
    return directory / "model"


@pytest.fixture(scope="module", params=["decode steps", "packed steps", "packed steps, 2 shards"])
def pipeline(request: pytest.FixtureRequest, packing: Path, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    packs = request.param != "decode steps"
    if packs and kernels().name is None:
        pytest.skip(f"kernels: {kernels()}")
    model = packing if packs else make_chat_model(tmp_path_factory.mktemp("chat"))
    loaded = Pipeline.load(model, shards=2 if "2" in request.param else 1, rows=ROWS, context=64)
    assert all(stage.packs == packs for stage in loaded.stages)
    return loaded


def likeliest(regex: str) -> SamplingParams:
    return SamplingParams(grammar=grammar_of(StructuredOutputs(regex=regex)))


def sampled(regex: str) -> SamplingParams:
    """The same answer; but with a bias, even of 0, the sampler's program draws it."""
    return SamplingParams(grammar=grammar_of(StructuredOutputs(regex=regex)), logit_bias={"0": 0.0})


def together(pipeline: Pipeline, params: list[SamplingParams]) -> list[list[int]]:
    """The tokens of each row, in decode batches of all."""
    answers = [[pipeline.start(row, PROMPT, each, max_tokens=TOKENS).id] for row, each in enumerate(params)]
    rows = np.arange(len(params), dtype=np.int32)
    for position in range(len(PROMPT), len(PROMPT) + TOKENS - 1):
        step = pipeline.decode(rows, np.full(len(rows), position), np.array([answer[-1] for answer in answers]))
        for answer, token in zip(answers, step, strict=True):
            answer.append(token.id)
    return answers


_REGEXES = st.builds("[{}]{{30}}".format, st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ0123456789"), min_size=1))


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(regexes=st.lists(_REGEXES, min_size=1, max_size=2), others=st.lists(st.sampled_from(OTHERS), max_size=2))
def test_tokens_are_those_of_the_sampler_alone_and_beside_any_rows(
    pipeline: Pipeline, regexes: list[str], others: list[SamplingParams]
) -> None:
    expected = [together(pipeline, [sampled(regex)])[0] for regex in regexes]
    assert [together(pipeline, [likeliest(regex)])[0] for regex in regexes] == expected
    beside = [together(pipeline, [each])[0] for each in others]
    assert together(pipeline, [*map(likeliest, regexes), *others]) == expected + beside
    assert together(pipeline, [*others, *map(likeliest, regexes)]) == beside + expected


def test_a_step_that_needs_masks_alone_asks_for_nothing_else(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(name: str) -> Callable[..., Any]:
        original = getattr(Pending, name)

        def call(*args: Any) -> Any:
            asked.append(name)
            return original(*args)

        return call

    for name in ("take", "allowed"):
        monkeypatch.setattr(Pending, name, noted(name))
    together(pipeline, [UNSHAPED, UNSHAPED])
    assert asked == []
    together(pipeline, [likeliest("[a-f]{30}"), UNSHAPED])
    assert asked == ["allowed"] * TOKENS  # of the prompt's last chunk, and of each step
    asked.clear()
    together(pipeline, [likeliest("[a-f]{30}"), SamplingParams(temperature=1.0, seed=3)])
    assert asked == ["allowed"] + ["take", "allowed"] * (TOKENS - 1)


def test_a_replayed_row_goes_on_with_the_same_tokens(pipeline: Pipeline) -> None:
    params = likeliest("([a-z]{3}-[0-9]{2};){3}")
    (expected,) = together(pipeline, [params])
    for done in (1, 5, TOKENS - 1):
        tokens = [*expected[:done], pipeline.start(2, [*PROMPT, *expected[:done]], UNSHAPED, max_tokens=1).id]  # what another session left
        pipeline.stages[-1].open(2, params, prompt_length=len(PROMPT))
        tokens[done:] = [pipeline.prefill(2, 0, np.array([*PROMPT, *expected[:done]], np.int32)).id]
        while len(tokens) < TOKENS:
            position = len(PROMPT) + len(tokens) - 1
            step = [pipeline.decode(np.array([2]), np.array([position]), np.array(tokens[-1:]))[0].id for _ in range(2)]
            assert step[0] == step[1]  # the step is repeated
            tokens += step[:1]
        assert tokens == expected


def test_tokens_that_do_not_follow_the_grammar_fail_their_row_alone(pipeline: Pipeline) -> None:
    (expected,) = together(pipeline, [UNSHAPED])
    for row, params in enumerate([likeliest("[a-c]{30}"), UNSHAPED]):
        pipeline.start(row, PROMPT, params, max_tokens=TOKENS)
    step = pipeline.decode(np.array([0, 1]), np.full(2, len(PROMPT)), np.array([60, expected[0]]))
    assert [token.id for token in step] == [NOT_ALLOWED, expected[1]]


def test_packed_steps_take_masks_for_the_rows_that_want_a_token(pipeline: Pipeline) -> None:
    params = [likeliest("[a-f]{30}"), UNSHAPED, likeliest("[0-9]{30}")]
    expected = together(pipeline, params)
    for row, each in enumerate(params):
        pipeline.stages[-1].open(row, each, prompt_length=len(PROMPT))
    for counts, wants, starts, fed in (
        ([3, 4, 4], [False, True, True], [0, 0, 0], [*PROMPT[:3], *PROMPT, *PROMPT]),
        ([1, 1, 1], [True, True, True], [3, 4, 4], [PROMPT[3], expected[1][0], expected[2][0]]),
    ):
        hidden = None
        for stage in pipeline.stages:
            hidden = stage.packed(Segments([0, 1, 2], starts, counts, wants), np.array(fed, np.int32), hidden)  # type: ignore[arg-type]
        assert isinstance(hidden, list)
        at = 0 if starts[0] == 0 else 1
        assert [token and token.id for token in hidden] == [expected[0][0] if at else None, expected[1][at], expected[2][at]]
