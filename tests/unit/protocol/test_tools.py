"""Tool calls in texts of the common families, whole and cut anywhere."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.protocol.tools import FORMATS, CallPart, ToolParser, calls_of, format_of, joined

NAMES = ("weather", "add")
WEATHER, ADD = {"city": 'Pa"ris {[', "days": [1, {"a": "}"}]}, {"a": 1, "b": -2.5e3}


def call(name: str, arguments: object, key: str = "arguments") -> str:
    return json.dumps({"name": name, key: arguments}, ensure_ascii=False)


CASES = [
    ("hermes", f"<tool_call>\n{call('weather', WEATHER)}\n</tool_call>", "", [("weather", WEATHER)]),
    ("hermes", f"I look.\n<tool_call>{call('add', ADD)}</tool_call>\n<tool_call>{call('weather', {})}</tool_call>", "I look.\n",
     [("add", ADD), ("weather", {})]),
    ("hermes", f"<tool_call>[{call('add', ADD)}, {call('add', ADD)}]</tool_call>", "", [("add", ADD), ("add", ADD)]),  # SmolLM
    ("hermes", f"<tool_call>{json.dumps({'arguments': ADD, 'name': 'add'})}</tool_call>", "", [("add", ADD)]),
    ("hermes", f"<tool_call>{call('add', json.dumps(ADD))}</tool_call>", "", [("add", ADD)]),  # arguments as a text
    ("hermes", '<tool_call>{"name": "add"}</tool_call>', "", [("add", {})]),
    ("llama", f"<|python_tag|>{call('add', ADD, 'parameters')}", "", [("add", ADD)]),
    ("llama", f"{call('add', ADD, 'parameters')}; {call('weather', WEATHER, 'parameters')}", "", [("add", ADD), ("weather", WEATHER)]),
    ("mistral", f"[TOOL_CALLS][{call('add', ADD)}, {call('weather', WEATHER)}]", "", [("add", ADD), ("weather", WEATHER)]),
    ("mistral", f"[TOOL_CALLS] [{call('add', ADD)}]", "", [("add", ADD)]),
    ("phi", f"<|tool_call|>[{call('add', ADD)}]<|/tool_call|>", "", [("add", ADD)]),
    # no calls: the text stays as it is
    ("hermes", "1 < 2 and <tool", "1 < 2 and <tool", []),
    ("hermes", "<tool_call>not json</tool_call> more", "<tool_call>not json</tool_call> more", []),
    ("hermes", f"<tool_call>{call('unknown', ADD)}</tool_call>", f"<tool_call>{call('unknown', ADD)}</tool_call>", []),
    ("llama", '{"answer": 42}', '{"answer": 42}', []),
    ("llama", '{"name": "Ada", "age": 36} is JSON', '{"name": "Ada", "age": 36} is JSON', []),
    ("mistral", "no call", "no call", []),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "rest", "calls"), CASES)
def test_calls_are_read_whole_and_however_the_text_is_cut(form: str, text: str, rest: str, calls: list[tuple[str, object]]) -> None:
    content, found = calls_of(text, FORMATS[form], NAMES, "r")
    assert content == rest
    assert [(each.function.name, json.loads(each.function.arguments)) for each in found] == calls
    assert len({each.id for each in found}) == len(found)
    for size in (1, 2, 3, 7):
        parser = ToolParser(FORMATS[form], NAMES, "r")
        parts = [part for at in range(0, len(text), size) for part in parser.push(text[at : at + size])]
        assert joined([*parts, *parser.finish()]) == (content, found)


@given(st.sampled_from(CASES), st.lists(st.integers(0, 200), max_size=6))
def test_any_cut_gives_the_same(case: tuple[str, str, str, object], cuts: list[int]) -> None:
    form, text, _, _ = case
    parser, parts, at = ToolParser(FORMATS[form], NAMES, "r"), [], 0
    for cut in sorted(cuts):
        parts += parser.push(text[at : max(cut, at)])
        at = max(cut, at)
    parts += [*parser.push(text[at:]), *parser.finish()]
    assert joined(parts) == calls_of(text, FORMATS[form], NAMES, "r")


@given(st.sampled_from(sorted(FORMATS)), st.text(alphabet='{}[]",:;\\ nameadd<tool_cl>/|', max_size=80))
def test_no_text_makes_it_fail_or_lose_a_character_where_there_is_no_call(form: str, text: str) -> None:
    content, calls = calls_of(text, FORMATS[form], NAMES, "r")
    if not calls:
        assert content == text


def test_arguments_come_while_they_are_written() -> None:
    parser = ToolParser(FORMATS["hermes"], NAMES, "r")
    assert parser.push('ok <tool_call>{"name": "ad') == ["ok "]
    assert parser.push('d", "arguments": {"a"') == [CallPart(0, '{"a"', parser._id(0), "add")]
    assert parser.push(": 1") == [CallPart(0, ": 1")]
    assert parser.push("}") == [CallPart(0, "}")]
    assert parser.push("}</tool_call>") == [] and parser.finish() == []


def test_a_call_that_max_tokens_ends_keeps_what_there_is() -> None:
    _, calls = calls_of('<tool_call>{"name": "add", "arguments": {"a": 1', FORMATS["hermes"], NAMES, "r")
    assert [each.function.arguments for each in calls] == ['{"a": 1']


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<tool_call>' }}", "hermes"),
        ("{{ '[TOOL_CALLS]' }}", "mistral"),
        ("{{ '<|tool_call|>' }}", "phi"),
        ("{{ '<|start_header_id|>' }} {'parameters': ...} {{ '<|python_tag|>' }}", "llama"),
        ("{{ '<|start_header_id|>' }} {'name': ..., 'parameters': ...}", "llama"),
        ("{{ '<start_of_turn>' }}", "hermes"),
        (None, "hermes"),
    ],
)
def test_the_form_is_chosen_from_the_template(template: str | None, name: str) -> None:
    assert format_of(template).name == name
