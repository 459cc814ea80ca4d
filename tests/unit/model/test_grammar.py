"""Grammars: what a form of answers allows, what is refused and why, and that a matcher's state is a function of its tokens."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_chat_model import byte_level

from mesh.errors import BadRequest
from mesh.model.grammar import MAX_DEPTH, Matcher, Vocabulary, grammar_of
from mesh.protocol.structured import StructuredOutputs

TOKENIZER = byte_level()
END = TOKENIZER.get_vocab_size() - 1
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


class _Named:
    name, vocab_size = "tiny", END + 1


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.of(TOKENIZER.to_str(), [END], _Named())  # type: ignore[arg-type]


def _form(form: dict[str, Any]) -> StructuredOutputs:
    return StructuredOutputs.model_validate_json(json.dumps(form))


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False).ids)


def allowed(matcher: Matcher) -> set[int]:
    mask = matcher.allowed()
    assert mask is not None
    return {int(token) for token in np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")) if token <= END}


def takes(vocabulary: Vocabulary, form: dict[str, Any], text: str) -> bool:
    """Whether the form allows each character of `text`, and then the end."""
    matcher = vocabulary.matcher(grammar_of(_form(form)))
    so_far: list[int] = []
    for token in [*ids(text), END]:
        matcher.go_to(so_far)
        if token not in allowed(matcher):
            return False
        so_far.append(token)
    return True


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        ({"json": PERSON}, '{"name":"Ada","age":36}', '{"name":"Ada"}'),
        ({"json": PERSON}, '{"name": "Ada", "age": 36}', '{"name":"Ada","age":-1}'),
        ({"json_object": True}, '{"a": [1, {"b": null}]}', "[1]"),
        ({"regex": "[a-c]{2}-[0-9]+"}, "ab-42", "ab-"),
        ({"choice": ["yes", "no"]}, "no", "maybe"),
        ({"grammar": 'start: "a" /[0-9]/ "b"'}, "a7b", "a7"),
        ({"grammar": 'root ::= "a" [0-9] "b"'}, "a7b", "a77b"),
        ({"json": {"enum": ["x", 1, None]}}, "null", "true"),
        ({"json": {"type": "object", "additionalProperties": {"type": "integer"}}}, '{"k": 1}', '{"k": "1"}'),
    ],
)
def test_a_form_takes_what_it_describes_and_nothing_else(vocabulary: Vocabulary, form: dict[str, Any], right: str, wrong: str) -> None:
    vocabulary.require(grammar_of(_form(form)))
    assert takes(vocabulary, form, right)
    assert not takes(vocabulary, form, wrong)


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json": {"type": "array", "contains": {"type": "null"}}}, "contains"),
        ({"json": {"not": {"type": "null"}}}, "not"),
        ({"json": {"type": "string", "format": "idn-email"}}, "idn-email"),
        ({"json": {"type": "object", "properties": {"a": {"if": True}}}}, "if"),
        ({"json": {"allOf": [{"type": "integer"}, {"type": "string"}]}}, "incompatible types"),
        ({"json": {"type": "string", "minLength": 5, "maxLength": 2}}, "minLength"),
        ({"json": {"type": "integer", "minimum": 5, "maximum": 2}}, "minimum"),
        ({"json": {"$ref": "#"}}, "no end"),
        ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}}, "no end"),
        (
            {"json": {"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"n": {"$ref": "#/$defs/a"}}, "required": ["n"]}}}},
            "#/$defs/a requires itself",
        ),
        ({"json": {"$ref": "https://example.org/schema"}}, "example.org"),
        ({"json": {"$ref": "#/$defs/missing"}}, "missing"),
        ({"json": deep(MAX_DEPTH)}, "nests too deeply"),
        ({"json": {"enum": ["x" * 20 + str(number) for number in range(40_000)]}}, "bytes: at most"),
        ({"json": {"enum": list(range(5000))}}, "a list of 5,000 entries"),
        ({"json": {"properties": {f"p{number}": {} for number in range(1000)}}}, "an object with 1,000 keys"),
        ({"regex": "(a"}, "unclosed group"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"grammar": "start: missing"}, "missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_not_supported_is_named_within_a_tenth_of_a_second(vocabulary: Vocabulary, form: dict[str, Any], why: str) -> None:
    wanted = _form(form)
    began = time.process_time()
    with pytest.raises(BadRequest) as refused:
        vocabulary.require(grammar_of(wanted))
    assert time.process_time() - began < 0.1
    assert why in str(refused.value) and refused.value.field == "structured_outputs" and len(str(refused.value)) < 1000


def test_a_reference_may_lead_back_where_an_answer_can_end(vocabulary: Vocabulary) -> None:
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}, "required": ["next"]}
    assert takes(vocabulary, {"json": {"$ref": "#/$defs/n", "$defs": {"n": node}}}, '{"next": {"next": null}}')


def test_exactly_one_form_is_given() -> None:
    for form in ({}, {"json_object": False}, {"regex": "a", "choice": ["a"]}):
        with pytest.raises(ValueError, match="exactly one of json"):
            _form(form)


def test_null_in_a_schema_stays() -> None:
    form = StructuredOutputs.model_validate_json(json.dumps({"json": {"const": None}, "regex": None}))
    assert form.request() == {"json": {"const": None}}


def test_the_state_is_a_function_of_the_tokens_whatever_came_before(vocabulary: Vocabulary) -> None:
    grammar = grammar_of(StructuredOutputs(json=PERSON))
    text = ids('{"name":"Ada","age":36}')
    masks = []
    for length in range(len(text) + 1):
        fresh = vocabulary.matcher(grammar)
        fresh.go_to(text[:length])
        masks.append(allowed(fresh))
    wandering = vocabulary.matcher(grammar)
    for length in [*range(len(text)), 3, 10, 0, len(text), 5, 5]:
        wandering.go_to(text[:length])
        assert allowed(wandering) == masks[length]
    wandering.go_to(ids("nonsense"))
    assert wandering.allowed() is None
    wandering.go_to(text[:7])
    assert allowed(wandering) == masks[7]


def test_an_answer_that_has_ended_can_begin_again(vocabulary: Vocabulary) -> None:
    matcher = vocabulary.matcher(grammar_of(StructuredOutputs(json=PERSON)))
    for text in ('{"name":"Ada","age":36}', '{"name":"A","age":1}'):
        for length in range(len(text) + 1):
            matcher.go_to(ids(text)[:length])
            assert matcher.allowed() is not None
        matcher.go_to([*ids(text), END])
    matcher.go_to(ids('{"name":"Ada"'))
    assert allowed(matcher) >= set(ids(","))


def test_a_matcher_does_not_change_another_of_the_same_grammar(vocabulary: Vocabulary) -> None:
    grammar = grammar_of(StructuredOutputs(choice=("ab", "cd")))
    first, second = vocabulary.matcher(grammar), vocabulary.matcher(grammar)
    first.go_to(ids("a"))
    assert allowed(first) == set(ids("b")) and allowed(second) == {*ids("a"), *ids("c")}


def test_a_model_without_an_end_token_or_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no end token"):
        Vocabulary.of(TOKENIZER.to_str(), [], _Named())  # type: ignore[arg-type]
