"""Masks and biases of rows: what a step gets is a function of the row's parameters and tokens, whatever was repeated or undone before."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from tiny_chat_model import byte_level

from mesh.model.grammar import Matcher, Vocabulary, grammar_of
from mesh.protocol.structured import StructuredOutputs
from mesh.runtime.sampling import RowTable, SamplingParams, sample
from mesh.runtime.shaping import RowShapes, choose, shape_logits

TOKENIZER = byte_level()
END = TOKENIZER.get_vocab_size() - 1
VOCAB = END + 1
PROMPT = 5


class _Named:
    name, vocab_size = "tiny", VOCAB


VOCABULARY = Vocabulary.of(TOKENIZER.to_str(), [END], _Named())  # type: ignore[arg-type]
GRAMMAR = grammar_of(StructuredOutputs(regex="[a-c]{2}-[0-9]{3}"))


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


@pytest.fixture
def shapes() -> RowShapes:
    return RowShapes(lambda: VOCABULARY, VOCAB)


def allowed(shapes: RowShapes, row: int) -> str:
    """What may follow in `row`, as text; * for the end; "failed" where nothing may."""
    pending = shapes.begin([row])
    assert pending is not None
    shaping = pending.take([row], 1)
    if row in pending.failed:
        return "failed"
    bits = np.unpackbits(shaping.allowed.view(np.uint8), axis=1, bitorder="little")[0, :VOCAB]
    return "".join("*" if token == END else TOKENIZER.decode([token]) for token in np.flatnonzero(bits).tolist())


def begin(shapes: RowShapes, row: int = 0, given: str = "", params: SamplingParams | None = None) -> None:
    shapes.open(row, params or SamplingParams(grammar=GRAMMAR), prompt_length=PROMPT)
    shapes.fed(row, 0, [1] * PROMPT + ids(given))


def test_a_row_is_followed_token_by_token(shapes: RowShapes) -> None:
    begin(shapes)
    assert allowed(shapes, 0) == "abc"
    for place, (character, following) in enumerate([("a", "abc"), ("b", "-"), ("-", "0123456789")]):
        (token,) = ids(character)
        shapes.sampled([0], [token])
        shapes.fed(0, PROMPT + place, [token])
        assert allowed(shapes, 0) == following


def test_a_replay_with_the_tokens_so_far_has_the_mask_of_the_undisturbed_run(shapes: RowShapes) -> None:
    for so_far, following in [("", "abc"), ("ab", "-"), ("ab-12", "0123456789"), ("ab-123", "*")]:
        begin(shapes, row=3, given=so_far)
        assert allowed(shapes, 3) == following


def test_steps_that_are_repeated_or_go_another_way_count_from_their_position(shapes: RowShapes) -> None:
    begin(shapes, given="ab-12")
    shapes.fed(0, PROMPT + 4, ids("2"))  # the same step again
    assert allowed(shapes, 0) == "0123456789"
    shapes.fed(0, PROMPT + 1, ids("c"))  # an earlier one, with another token
    assert allowed(shapes, 0) == "-"
    shapes.sampled([0], ids("-"))  # what was drawn is not what comes
    shapes.fed(0, PROMPT, ids("bb-9"))
    assert allowed(shapes, 0) == "0123456789"


def test_a_row_that_is_opened_again_keeps_its_tokens_and_another_session_begins_anew(shapes: RowShapes) -> None:
    begin(shapes, given="ab")
    shapes.open(0, SamplingParams(grammar=GRAMMAR), prompt_length=PROMPT)
    shapes.fed(0, PROMPT + 2, ids("-"))
    assert allowed(shapes, 0) == "0123456789"
    begin(shapes)
    assert allowed(shapes, 0) == "abc"
    begin(shapes, params=SamplingParams(grammar=grammar_of(StructuredOutputs(choice=("x",)))))
    assert allowed(shapes, 0) == "x"


def test_the_same_request_again_begins_anew_in_the_row_where_the_first_one_ended(shapes: RowShapes) -> None:
    for _ in range(3):
        begin(shapes)
        for place, token in enumerate([*ids("ab-123"), END]):
            assert allowed(shapes, 0) != "failed"
            shapes.sampled([0], [token])
            shapes.fed(0, PROMPT + place, [token] if token != END else [])


def test_tokens_that_do_not_follow_the_grammar_or_are_missing_fail_this_row_alone(shapes: RowShapes) -> None:
    begin(shapes, 0, "zz")
    begin(shapes, 1, "a")
    assert allowed(shapes, 0) == "failed" and allowed(shapes, 1) == "abc"
    shapes.fed(1, PROMPT + 3, ids("1"))  # positions before it are not known
    assert allowed(shapes, 1) == "failed"
    shapes.fed(1, PROMPT, ids("ab"))
    assert allowed(shapes, 1) == "-"


def test_rows_without_grammar_or_bias_cost_nothing(shapes: RowShapes) -> None:
    shapes.open(0, SamplingParams(temperature=1.0, seed=1), prompt_length=PROMPT)
    assert shapes.begin([0]) is None
    begin(shapes, 1)
    shapes.open(1, SamplingParams(), prompt_length=PROMPT)
    assert shapes.begin([0, 1]) is None


def test_a_vocabulary_that_cannot_be_read_fails_the_row_and_is_tried_again() -> None:
    tries: list[int] = []

    def read() -> Vocabulary:
        tries.append(1)
        if len(tries) == 1:
            raise OSError("gone")
        return VOCABULARY

    shapes = RowShapes(read, VOCAB)
    begin(shapes)
    assert allowed(shapes, 0) == "failed"
    begin(shapes, 1)
    assert allowed(shapes, 1) == "abc" and len(tries) == 2


def test_logits_are_biased_and_masked_row_by_row(shapes: RowShapes) -> None:
    begin(shapes, 0, params=SamplingParams(grammar=GRAMMAR, logit_bias={str(ids("a")[0]): 2.5}))
    begin(shapes, 2, params=SamplingParams(logit_bias={"0": -3.0, "7": 1.0}))
    pending = shapes.begin([0, 1, 2])
    assert pending is not None
    logits = np.random.default_rng(0).standard_normal((3, VOCAB)).astype(np.float32)
    shaped: Any = np.asarray(jax.jit(shape_logits)(logits, *pending.take(range(3), 3)))
    expected = np.full((3, VOCAB), -np.inf, np.float32)
    expected[0, ids("abc")] = logits[0, ids("abc")]
    expected[0, ids("a")[0]] += 2.5
    expected[1:] = logits[1:]
    expected[2, [0, 7]] += np.array([-3.0, 1.0], np.float32)
    np.testing.assert_allclose(shaped, expected, rtol=1e-6)


def test_what_was_computed_ahead_is_used_and_computed_once(shapes: RowShapes, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[list[int]] = []
    go_to = Matcher.go_to

    def noted(matcher: Matcher, tokens: list[int]) -> None:
        computed.append(list(tokens))
        go_to(matcher, tokens)

    monkeypatch.setattr(Matcher, "go_to", noted)
    begin(shapes)
    begin(shapes, 1)
    assert allowed(shapes, 0) == allowed(shapes, 1) == "abc"
    shapes.sampled([0, 1], ids("ab"))
    shapes.fed(0, PROMPT, ids("a"))
    assert allowed(shapes, 0) == "abc"
    assert sorted(computed) == [[], [], ids("a"), ids("b")]
    shapes.fed(0, PROMPT, ids("a"))  # again: it may be another answer by now
    shapes.fed(1, PROMPT, ids("c"))  # not what was drawn
    assert allowed(shapes, 0) == allowed(shapes, 1) == "abc"
    assert sorted(computed) == sorted([[], [], ids("a"), ids("b"), ids("a"), ids("c")])


_VALUES = st.sampled_from([0.0, -0.0, 1.0, 1.5, -2.0, 3e38, np.inf, -np.inf, np.nan])


@st.composite
def logits_and_masks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    """Logits with many ties and with what is no number, and masks, of which some allow all or nothing."""
    rows, vocab = draw(st.sampled_from([(1, 32), (1, 131), (3, 131), (4, 1000)]))
    seed = draw(st.integers(0, 2**32 - 1))
    logits = np.random.default_rng(seed).integers(-3, 3, (rows, vocab)).astype(np.float32)
    for row, token, value in draw(st.lists(st.tuples(st.integers(0, rows - 1), st.integers(0, vocab - 1), _VALUES), max_size=6)):
        logits[row, token] = value
    few = st.sampled_from([0, -1, 1, -(2**31)])
    masks = draw(arrays.arrays(np.int32, (rows, -(-vocab // 32)), elements=few | st.integers(-(2**31), 2**31 - 1)))
    for row, every in draw(st.lists(st.tuples(st.integers(0, rows - 1), st.sampled_from([0, -1])), max_size=2)):
        masks[row] = every
    return logits, masks


@jax.jit
def drawn(logits: jax.Array, masks: jax.Array) -> jax.Array:
    """What is sampled greedily from shaped logits."""
    rows = len(logits)
    floats, ints = RowTable(rows).of(list(range(rows)), rows)
    nothing = jnp.zeros((rows, 1), jnp.int32)
    scores = shape_logits(logits, masks, nothing, nothing.astype(jnp.float32))
    tokens: jax.Array = sample(scores, jnp.asarray(floats), jnp.asarray(ints), nothing, nothing[:, 0], logits).tokens
    return tokens


@settings(max_examples=200, deadline=None)
@given(logits_and_masks())
def test_the_likeliest_allowed_token_is_the_one_that_greedy_sampling_draws(case: tuple[np.ndarray, np.ndarray]) -> None:
    logits, masks = case
    chosen = np.asarray(jax.jit(choose)(logits, masks))
    np.testing.assert_array_equal(chosen, drawn(logits, masks))
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, : logits.shape[1]].astype(bool)
    for row, token in enumerate(chosen):
        possible = np.flatnonzero(bits[row])
        if np.isnan(logits[row, possible]).any() or not (logits[row, possible] > -np.inf).any():
            continue  # no token is the likeliest
        assert bits[row, token] and token == possible[np.argmax(logits[row, possible])]
