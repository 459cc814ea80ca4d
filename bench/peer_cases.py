"""The cases of other servers' own test suites, asked of a gateway: what passes, and what is answered in its place where it does not.

    python bench/peer_cases.py http://127.0.0.1:8080 MODEL

Each case is a request that a suite sends, in words of its own, and what the suite then expects. What depends on the suite's model (which
words it says) is left out. A case whose expectation this project does not share has its reason in REASONS; one that fails without a reason
ends the run with status 1.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import re
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

Body = dict[str, Any]
Check = Callable[[int, Any], bool]

WEATHER = {"type": "object", "properties": {"location": {"type": "string"}}, "required": ["location"]}
TOOL = {"name": "get_weather", "description": "Current weather", "input_schema": WEATHER}
CALL = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"location": "Paris"}}
TALK = [{"role": "user", "content": "A."}, {"role": "assistant", "content": "B."}, {"role": "user", "content": "C."}]

REASONS = {
    "mixed lists": "a list is of texts, of token ids, or of lists of ids: OpenAI's own schema",
    "objects as input": "OpenAI's schema has no objects there",
    "empty text": "a text without a token has no last token: a 400 that names it",
    "another pooling": "mean needs the states of all positions; positions that are reused have none",
    "messages to embed": "not in OpenAI's embeddings; `messages` with `embed` works over NATS",
    "truncation": "nothing is cut in silence: a 400 that says so",
    "another route": "a route of that server alone",
    "images": "a mesh takes text alone: a 400, where the suite expects its own 500",
    "thinking": "asks for what a mesh does not do: a 400 that names it",
    "no messages": "Anthropic's own API refuses an empty list too",
    "keys of that server": "response_format and structured_outputs are the keys for it here",
    "usage at the start": "a stream begins before its prompt is tokenized; message_delta has both counts",
    "fingerprint": "OpenAI has made system_fingerprint optional",
    "two turns of one side": "templates that take two messages of the assistant in a row get them",
}


@dataclass(frozen=True)
class Case:
    suite: str
    name: str
    path: str
    body: Body
    check: Check
    reason: str = ""
    stream: bool = field(default=False)


def ok(status: int, body: Any) -> bool:
    return status == 200


def refused(status: int, body: Any) -> bool:
    return status >= 400 and "error" in body


def vectors(count: int, *, unit: bool = True) -> Check:
    def check(status: int, body: Any) -> bool:
        data = body.get("data", ())
        lengths = [math.fsum(x * x for x in each["embedding"]) for each in data]
        return status == 200 and len(data) == count and all(not unit or abs(length - 1) < 1e-3 for length in lengths)

    return check


def all_the_same(status: int, body: Any) -> bool:
    first, *others = [each["embedding"] for each in body["data"]]
    return status == 200 and all(abs(a - b) < 1e-3 for other in others for a, b in zip(first, other, strict=True))


def counted(times: int) -> Check:
    def check(status: int, body: Any) -> bool:
        usage = body["usage"]
        return status == 200 and usage["prompt_tokens"] == usage["total_tokens"] and usage["prompt_tokens"] % times == 0

    return check


def packed(status: int, body: Any) -> bool:
    data = base64.b64decode(body["data"][0]["embedding"])
    numbers = struct.unpack(f"<{len(data) // 4}f", data)
    return status == 200 and abs(math.fsum(x * x for x in numbers) - 1) < 1e-3


def embeddings() -> Iterator[Case]:
    suite, path, text = "llama.cpp, embedding", "/v1/embeddings", "I believe the meaning of life is"
    texts = [text, "Write a joke about AI from a very long prompt which will not be truncated", "This is a test", "This is another test"]

    def case(name: str, given: Any, check: Check, reason: str = "", **more: Any) -> Case:
        return Case(suite, name, path, {"input": given, **more}, check, reason)

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
    yield Case(suite, "pooling none", "/embeddings", {"input": "hello hello hello"}, ok, "another route")
    yield case("pooling none is refused", "hello hello hello", refused, pooling="none")
    yield case("a prompt that is too long", "This is a test " * 2048, refused)
    yield case("the same five times", [text] * 5, all_the_same)
    yield case("usage", text, counted(1))
    yield case("usage of another text", "This is a test", counted(1))
    yield case("usage of two", [text, text], counted(2))
    yield case("base64", "Test base64 embedding output", packed, encoding_format="base64")


def vllm_embeddings(model: str) -> Iterator[Case]:
    suite, path, text = "vLLM, embed online", "/v1/embeddings", "The best thing about it is that it supports many different models"

    def case(name: str, body: Body, check: Check, reason: str = "") -> Case:
        return Case(suite, name, path, {"model": model, "encoding_format": "float", **body}, check, reason)

    yield Case(
        suite, "tokenize", "/tokenize", {"model": model, "prompt": text}, lambda status, body: body["count"] == len(body["tokens"]) > 0
    )
    yield case("a text", {"input": text}, vectors(1))
    yield case("ids", {"input": [12, 34, 56]}, vectors(1))
    yield case("ten texts", {"input": [text] * 10}, vectors(10))
    yield case("ten lists of ids", {"input": [[12, 34, 56]] * 10}, vectors(10))
    yield case("truncation of a text", {"input": [text], "truncate_prompt_tokens": 10}, vectors(1), "truncation")
    yield case("truncation of ids", {"input": [12] * 20, "truncate_prompt_tokens": 10}, vectors(1), "truncation")
    yield case("truncation beyond the context", {"input": [text], "truncate_prompt_tokens": 8193}, refused)
    for name, more in (
        ("messages", {}),
        ("generation prompt", {"add_generation_prompt": True}),
        ("continued", {"continue_final_message": True}),
    ):
        yield case(name, {"messages": TALK, **more}, vectors(1), "messages to embed")
    yield case("special tokens", {"messages": TALK, "add_special_tokens": True}, vectors(1), "messages to embed")
    yield case("both of them", {"messages": TALK, "continue_final_message": True, "add_generation_prompt": True}, refused)
    for name, body in (("invocation of a text", {"input": text}), ("invocation of messages", {"messages": TALK})):
        yield Case(suite, name, "/invocations", {"model": model, **body}, ok, "another route")
    yield case("base64", {"input": text, "encoding_format": "base64"}, packed)
    yield case("normalized", {"input": text, "normalize": True}, vectors(1))
    yield case("not normalized", {"input": text, "normalize": False}, vectors(1, unit=False))


def is_message(status: int, body: Any) -> bool:
    return status == 200 and body["type"] == "message" and body["role"] == "assistant" and bool(body["content"])


def whole_message(status: int, body: Any) -> bool:
    usage = body["usage"]
    numbers = all(isinstance(usage[name], int) for name in ("cache_read_input_tokens", "input_tokens", "output_tokens"))
    ends = body["stop_reason"] in ("end_turn", "max_tokens") and "timings" not in body
    return is_message(status, body) and body["content"][0]["type"] == "text" and ends and numbers and usage["output_tokens"] > 0


def tool_or_text(status: int, body: Any) -> bool:
    calls = [block for block in body["content"] if block["type"] == "tool_use"]
    right = all(block["name"] == "get_weather" and isinstance(block["input"], dict) and block["id"] for block in calls)
    return is_message(status, body) and right and (not calls or body["stop_reason"] == "tool_use")


def whole_stream(status: int, events: Any) -> bool:
    kinds = {each["type"] for each in events}
    wanted = {"message_start", "content_block_start", "content_block_delta", "content_block_stop", "message_delta", "message_stop"}
    starts = [each["index"] for each in events if each["type"] == "content_block_start"]
    stops = {each["index"] for each in events if each["type"] == "content_block_stop"}
    last = next(each for each in events if each["type"] == "message_delta")
    return wanted <= kinds and starts == list(range(len(starts))) and set(starts) == stops and last["usage"]["output_tokens"] > 0


def usage_at_start(status: int, events: Any) -> bool:
    return bool(events[0]["message"]["usage"]["input_tokens"] > 0)


def anthropic(model: str) -> Iterator[Case]:
    suite, path = "llama.cpp, anthropic", "/v1/messages"
    hello = [{"role": "user", "content": "Say hello"}]

    def case(name: str, check: Check, reason: str = "", messages: Any = hello, stream: bool = False, **more: Any) -> Case:
        body = {"model": model, "max_tokens": 20, "messages": messages, **more} | ({"stream": True} if stream else {})
        return Case(suite, name, path, body, check, reason, stream)

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
    count = {"model": model, "messages": hello}

    def only_input(status: int, body: Any) -> bool:
        return status == 200 and body["input_tokens"] > 0 and "output_tokens" not in body

    yield Case(suite, "count tokens", f"{path}/count_tokens", count, only_input)
    yield Case(suite, "count tokens with a system", f"{path}/count_tokens", {**count, "system": "Be brief."}, only_input)
    yield Case(suite, "count tokens without max_tokens", f"{path}/count_tokens", count, only_input)
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
    yield Case(suite, "messages are missing", path, {"model": model, "max_tokens": 5}, refused)
    yield case("messages are empty", is_message, "no messages", messages=[])
    yield case("indices of blocks", whole_stream, tools=[TOOL], stream=True)
    yield case("thinking", is_message, "thinking", thinking={"type": "enabled", "budget_tokens": 50})
    yield case("metadata", is_message, metadata={"user_id": "somebody"})
    yield case("a model that thinks", is_message, "thinking", thinking={"type": "enabled", "budget_tokens": 500})
    yield case("a model that thinks, streaming", whole_stream, "thinking", stream=True, thinking={"type": "enabled", "budget_tokens": 500})


def chat(model: str) -> Iterator[Case]:
    suite, path = "llama.cpp, chat", "/v1/chat/completions"
    messages = [{"role": "system", "content": "You are a coding assistant."}, {"role": "user", "content": "Write an example"}]

    def says(pattern: str) -> Check:
        return lambda status, body: status == 200 and re.search(pattern, body["choices"][0]["message"]["content"]) is not None

    def case(name: str, check: Check, reason: str = "", **more: Any) -> Case:
        return Case(suite, name, path, {"model": model, "max_tokens": 20, "messages": messages, **more}, check, reason)

    def form(name: str, check: Check, reason: str = "", **format: Any) -> Case:
        return case(f"response_format: {name}", check, reason, response_format=format)

    yield case("a completion", lambda status, body: "cmpl" in body["id"] and body["usage"]["completion_tokens"] > 0)
    yield case("its fingerprint", lambda status, body: bool(body.get("system_fingerprint")), "fingerprint")
    yield form("an object by a schema", says('"42"'), "keys of that server", type="json_object", schema={"const": "42"})
    items = {"items": [{"type": "integer"}]}
    yield form("items as a list", says(r"\["), "keys of that server", type="json_object", schema=items)
    yield form("a constant", says('"foooooo"'), type="json_schema", json_schema={"name": "x", "schema": {"const": "foooooo"}})
    yield form("any object", says(r"^\s*\{"), type="json_object")
    yield form("sound", refused, type="sound")
    yield form("a schema that is a number", refused, type="json_object", schema=123)
    yield form("a type that is a number", refused, type="json_schema", json_schema={"name": "x", "schema": {"type": 123}})
    yield form("a type that is none", refused, type="json_schema", json_schema={"name": "x", "schema": {"type": "hiccup"}})
    yield case("json_schema", says('"42"'), "keys of that server", json_schema={"const": "42"})
    yield case("grammar", says("^a{5}$"), "keys of that server", grammar='root ::= "a"{5,5}')
    yield case("the same by structured_outputs", says("^a{5}$"), structured_outputs={"grammar": 'root ::= "a"{5,5}'})
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


def ask(http: httpx.Client, case: Case) -> tuple[int, Any]:
    response = http.post(case.path, json=case.body)
    if case.stream and response.status_code == 200:
        return 200, [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    return response.status_code, response.json()


def passes(http: httpx.Client, case: Case) -> tuple[bool, str]:
    status, body = ask(http, case)
    try:
        return case.check(status, body), f"{status} {str(body)[:160]}"
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError):
        return False, f"{status} {str(body)[:160]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("model")
    args = parser.parse_args()
    counts: Counter[tuple[str, str]] = Counter()
    unexplained = 0
    with httpx.Client(base_url=args.url, timeout=120) as http:
        for case in (*embeddings(), *vllm_embeddings(args.model), *anthropic(args.model), *chat(args.model)):
            good, answer = passes(http, case)
            counts[case.suite, "passed" if good else case.reason or "?"] += 1
            if not good and not case.reason:
                unexplained += 1
                print(f"{case.suite}: {case.name}: {answer}")
            if good and case.reason:
                print(f"{case.suite}: {case.name} passes, and has a reason for not passing: {case.reason}")
    for (suite, what), count in counts.items():
        print(f"{suite}: {count} {what}{'' if what == 'passed' else ': ' + REASONS.get(what, '')}")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())
