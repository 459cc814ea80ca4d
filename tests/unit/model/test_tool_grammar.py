"""Grammars of calls: whatever is drawn from them is read back as calls of the right tools, with arguments that follow their schemas."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from tiny_chat_model import byte_level
from tokenizers import AddedToken

from mesh.errors import BadRequest
from mesh.model.grammar import Vocabulary
from mesh.model.manifest import TokenizerInfo
from mesh.model.tokenizer import Tokenizer
from mesh.model.tool_grammar import tool_grammar
from mesh.protocol.structured import StructuredOutputs
from mesh.protocol.tools import FORMATS, FunctionName, NamedChoice, Tool, ToolChoice, calls_of

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
NODE = {
    "type": "object",
    "properties": {"n": {"$ref": "#/$defs/n"}},
    "required": ["n"],
    "additionalProperties": False,
    "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
}
SCHEMAS: dict[str, dict[str, Any]] = {"weather": CITY, "count": NODE}


def tool(name: str, *, strict: bool = True, parameters: dict[str, Any] | None = None) -> Tool:
    function = {"name": name, "strict": strict, "parameters": SCHEMAS.get(name) if parameters is None else parameters}
    return Tool.model_validate({"type": "function", "function": function})


TOOLS = (tool("weather"), tool("count"))


class Made:
    """A tokenizer in which marks are letters, tokens of the vocabulary, or control tokens."""

    def __init__(self, marks: str) -> None:
        self.backend = byte_level()
        texts = sorted({mark for form in FORMATS.values() for mark in form.markers})
        if marks == "added":
            self.backend.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
        elif marks == "control":
            self.backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in texts])
        self.end: int = self.backend.encode("<|end|>", add_special_tokens=False).ids[0]
        info = TokenizerInfo(eos_ids=(self.end,))
        self.tokenizer = Tokenizer(self.backend, info)

        class Named:
            name, vocab_size = "tiny", self.backend.get_vocab_size()

        self.vocabulary = Vocabulary.of(self.backend.to_str(), [self.end], Named())  # type: ignore[arg-type]

    def draw(self, grammar: str, seed: int, most: int = 3000) -> str:
        """A text of the grammar; calls end early, and so does the text before them."""
        matcher, draw, answer = self.vocabulary.matcher(grammar), random.Random(seed), list[int]()
        while len(answer) < most:
            matcher.go_to(answer)
            mask = matcher.allowed()
            assert mask is not None
            allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()
            if self.end in allowed and (len(allowed) == 1 or draw.random() < 0.4):
                return str(self.backend.decode(answer, skip_special_tokens=False))
            answer.append(draw.choice([token for token in allowed if token != self.end]))
        raise AssertionError("no end")


@pytest.fixture(scope="module", params=["letters", "added", "control"])
def made(request: pytest.FixtureRequest) -> Made:
    return Made(request.param)


def grammar(
    made: Made,
    form: str,
    choice: ToolChoice | None,
    *,
    parallel: bool = True,
    tools: tuple[Tool, ...] = TOOLS,
    answer: StructuredOutputs | None = None,
) -> str | None:
    marks = {"form": FORMATS[form], "tokenizer": made.tokenizer, "vocabulary": made.vocabulary}
    return tool_grammar(tools, choice, parallel=parallel, answer=answer, **marks)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", sorted(FORMATS))
@pytest.mark.parametrize("parallel", [True, False])
def test_what_is_forced_is_read_back_as_right_calls(made: Made, form: str, parallel: bool) -> None:
    written = grammar(made, form, "required", parallel=parallel)
    assert written is not None
    counts = set()
    for seed in range(8):
        text = made.draw(written, seed)
        content, calls = calls_of(text, FORMATS[form], SCHEMAS, "r")
        assert calls and not content.strip(), text
        for call in calls:
            assert jsonschema_rs.is_valid(SCHEMAS[call.function.name], json.loads(call.function.arguments)), text
        counts.add(len(calls))
    assert counts == {1} if not parallel else max(counts) > 1


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_one_function_is_called_once(made: Made, form: str) -> None:
    written = grammar(made, form, NamedChoice(type="function", function=FunctionName(name="count")))
    assert written is not None
    for seed in range(4):
        _, calls = calls_of(made.draw(written, seed), FORMATS[form], SCHEMAS, "r")
        assert [call.function.name for call in calls] == ["count"]


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_with_a_strict_tool_text_is_free_and_calls_are_right(made: Made, form: str) -> None:
    written = grammar(made, form, None)
    assert written is not None
    matcher = made.vocabulary.matcher(written)
    encode = made.backend.encode
    key = FORMATS[form].key
    begin, end = FORMATS[form].begin, FORMATS[form].end
    call = '{"name": "count", "' + key + '": {"n": 7}}'
    whole = {"hermes": f"{begin}{call}{end}", "llama": call}.get(form, f"{begin}[{call}]{end}")
    wrong = whole.replace('"n": 7', '"n": 777')
    for text, right in ((f"Hello, {{world}}. {'' if form == 'llama' else whole}", True), (whole, True), (wrong, False)):
        ids = list(encode(text, add_special_tokens=False).ids)
        matcher.go_to(ids)
        assert (matcher.allowed() is not None) is right, text


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_an_answer_calls_or_has_the_form_that_was_asked_for(made: Made, form: str) -> None:
    """Also where no tool is strict, and where both begin with the same letters, as Llama's calls and JSON do."""
    verdict = {"type": "object", "properties": {"verdict": {"enum": ["yes", "no"]}}, "required": ["verdict"], "additionalProperties": False}
    tools = tuple(tool(name, strict=False) for name in SCHEMAS)
    written = grammar(made, form, "auto", parallel=False, tools=tools, answer=StructuredOutputs.model_validate({"json": verdict}))
    assert written is not None
    called = set()
    for seed in range(12):
        text = made.draw(written, seed)
        content, calls = calls_of(text, FORMATS[form], SCHEMAS, "r")
        called.add(bool(calls))
        if calls:
            assert not content.strip() and all(
                jsonschema_rs.is_valid(SCHEMAS[c.function.name], json.loads(c.function.arguments)) for c in calls
            )
        else:
            assert jsonschema_rs.is_valid(verdict, json.loads(content)), text
    assert called == {True, False}


def test_a_form_beside_tools_that_is_not_supported_is_an_error(made: Made) -> None:
    for schema in ({"type": "object", "properties": {"a": {"not": {}}}}, {"type": "hiccup"}):
        with pytest.raises(BadRequest) as refused:
            grammar(made, "hermes", "auto", answer=StructuredOutputs.model_validate({"json": schema}))
        assert refused.value.field == "structured_outputs"


def test_parameters_of_a_type_that_json_does_not_have_are_an_error_also_where_the_tool_is_not_strict(made: Made) -> None:
    parameters = {"type": "object", "properties": {"type": {"type": ["string", "hiccup"]}}}
    with pytest.raises(BadRequest, match="the parameters of odd has the type 'hiccup', which JSON does not have") as refused:
        grammar(made, "hermes", "required", tools=(tool("odd", strict=False, parameters=parameters),))
    assert refused.value.field == "tools"
    named = {"type": "object", "properties": {"type": {"const": {"type": "hiccup"}}, "default": {"type": "string"}}}
    assert grammar(made, "hermes", "required", tools=(tool("odd", strict=False, parameters=named),)) is not None


def test_auto_without_a_strict_tool_needs_no_grammar(made: Made) -> None:
    assert grammar(made, "hermes", "auto", tools=(tool("weather", strict=False),)) is None


def test_a_strict_tool_whose_schema_is_not_supported_is_named_and_another_may_have_any_object(made: Made) -> None:
    parameters = {"type": "object", "properties": {"a": {"not": {}}}}
    with pytest.raises(BadRequest, match=r"the tool odd is strict.*not") as refused:
        grammar(made, "hermes", "required", tools=(tool("odd", parameters=parameters),))
    assert refused.value.field == "tools"
    assert grammar(made, "hermes", "required", tools=(tool("odd", strict=False, parameters=parameters),)) is not None
