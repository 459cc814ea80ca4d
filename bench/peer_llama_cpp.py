"""Cases of llama.cpp's server: see peer_cases.py."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from peer_asking import (
    MODEL,
    Body,
    Case,
    Check,
    all_of,
    both_ways,
    calls_in,
    choice_of,
    function,
    ok,
    refused,
    says,
    sends,
    well_called,
)
from peer_checks import (
    TALK,
    all_the_same,
    counted,
    is_message,
    is_response,
    only_input,
    output_text,
    packed,
    tool_or_text,
    usage_at_start,
    vectors,
    whole_message,
    whole_response_stream,
    whole_stream,
)

__all__ = ["suites"]

TOOL = {
    "name": "get_weather",
    "description": "Current weather",
    "input_schema": {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]},
}
CALL = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"location": "Paris"}}


def embeddings() -> Iterator[Case]:
    suite, path, text = "llama.cpp, embedding", "/v1/embeddings", "I believe the meaning of life is"
    texts = [text, "Write a joke about AI from a very long prompt which will not be truncated", "This is a test", "This is another test"]

    def case(name: str, given: Any, check: Check, reason: str = "", **more: Any) -> Case:
        return Case(suite, name, sends(path, {"input": given, **more}, check), reason)

    yield case("single", text, vectors(1))
    yield case("multiple", texts, vectors(4))
    yield case("lengths about 256", ["a " * 253, "b " * 254, "c " * 255, "d " * 256], vectors(4))
    yield case("mixed: nothing", "", vectors(1), "empty text")
    yield case("mixed: a text", "string", vectors(1))
    yield case("mixed: ids", [12, 34, 56], vectors(1))
    yield case("mixed: ids and texts", [12, 34, "string", 56, 78], vectors(1), "mixed lists")
    yield case("mixed: texts", ["string1", "string2"], vectors(2))
    yield case("mixed: a text and ids", ["string1", [12, 34, 56]], vectors(2), "mixed lists")
    yield case("mixed: lists of ids", [[12, 34, 56], [12, 34, 56]], vectors(2))
    yield case("mixed: lists of ids and texts", [[12, 34, 56], [12, "string", 34, 56]], vectors(2), "mixed lists")
    yield case("mixed: an object", {"prompt_string": "string"}, vectors(1), "objects as input")
    yield case("mixed: content", {"content": [{"type": "text", "text": "string"}]}, vectors(1), "objects as input")
    yield case("mixed: texts and objects", ["string1", {"prompt_string": "string2"}], vectors(2), "objects as input")
    yield case("content is as a text", ["hello", {"content": [{"type": "text", "text": "hello"}]}], vectors(2), "objects as input")
    for name, given in (
        ("nothing", []),
        ("content that is no list", {"content": "string"}),
        ("audio", {"content": [{"type": "input_audio", "input_audio": {}}]}),
        ("an image", {"content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}),
    ):
        yield case(f"invalid: {name}", given, refused)
    yield case("pooling mean", text, vectors(1), "another pooling", pooling="mean")
    yield case("pooling mean, multiple", texts[:3], vectors(3), "another pooling", pooling="mean")
    yield Case(suite, "pooling none", sends("/embeddings", {"input": "hello hello hello"}, ok), "another route")
    yield case("pooling none is refused", "hello hello hello", refused, pooling="none")
    yield case("a prompt that is too long", "This is a test " * 2048, refused)
    yield case("the same five times", [text] * 5, all_the_same)
    yield case("usage", text, counted(1))
    yield case("usage of another text", "This is a test", counted(1))
    yield case("usage of two", [text, text], counted(2))
    yield case("base64", "Test base64 embedding output", packed, encoding_format="base64")


def anthropic() -> Iterator[Case]:
    suite, path = "llama.cpp, anthropic", "/v1/messages"
    hello = [{"role": "user", "content": "Say hello"}]

    def case(name: str, check: Check, reason: str = "", messages: Any = hello, stream: bool = False, **more: Any) -> Case:
        body = {"model": MODEL, "max_tokens": 20, "messages": messages, **more} | ({"stream": True} if stream else {})
        return Case(suite, name, sends(path, body, check), reason)

    def after(*blocks: Body) -> list[Body]:
        return [hello[0], {"role": "assistant", "content": [CALL]}, {"role": "user", "content": list(blocks)}]

    result = {"type": "tool_result", "tool_use_id": "t1", "content": "sunny, 25°C"}
    yield case("basic", whole_message)
    yield case("system", is_message, system="You are a helpful assistant.")
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": " the answer?"}]
    yield case("several parts", is_message, messages=[{"role": "user", "content": parts}])
    yield case("several turns", is_message, messages=TALK)
    yield case("streaming", whole_stream, stream=True)
    yield case("streaming: tokens of the prompt at the start", usage_at_start, "usage at the start", stream=True)
    count = {"model": MODEL, "messages": hello}
    yield Case(suite, "count tokens", sends(f"{path}/count_tokens", count, only_input))
    yield Case(suite, "count tokens with a system", sends(f"{path}/count_tokens", {**count, "system": "Be brief."}, only_input))
    yield Case(suite, "count tokens without max_tokens", sends(f"{path}/count_tokens", count, only_input))
    yield case("tool use", tool_or_text, tools=[TOOL])
    yield case("tool result", is_message, messages=after(result))
    yield case("tool result and text", is_message, messages=after(result, {"type": "text", "text": "Here it is."}))
    yield case("tool result with an error", is_message, messages=after({**result, "is_error": True}))
    yield case("tool use, streaming", whole_stream, tools=[TOOL], stream=True)
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}}
    yield case("an image", lambda status, body: status == 500, "images", messages=[{"role": "user", "content": [image]}])
    yield case("an image for a model that sees", is_message, "images", messages=[{"role": "user", "content": [image]}])
    yield case("stop sequences", is_message, stop_sequences=["\n\n", "END"])
    yield case("temperature", is_message, temperature=0.5)
    yield case("top_p", is_message, top_p=0.9)
    yield case("top_k", is_message, top_k=40)
    yield Case(suite, "messages are missing", sends(path, {"model": MODEL, "max_tokens": 5}, refused))
    yield case("messages are empty", is_message, "no messages", messages=[])
    yield case("indices of blocks", whole_stream, tools=[TOOL], stream=True)
    yield case("thinking", is_message, "thinking", thinking={"type": "enabled", "budget_tokens": 50})
    yield case("metadata", is_message, metadata={"user_id": "somebody"})
    yield case("a model that thinks", is_message, "thinking", thinking={"type": "enabled", "budget_tokens": 500})
    yield case("a model that thinks, streaming", whole_stream, "thinking", stream=True, thinking={"type": "enabled", "budget_tokens": 500})


def chat() -> Iterator[Case]:
    suite, path = "llama.cpp, chat", "/v1/chat/completions"
    messages = [{"role": "system", "content": "You are a coding assistant."}, {"role": "user", "content": "Write an example"}]

    def reads(pattern: str) -> Check:
        return lambda status, body: status == 200 and re.search(pattern, body["choices"][0]["message"]["content"]) is not None

    def case(name: str, check: Check, reason: str = "", **more: Any) -> Case:
        return Case(suite, name, sends(path, {"model": MODEL, "max_tokens": 20, "messages": messages, **more}, check), reason)

    def form(name: str, check: Check, reason: str = "", **format: Any) -> Case:
        return case(f"response_format: {name}", check, reason, response_format=format)

    yield case("a completion", lambda status, body: "cmpl" in body["id"] and body["usage"]["completion_tokens"] > 0)
    yield case("its fingerprint", lambda status, body: bool(body.get("system_fingerprint")), "fingerprint")
    yield form("an object by a schema", reads('"42"'), "keys of that server", type="json_object", schema={"const": "42"})
    items = {"items": [{"type": "integer"}]}
    yield form("items as a list", reads(r"\["), "keys of that server", type="json_object", schema=items)
    yield form("a constant", reads('"foooooo"'), type="json_schema", json_schema={"name": "x", "schema": {"const": "foooooo"}})
    yield form("any object", reads(r"^\s*\{"), type="json_object")
    yield form("sound", refused, type="sound")
    yield form("a schema that is a number", refused, type="json_object", schema=123)
    yield form("a type that is a number", refused, type="json_schema", json_schema={"name": "x", "schema": {"type": 123}})
    yield form("a type that is none", refused, type="json_schema", json_schema={"name": "x", "schema": {"type": "hiccup"}})
    yield case("json_schema", reads('"42"'), "keys of that server", json_schema={"const": "42"})
    yield case("grammar", reads("^a{5}$"), "keys of that server", grammar='root ::= "a"{5,5}')
    yield case("the same by structured_outputs", reads("^a{5}$"), structured_outputs={"grammar": 'root ::= "a"{5,5}'})
    wrong: tuple[Any, ...] = (None, "string", [123], [{}], [{"role": 123}], [{"role": "system", "content": 123}], [messages[0], {}])
    for number, given in enumerate(wrong):
        yield case(f"invalid messages {number + 1}", refused, messages=given)
    twice = [messages[1], {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    yield case("two messages of the assistant", refused, "two turns of one side", messages=twice)

    def joined(status: int, body: Any) -> bool:
        choice = body["choices"][0]
        entries = choice["logprobs"]["content"]
        whole = "".join(each["token"] for each in entries) == choice["message"]["content"]
        return whole and all(each["logprob"] <= 0 and each["bytes"] is not None and each["top_logprobs"] for each in entries)

    yield case("logprobs", joined, temperature=0.0, logprobs=True, top_logprobs=10, max_tokens=5)


PYTHON = function("python", ["code"], code={"type": "string"})
TEST = function("test", ["success"], success={"type": "boolean", "const": True})
WEATHER = function("get_current_weather", ["location"], location={"type": "string"})
CALCULATE = function("calculate", ["expression"], expression={"type": "string"})


def tool_calls() -> Iterator[Case]:
    """Its cases name no model, as it serves one alone. What its models then call is left out."""
    suite, path = "llama.cpp, tool calls", "/v1/chat/completions"
    coding = [{"role": "system", "content": "You write code."}, {"role": "user", "content": "Show me something short"}]

    def asked(name: str, messages: list[Body], check: Check, **more: Any) -> Iterator[Case]:
        for way, run in both_ways(path, {"max_tokens": 96, "temperature": 0.0, "messages": messages, **more}, check):
            yield Case(suite, name + way, run)

    for tool in (TEST, PYTHON):
        must = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False, "top_k": 1, "top_p": 1.0, "max_tokens": 512}
        yield from asked(f"required: {tool['function']['name']}", coding, well_called([tool], least=1, most=1), **must)

    def calls_nothing(status: int, body: Any) -> bool:
        return status == 200 and not calls_in(body) and choice_of(body)["message"]["content"] is not None

    hello = [coding[0], {"role": "user", "content": "print hello world in python"}]
    yield from asked("no tools", hello, calls_nothing, tools=None, tool_choice=None)
    yield from asked("a tool, and no choice", hello, well_called([TEST]), tools=[TEST], tool_choice=None)
    yield from asked("a tool that may not be called", hello, calls_nothing, tools=[PYTHON], tool_choice="none")
    weather = [{"role": "system", "content": "You use tools."}, {"role": "user", "content": "How is the weather in Istanbul?"}]
    yield from asked("weather", weather, well_called([WEATHER]), tools=[WEATHER])
    call = {"id": "call_6789", "type": "function", "function": {"name": "calculate", "arguments": '{"expression":"sin(30 * pi / 180)"}'}}
    result = {"role": "tool", "name": "calculate", "content": "0.556", "tool_call_id": "call_6789"}
    done: list[Body] = [
        {"role": "user", "content": "What is the sine of 30 degrees?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        result,
    ]
    yield from asked("the result of a call", done, well_called([CALCULATE]), tools=[CALCULATE])
    yield from asked("no thoughts", [{"role": "user", "content": "What is 102 plus 7?"}], calls_nothing)
    yield from asked("hello world", hello, well_called([PYTHON]), tools=[PYTHON])
    bad = {**call, "function": {"name": "test", "arguments": "{"}}
    broken = [coding[1], {"role": "assistant", "content": None, "tool_calls": [bad]}, {"role": "user", "content": "Go on"}]
    wrong = {"max_tokens": 128, "messages": broken}
    yield Case(
        suite,
        "arguments of a call that are no JSON",
        sends(path, wrong, all_of(says("arguments"), lambda _, body: body["error"]["type"] == "invalid_request_error")),
    )


def responses() -> Iterator[Case]:
    suite = "llama.cpp, responses"
    conversation = [{"role": "system", "content": "Book"}, {"role": "user", "content": "Which book is the best?"}]
    asked = {"model": MODEL, "input": conversation, "max_output_tokens": 8, "temperature": 0.8}

    def form(name: str, check: Check, /, **form: Any) -> Case:
        body = {"input": "Write an example", "max_output_tokens": 10, "text": {"format": form}}
        return Case(suite, f"text.format: {name}", sends("/v1/responses", body, check))

    def text(pattern: str) -> Check:
        return lambda status, body: status == 200 and re.search(pattern, output_text(body)) is not None

    yield form("a constant", text('"foooooo"'), type="json_schema", name="test", schema={"const": "foooooo"})
    yield form("any object", text(r"\{"), type="json_object")
    yield form("text", text(""), type="text")
    yield form("no schema", refused, type="json_schema", name="test")
    yield Case(suite, "a response", sends("/v1/responses", asked, is_response))
    yield Case(suite, "its events", sends("/v1/responses", asked | {"stream": True}, whole_response_stream))
    more = asked | {"stream": True, "timings_per_token": True, "return_progress": True}
    yield Case(suite, "progress and timings", sends("/v1/responses", more, whole_response_stream), "keys of that server")


def tokens() -> Iterator[Case]:
    suite, text = "llama.cpp, tokenize", "What is the capital of France ?"
    for name, body in (
        ("content", {"content": text}),
        ("content with a bos", {"content": text, "add_special": True}),
        ("content with pieces", {"content": "This is a test with unicode 媽 and 🤗", "with_pieces": True}),
    ):
        yield Case(
            suite, name, sends("/tokenize", body, lambda status, body: status == 200 and len(body["tokens"]) > 5), "keys of that server"
        )


def suites() -> Iterator[Case]:
    yield from embeddings()
    yield from anthropic()
    yield from chat()
    yield from tool_calls()
    yield from responses()
    yield from tokens()
