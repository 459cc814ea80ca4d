"""Which bodies of OpenAI's API are taken, and what the error of the others says."""

from __future__ import annotations

import json
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from mesh.errors import MeshError, MessageRejected
from mesh.gateway.app import _wrong_field
from mesh.gateway.openai_schema import ChatRequest, CompletionRequest
from mesh.gateway.schema import InferenceRequest
from mesh.protocol import documents
from mesh.protocol.generation import Generate

USER = {"role": "user", "content": "a"}


def read(model: type[BaseModel], body: dict[str, Any]) -> Any:
    """The body as a route gets it."""
    data = json.dumps(body).encode()
    return model.model_validate(documents.read(model, data, limit_bytes=len(data)))


def error_of(model: type[BaseModel], body: dict[str, Any]) -> MeshError | None:
    try:
        read(model, body)
    except ValidationError as error:
        found = error.errors()
        assert len(found) < 3, "each wrong item costs work"
        return _wrong_field(RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in found]))
    except MessageRejected as error:
        return error
    return None


def chat(**keys: Any) -> MeshError | None:
    return error_of(ChatRequest, {"model": "m", "messages": [USER], **keys})


def completion(**keys: Any) -> MeshError | None:
    return error_of(CompletionRequest, {"model": "m", "prompt": "a", **keys})


REPLAYED: dict[str, dict[str, Any]] = {
    "a plain one": {"content": "b"},
    "by openai-python": {"content": "b", "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
    "by LiteLLM": {
        "content": "b",
        "provider_specific_fields": {"refusal": None},
        "images": [],
        "thinking_blocks": None,
        "tool_calls": None,
    },
    "with reasoning": {"content": "b", "reasoning_content": "so", "reasoning": "so", "reasoning_details": [{}]},
    "without content": {"content": None, "refusal": "no", "tool_calls": []},
    "with parts": {"content": [{"type": "text", "text": "b", "annotations": [], "cache_control": {"type": "ephemeral"}}]},
    "of the responses API": {"id": "msg_1", "status": "completed", "content": "b"},
}


@pytest.mark.parametrize("how", REPLAYED)
def test_an_earlier_answer_comes_back_with_what_clients_add(how: str) -> None:
    assert chat(messages=[USER, {"role": "assistant", **REPLAYED[how]}, USER]) is None


HARMLESS: dict[str, Any] = {
    "user": "u" * 300, "safety_identifier": "s", "prompt_cache_key": "k", "prompt_cache_retention": "24h",
    "metadata": {"a": "b", "c": 1}, "store": True, "verbosity": "low", "reasoning_effort": "minimal", "parallel_tool_calls": True,
    "prediction": {"type": "content", "content": "x"}, "tools": [], "functions": [], "tool_choice": "none", "function_call": "auto",
    "chat_template_kwargs": {"enable_thinking": False, "budget": 5, "style": "plain"},
    "response_format": {"type": "text"}, "modalities": ["text"], "service_tier": "auto", "logit_bias": {},
}  # fmt: skip


@pytest.mark.parametrize("key", HARMLESS)
def test_a_key_that_cannot_change_an_answer_passes(key: str) -> None:
    assert chat(**{key: HARMLESS[key]}) is None


def test_echo_without_log_probabilities_passes() -> None:
    assert completion(echo=True) is completion(echo=False, logprobs=1) is None


@pytest.mark.parametrize("key", ["user", "safety_identifier", "prompt_cache_key", "metadata", "logit_bias"])
def test_completions_take_them_too(key: str) -> None:
    assert completion(**{key: HARMLESS[key]}) is None


def test_a_mesh_of_one_model_needs_no_name_of_it() -> None:
    assert chat(model=None) is completion(model=None) is None


@pytest.mark.parametrize(("choice", "formed"), [(None, True), ("auto", True), ("none", True), ("required", False)])
def test_a_form_is_of_the_text_and_calls_that_are_forced_have_none(choice: str | None, formed: bool) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    body = {"messages": [USER], "tools": tools, "tool_choice": choice, "response_format": {"type": "json_object"}}
    assert ("structured_outputs" in read(ChatRequest, body).turns()) is formed


def test_options_of_a_stream_pass_with_a_stream_alone() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    assert chat(stream=True, stream_options=options) is completion(stream=True, stream_options=options) is None
    for refused in (chat(stream_options=options), completion(stream_options={}, stream=False)):
        assert refused is not None and str(refused) == "stream_options: needs stream: true"
    assert chat(stream_options=None) is None


def test_null_is_a_key_that_is_left_out() -> None:
    """Also where a key is not known: it asks for nothing."""
    optional = [name for name, field in ChatRequest.model_fields.items() if not field.is_required()]
    assert chat(**dict.fromkeys([*optional, "seven", "of"])) is None
    plain: ChatRequest = read(ChatRequest, {"messages": [USER]})
    nulls: ChatRequest = read(ChatRequest, {"messages": [{**USER, "name": None, "x": None}], **dict.fromkeys(optional)})
    assert nulls == plain and nulls.sampling() == plain.sampling()
    native: InferenceRequest = read(InferenceRequest, {"prompt": "a", "temperature": None, "stop": None, "max_tokens": None, "x": None})
    assert native == read(InferenceRequest, {"prompt": "a"})
    assert Generate.parse(b'{"prompt": "a", "temperature": null, "stop": null, "x": null}') == Generate.parse(b'{"prompt": "a"}')


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"tools": [{"type": "function"}]}, "tools.0.function: is missing"),
        ({"functions": [{}]}, "functions: functions are OpenAI's older form of tools"),
        ({"tool_choice": "always"}, "tool_choice: should be 'auto', 'none' or 'required'"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.function: is missing"),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            "messages.1.tool_calls.0.function: is m",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format: needs json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name: is missing"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5: should be 100.0 or less"),
        ({"audio": {"voice": "a"}}, "audio: a mesh answers with text alone"),
        ({"modalities": ["text", "audio"]}, "modalities: a mesh answers with text alone"),
        ({"web_search_options": {}}, "web_search_options: a mesh searches nothing"),
        ({"service_tier": "priority"}, "service_tier: a mesh has one tier"),
        ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs: has messages, which the rest of the request"),
        ({"chat_template_kwargs": {"deep": [1]}}, "chat_template_kwargs.deep: should be true, false, a number or a text"),
        ({"chat_template_kwargs": {"long": "x" * 2000}}, "chat_template_kwargs.long: should be true, false, a number or a text"),
        ({"chat_template_kwargs": {f"a{n}": n for n in range(17)}}, "chat_template_kwargs"),
        ({"colour": "red"}, "colour is not a key here"),
        ({"temprature": 1}, "temprature is not a key here"),
    ],
)
def test_what_a_mesh_does_not_do_is_refused_by_name(body: dict[str, Any], says: str) -> None:
    refused = chat(**body)
    assert refused is not None and str(refused).startswith(says)
    assert getattr(refused, "field", "") == says.split(":")[0].split(" ")[0]


A_STOP = "stop: should be a text or a list of at most 4 texts"
CONTENT = 'messages.0.content: should be a text or a list of parts, each {"type": "text", "text": ...}'
PROMPT = "prompt: should be a text, a list of texts, a list of token ids, or a list of such lists"


@pytest.mark.parametrize(
    ("refused", "says"),
    [
        (chat(stop=["a"] * 5), "stop has 5 entries: at most 4 are taken"),
        (chat(stop=5), A_STOP),
        (chat(stop={"a": 1}), A_STOP),
        (chat(stop=["a", 1]), "stop.1: should be a text"),
        (chat(stop=["a", ""]), "stop.1: should have at least 1 character(s)"),
        (chat(stop="x" * 1001), "stop: should have at most 1000 characters"),
        (chat(messages=[{"role": "user", "content": 5}]), CONTENT),
        (chat(messages=[{"role": "user", "content": ["a"]}]), CONTENT),
        (
            chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
            "messages.0.content.0.type: should be 'text'",
        ),
        (chat(messages="a"), "messages: should be a list"),
        (chat(messages=[]), "messages: has 0 entries: give at least 1"),
        (chat(messages=None), "messages: is missing: give it"),
        (chat(temperature="hot"), "temperature: should be a number"),
        (chat(stream="yes"), "stream: should be true or false"),
        (chat(n=1.5), "n: should be a whole number"),
        (chat(top_logprobs=2), "top_logprobs: needs logprobs: true"),
        (completion(prompt=5), PROMPT),
        (completion(prompt={"a": 1}), PROMPT),
        (completion(prompt=["a", 1]), "prompt.1: should be a text"),
        (completion(prompt=[1, "a"]), "prompt.1: should be a whole number"),
        (completion(prompt=[[1], ["a"]]), "prompt.1.0: should be a whole number"),
        (completion(prompt=[1, -1]), "prompt.1: should be 0 or more"),
        (completion(echo=True, logprobs=0), "echo: a mesh knows no log-probabilities of a prompt: leave out echo or logprobs"),
        (completion(suffix="b"), "suffix: a mesh continues a text, and inserts nothing: leave it out"),
        (completion(best_of=3), "best_of: is not n: a mesh gives out every choice it makes"),
    ],
)  # fmt: skip
def test_an_error_is_one_sentence_about_the_callers_own_key(refused: MeshError | None, says: str) -> None:
    """No name of one of our types, and no branch of a union."""
    assert str(refused) == says
    assert getattr(refused, "field", None) == says.split(":")[0].split(" has ")[0]
