"""Cases of SGLang's server: see peer_cases.py."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

from peer_asking import (
    MODEL,
    Body,
    Case,
    Check,
    Peer,
    all_of,
    an_object,
    both_ways,
    calls_in,
    choice_of,
    fits,
    function,
    ok,
    refused,
    says,
    sends,
    streamed,
    well_called,
)
from peer_checks import is_message, is_response, only_input, vectors, whole_message, whole_response_stream, whole_stream

__all__ = ["suites"]

CHAT, TEXT, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/messages"
PARIS = [{"role": "system", "content": "You are of help"}, {"role": "user", "content": "What is the capital of France?"}]
WORD = {"type": "string", "maxLength": 16}
CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": r"^[\w]{1,12}$"},
        "population": {"type": "integer", "minimum": 0, "maximum": 10**8},
    },
    "required": ["name", "population"],
    "additionalProperties": False,
}


def chat_body(messages: list[Body] = PARIS, **more: Any) -> Body:
    return {"model": MODEL, "messages": messages, "temperature": 0, "max_tokens": 16, **more}


def completions() -> Iterator[Case]:
    """Each of its combinations is a case."""
    suite, prompt = "SGLang, completions", "The capital of France is"
    ids = [504, 3575, 282, 4649, 314]
    for echo, logprobs, several, n, given in itertools.product((False, True), (None, 5), (True, False), (1, 2), (False, True)):
        asked: Any = ids if given else prompt
        count = (2 if several else 1) * n
        body: Body = {"model": MODEL, "prompt": [asked, asked] if several else asked, "temperature": 0, "max_tokens": 4}
        body |= {"echo": echo, "n": n} | ({} if logprobs is None else {"logprobs": logprobs})
        reason = "log-probabilities of a prompt" if echo and logprobs else ""
        what = [
            *(["echo"] if echo else []),
            *(["logprobs"] if logprobs else []),
            f"{2 if several else 1} x n={n}",
            "ids" if given else "text",
        ]
        check = _completed(count, begins=prompt if echo and not given else "", logprobs=logprobs)
        counted = lambda status, answer: answer["usage"]["completion_tokens"] > 0 and answer["usage"]["prompt_tokens"] > 0  # noqa: E731
        yield Case(suite, ", ".join(what), sends(TEXT, body, all_of(check, counted)), reason)
        options = {"stream": True, "stream_options": {"include_usage": True}}
        yield Case(suite, f"{', '.join(what)}, streaming", sends(TEXT, body | options, _with_usage(check)), reason)


def _completed(count: int, *, begins: str, logprobs: int | None) -> Check:
    def check(status: int, body: Any) -> bool:
        right = all(choice["text"].startswith(begins) and bool(choice["logprobs"]) == bool(logprobs) for choice in body["choices"])
        return status == 200 and len(body["choices"]) == count and right

    return check


def _with_usage(check: Check) -> Check:
    """A stream whose last event alone has the usage."""

    def of(status: int, events: Any) -> bool:
        *others, last = events
        return (
            status == 200 and last["usage"]["total_tokens"] > 0 and streamed(check)(status, others) and not any(e["usage"] for e in others)
        )

    return of


def chats() -> Iterator[Case]:
    suite = "SGLang, chat"

    def case(name: str, check: Check, reason: str = "", messages: list[Body] = PARIS, **more: Any) -> Case:
        return Case(suite, name, sends(CHAT, chat_body(messages, **more), check), reason)

    for logprobs, n in itertools.product((None, 5), (1, 2)):
        more: Body = {"n": n, "logprobs": bool(logprobs), **({"top_logprobs": logprobs} if logprobs else {})}

        def check(status: int, body: Any, n: int = n, logprobs: int | None = logprobs) -> bool:
            named = all(choice["message"]["role"] == "assistant" for choice in body["choices"])
            return status == 200 and len(body["choices"]) == n and named and bool(choice_of(body)["logprobs"]) == bool(logprobs)

        name = f"n={n}{', logprobs' if logprobs else ''}"
        yield case(name, check, **more)
        yield case(f"{name}, streaming", _with_usage(check), stream=True, stream_options={"include_usage": True}, **more)
    regex = '\\{\n   "name": "[\\w]+",\n   "population": [\\d]+\n\\}'
    yield case("regex", ok, "keys of that server", regex=regex, max_tokens=60)
    yield case("ebnf", ok, "keys of that server", ebnf='root ::= "Hello" | "Hi" | "Hey"')
    yield case("ebnf of JSON", ok, "keys of that server", ebnf='root ::= "{" pair "}"\npair ::= "\\"name\\"" ":" "1"')
    yield case("a penalty", lambda status, body: isinstance(choice_of(body)["message"]["content"], str), frequency_penalty=1.0)
    begun = [*PARIS, {"role": "assistant", "content": "{\n"}]
    yield case("a message continued", ok, messages=begun, continue_final_message=True)
    yield Case(suite, "the models", lambda peer: isinstance(_models(peer)[0]["max_model_len"], int) and len(_models(peer)) == 1)
    yield Case(suite, "a model that is not there", lambda peer: peer.ask("/v1/models/not-there", method="GET").status == 404)
    one = lambda peer: peer.ask(f"/v1/models/{peer.model}", method="GET").body["root"] == peer.model  # noqa: E731
    yield Case(suite, "one model, and its root", one, "parts of that server's answer")
    for way, run in both_ways(CHAT, chat_body(response_format={"type": "json_object"}, max_tokens=128), an_object):
        yield Case(suite, f"json_object{way}", run)
    named = {"type": "json_schema", "json_schema": {"name": "foo", "schema": CITY}}
    yield case("json_schema", fits(CITY), response_format=named, max_tokens=128)
    for name in ("generate: json_schema", "generate: a schema that is none", "generate: forms and none at once"):
        body = {"text": "Introduce it.", "sampling_params": {"max_new_tokens": 8, "json_schema": json.dumps(CITY)}}
        yield Case(suite, name, sends("/generate", body, ok), "another route")
    for form in ({"type": "const_string", "value": "Berlin."}, {"type": "json_schema", "json_schema": CITY}):
        tag = {"type": "structural_tag", "format": form}
        yield case(f"structural_tag: {form['type']}", ok, "keys of that server", response_format=tag)
    yield from stops(suite)
    yield from lengths(suite)


def _models(peer: Peer) -> Any:
    return peer.ask("/v1/models", method="GET").body["data"]


def stops(suite: str) -> Iterator[Case]:
    story = "Write a long story with many people in it.\n"
    for path, given in ((TEXT, {"prompt": story}), (CHAT, {"messages": [{"role": "user", "content": story}]})):
        what = "text" if path == TEXT else "chat"

        def case(name: str, ends: str, reason: str = "", path: str = path, given: Body = given, what: str = what, **more: Any) -> Case:
            def check(status: int, body: Any) -> bool:
                return status == 200 and choice_of(body)["finish_reason"] == ends and (not reason or "matched_stop" in choice_of(body))

            return Case(
                suite, f"{what}: {name}", sends(path, {"model": MODEL, "temperature": 0, "max_tokens": 200, **given, **more}, check), reason
            )

        yield case("a stop text", "stop", stop="e")
        yield case("a stop text, and which it was", "stop", "parts of that server's answer", stop="e")
        yield case("stop_regex", "stop", "keys of that server", stop_regex="and|or")
        yield case("the length", "length", max_tokens=5, ignore_eos=True)
    sentence = chat_body(stop_regex=r"[.!?]\s*$")
    yield Case(suite, "chat: stop_regex of a sentence", sends(CHAT, sentence, ok), "keys of that server")
    count = [{"role": "user", "content": "Count from 1 to 20."}]

    def longer(peer: Peer) -> bool:
        some, all_ = (peer.ask(CHAT, chat_body(count, ignore_eos=value, max_tokens=100)).body for value in (False, True))
        tokens = [body["usage"]["completion_tokens"] for body in (some, all_)]
        return tokens[1] == 100 >= tokens[0] and choice_of(all_)["finish_reason"] == "length"

    yield Case(suite, "ignore_eos", longer)


def lengths(suite: str) -> Iterator[Case]:
    long = [{"role": "user", "content": "hello " * 9000}]
    code = lambda _, body: body["error"]["code"] == "context_length_exceeded"  # noqa: E731
    for name, more in (
        ("a prompt that is too long", {}),
        ("one that leaves no room", {"messages": [{"role": "user", "content": "hello " * 2040}]}),
        ("one that is too long, streaming", {"stream": True}),
    ):
        body = {"model": MODEL, "messages": long, "temperature": 0, **more}
        yield Case(suite, name, sends(CHAT, body, all_of(refused, code)))
    yield Case(suite, "more tokens than fit", sends(CHAT, chat_body(max_tokens=9000), refused))
    for name in ("below the vocabulary", "beyond the vocabulary", "a list of lists", "a batch", "right"):
        body = {"text": "hi", "sampling_params": {"max_new_tokens": 1}, "return_logprob": True, "token_ids_logprob": [0]}
        yield Case(suite, f"generate: log-probabilities of tokens: {name}", sends("/generate", body, ok), "another route")


def embeddings() -> Iterator[Case]:
    suite, ids = "SGLang, embeddings", [15339, 314, 703, 284, 612, 262]

    def case(name: str, given: Any, check: Check, reason: str = "", **more: Any) -> Case:
        return Case(suite, name, sends("/v1/embeddings", {"model": MODEL, "input": given, **more}, check), reason)

    def sized(count: int, numbers: int) -> Check:
        return lambda status, body: vectors(count)(status, body) and all(len(each["embedding"]) == numbers for each in body["data"])

    yield case("a text", "Hello world", vectors(1))
    yield case("two texts", ["Hello world", "Test text"], vectors(2))
    yield case("a list of one", ["Hello world"], vectors(1))
    yield case("a list of lists of ids", [ids], vectors(1))
    yield case("ids", ids, vectors(1))
    yield case("an empty text", "", refused)
    yield case("dimensions of a model that was not trained for them", "Hello world", refused, "taken here", dimensions=512)
    for numbers in (128, 256, 512):
        yield case(f"{numbers} dimensions", "Hello world", sized(1, numbers), dimensions=numbers)
    yield case("256 dimensions of three", ["Hello world", "Test text", "Another"], sized(3, 256), dimensions=256)
    yield case("all dimensions", "Hello world", vectors(1))
    yield case("100 dimensions, which are none of the model's", "Hello world", refused, "taken here", dimensions=100)
    for numbers in (0, -1, 10000):
        yield case(f"{numbers} dimensions", "Hello world", refused, dimensions=numbers)


UNIT = {"type": "string", "enum": ["celsius", "fahrenheit"]}
ADD = function("add", ["a", "b"], a={"type": "integer", "maximum": 10**6}, b={"type": "integer", "maximum": 10**6})
WEATHER = function("get_weather", ["city"], city=WORD, unit=UNIT)
INFO = function("get_pokemon_info", ["name"], name=WORD)
NEXT = function("make_next_step_decision", ["decision", "content"], decision=WORD, content=WORD)
SIGHTS = function("get_tourist_attractions", ["city"], city=WORD)


def tools() -> Iterator[Case]:
    suite, three = "SGLang, tools", [WEATHER, INFO, NEXT]
    cities = [{"role": "user", "content": "What is the weather in the 5 largest cities of the US, in celsius?"}]
    tokyo = [{"role": "user", "content": "I go to Tokyo. How is the weather? What is there to see?"}]

    def case(name: str, check: Check, reason: str = "", messages: list[Body] = cities, **more: Any) -> Case:
        return Case(suite, name, sends(CHAT, chat_body(messages, **{"max_tokens": 200, **more}), check), reason)

    def ways(name: str, check: Check, messages: list[Body] = cities, **more: Any) -> Iterator[Case]:
        for way, run in both_ways(CHAT, chat_body(messages, **{"max_tokens": 200, **more}), check):
            yield Case(suite, name + way, run)

    def strict(*tools: Body) -> list[Body]:
        return [{**tool, "function": {**tool["function"], "strict": True}} for tool in tools]

    one: Body = {"parallel_tool_calls": False}
    named = {"type": "function", "function": {"name": "get_weather"}}
    yield from ways("auto", well_called(three), tools=three, tool_choice="auto")
    yield from ways("required", well_called(three, least=1), tools=three, tool_choice="required", temperature=0.2, **one)
    yield from ways("a function", well_called([WEATHER], least=1), tools=three, tool_choice=named)
    yield case(
        "required: arguments as they come",
        streamed(well_called(three, least=1)),
        tools=strict(*three),
        tool_choice="required",
        stream=True,
        **one,
    )
    inner = {"type": "object", "properties": {"metrics": {"type": "array", "items": WORD, "maxItems": 3}}, "required": ["metrics"]}
    data = function(
        "analyze_data",
        ["data"],
        strict=True,
        data=inner,
        options={"type": "array", "items": {"type": "object", "properties": {"name": WORD}}, "maxItems": 2},
    )
    yield case("nested parameters", well_called([data], least=1), tools=[data], tool_choice="required", **one)
    yield case("two tools, auto", well_called([WEATHER, SIGHTS]), messages=tokyo, tools=[WEATHER, SIGHTS], tool_choice="auto")
    yield case(
        "two tools, required",
        well_called([WEATHER, SIGHTS], least=1),
        messages=tokyo,
        tools=[WEATHER, SIGHTS],
        tool_choice="required",
        **one,
    )
    absent = {"type": "function", "function": {"name": "nonexistent_function"}}
    yield case("a function that is none of the tools", says("nonexistent_function"), tools=three, tool_choice=absent)
    nameless = {"type": "function", "function": {"description": "x", "parameters": {"type": "object"}}}
    yield case("a tool without a name", says("name"), tools=[nameless], tool_choice="required")
    odd = function("test_function", ["field"], field={"type": "unknown_type"})
    yield case("a schema that is none", refused, tools=[odd], tool_choice="required", **one)
    kinds = [function(f"tool{number}", ["data"], data={"$ref": "#/$defs/Data"}) for number in (1, 2)]
    for tool, kind in zip(kinds, ({"enum": ["x"]}, {"enum": [1]}), strict=True):
        tool["function"]["parameters"]["$defs"] = {"Data": kind}
    yield case("definitions of one name", refused, "taken here", tools=kinds, tool_choice="required", **one)
    sums = [{"role": "user", "content": "Compute (3+5)"}]
    yield case(
        "the form of a call", well_called([ADD], least=1), messages=sums, tools=[ADD], tool_choice="required", temperature=0.8, **one
    )
    yield case("a call, streaming", streamed(well_called([WEATHER])), tools=[WEATHER], stream=True, temperature=0.8, top_p=0.8)
    yield case(
        "arguments of a strict tool, streaming", streamed(well_called(strict(ADD))), messages=sums, tools=strict(ADD), stream=True, **one
    )
    yield case("a strict tool", well_called(strict(ADD)), messages=sums, tools=strict(ADD), **one)
    yield case("required, strict", well_called([ADD, WEATHER], least=1), tools=strict(ADD, WEATHER), tool_choice="required", **one)
    yield case("a function, strict", well_called([WEATHER], least=1, most=1), tools=strict(ADD, WEATHER), tool_choice=named)

    def both(status: int, body: Any) -> bool:
        return status == 200 and len(body["choices"]) == 2 and all(choice["finish_reason"] for choice in body["choices"])

    def call(status: int, body: Any) -> bool:
        return both(status, body) and all(choice["finish_reason"] == "tool_calls" for choice in body["choices"])

    yield case("two choices that call", streamed(call), tools=[WEATHER], tool_choice="required", n=2, stream=True, temperature=0.8, **one)
    yield case("two choices without tools", streamed(both), n=2, stream=True, max_tokens=10, temperature=0.8)
    none = lambda status, body: status == 200 and not calls_in(body)  # noqa: E731
    yield case("a tool that may not be called", streamed(none), tools=[WEATHER], tool_choice="none", stream=True, max_tokens=30)


def responses() -> Iterator[Case]:
    suite, path = "SGLang, responses", "/v1/responses"
    tool = {"type": "function", **WEATHER["function"]}
    strict = {"type": "function", "name": "calculate", "parameters": {"type": "object", "properties": {"expression": WORD}}, "strict": True}

    def case(name: str, check: Check, reason: str = "", **more: Any) -> Case:
        body = {"model": MODEL, "input": "The capital of France is", "temperature": 0, "max_output_tokens": 16, **more}
        return Case(suite, name, sends(path, body, check), reason)

    all_keys: Body = {"store": True, "parallel_tool_calls": True, "tool_choice": "auto", "truncation": "disabled", "top_p": 1.0}
    for name in ("a response", "a completion"):
        yield case(name, is_response, **all_keys)
        yield case(f"{name}, streaming", whole_response_stream, stream=True, **all_keys)
    wrong = lambda _, body: {"message", "type", "code"} <= body["error"].keys()  # noqa: E731
    yield case("an id that is none", all_of(refused, wrong), previous_response_id="bad")
    yield case("a tool of no kind", all_of(refused, wrong), tools=[{"type": "some_invalid_tool_type"}])
    yield case("a penalty", is_response, frequency_penalty=1.0)
    yield case(
        "a penalty, and its counts by chat's names",
        lambda _, body: "prompt_tokens" in body["usage"],
        "parts of that server's answer",
        frequency_penalty=1.0,
    )
    yield case("a tool", is_response, tools=[tool])
    yield case("a tool, streaming", whole_response_stream, tools=[tool], stream=True)
    none = lambda status, body: is_response(status, body) and all(item["type"] == "message" for item in body["output"])  # noqa: E731
    yield case("a tool that may not be called", none, tools=[tool], tool_choice="none")
    yield case(
        "two tools", is_response, tools=[tool, {"type": "function", "name": "get_time", "parameters": {"type": "object", "properties": {}}}]
    )
    yield case("a strict tool", is_response, tools=[strict])


def messages() -> Iterator[Case]:
    suite = "SGLang, Anthropic's messages"
    ask = [{"role": "user", "content": "What is the capital of France?"}]

    def case(name: str, check: Check, reason: str = "", **more: Any) -> Case:
        return Case(suite, name, sends(MESSAGES, {"model": MODEL, "max_tokens": 20, "messages": ask, **more}, check), reason)

    talk = [ask[0], {"role": "assistant", "content": "Hello!"}, ask[0]]
    yield case("a message", whole_message)
    yield case("several turns", is_message, messages=talk)
    yield case("system", is_message, system="Answer in French.")
    yield case("system as blocks", is_message, system=[{"type": "text", "text": "Be of help."}, {"type": "text", "text": "Be brief."}])
    yield case("max_tokens", is_message, max_tokens=5)
    yield case("temperature", is_message, temperature=0.0)
    yield case("stop_sequences", lambda status, body: status == 200 and body["type"] == "message", stop_sequences=["\n"])
    yield case("top_p and top_k", is_message, top_p=0.9, top_k=40)
    for name, more in (
        ("a stream", {}),
        ("a stream of several turns", {"messages": talk}),
        ("a stream with a system", {"system": "Be a pirate."}),
    ):
        yield case(name, whole_stream, stream=True, **more)
    yield case("max_tokens below one", refused, max_tokens=-1)
    yield case("no messages", refused, messages=[])
    yield Case(suite, "no JSON", lambda peer: refused(*_pair(peer, b"not json")))
    yield case("every key", lambda _, body: {"id", "type", "role", "content", "model", "usage"} <= body.keys())
    order = lambda _, events: (events[0]["type"], events[-1]["type"]) == ("message_start", "message_stop")  # noqa: E731
    yield case("the order of events", order, stream=True)
    yield case("blocks", is_message, messages=[{"role": "user", "content": [{"type": "text", "text": "What is 2+2?"}]}])
    count = {"model": MODEL, "messages": ask}
    yield Case(suite, "tokens counted", sends(f"{MESSAGES}/count_tokens", count, only_input))

    def more_with_a_system(peer: Peer) -> bool:
        less, more = (peer.ask(f"{MESSAGES}/count_tokens", count | system).body for system in ({}, {"system": "Be brief. " * 30}))
        return bool(more["input_tokens"] > less["input_tokens"] > 0)

    yield Case(suite, "tokens counted with a system", more_with_a_system)
    thought = [{"type": "thinking", "thinking": "2+2=4", "signature": "x"}, {"type": "text", "text": "4."}]
    hidden = [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "4."}]
    for name, blocks in (("an earlier thought", thought), ("an earlier thought that is hidden", hidden)):
        yield case(name, is_message, messages=[ask[0], {"role": "assistant", "content": blocks}, ask[0]])
    yield case("thinking disabled", is_message, thinking={"type": "disabled"})
    yield case("thinking enabled", is_message, "thinking", thinking={"type": "enabled", "budget_tokens": 4096})
    yield from message_tools(suite)


def _pair(peer: Peer, content: bytes) -> tuple[int, Any]:
    answer = peer.ask(MESSAGES, content=content)
    return answer.status, answer.body


def message_tools(suite: str) -> Iterator[Case]:
    def tool_of(tool: Body) -> Body:
        about = tool["function"]
        return {"name": about["name"], "description": about["description"], "input_schema": about["parameters"]}

    add, weather = tool_of(ADD), tool_of(WEATHER)
    ask = [{"role": "user", "content": "Compute (3+5)"}]
    once = {"disable_parallel_tool_use": True}

    def used(least: int, *names: str) -> Check:
        def check(status: int, body: Any) -> bool:
            blocks = [block for block in body["content"] if block["type"] == "tool_use"]
            right = all(block["name"] in names and isinstance(block["input"], dict) and block["id"] for block in blocks)
            return is_message(status, body) and len(blocks) >= least and right and (not blocks or body["stop_reason"] == "tool_use")

        return check

    def case(name: str, check: Check, reason: str = "", **more: Any) -> Case:
        body = {"model": MODEL, "max_tokens": 120, "messages": ask, "tools": [add], "temperature": 0.0, **more}
        return Case(suite, f"tools: {name}", sends(MESSAGES, body, check), reason)

    def called(status: int, events: Any) -> bool:
        starts = [event["content_block"] for event in events if event["type"] == "content_block_start"]
        parts = "".join(event["delta"].get("partial_json", "") for event in events if event["type"] == "content_block_delta")
        last = next(event for event in events if event["type"] == "message_delta")
        return (
            whole_stream(status, events)
            and [start["type"] for start in starts] == ["tool_use"]
            and last["delta"]["stop_reason"] == "tool_use"
            and isinstance(json.loads(parts), dict)
        )

    yield case("their form", used(0, "add"), temperature=0.8, top_p=0.8)
    yield case("auto", used(0, "add"), tool_choice={"type": "auto"})
    yield case("any", used(1, "get_weather"), tools=[weather], tool_choice={"type": "any", **once})
    yield case("one of them", used(1, "get_weather"), tools=[add, weather], tool_choice={"type": "tool", "name": "get_weather"})
    call = {"role": "assistant", "content": [{"type": "tool_use", "id": "call_1", "name": "add", "input": {"a": 3, "b": 5}}]}
    for key, reason in (("tool_use_id", ""), ("id", "a wrong key of the suite")):
        result = {"role": "user", "content": [{"type": "tool_result", key: "call_1", "content": "8"}]}
        yield case(f"a result, by its {key}", is_message, reason, messages=[*ask, call, result])
    yield case("any, streaming", called, tools=[weather], tool_choice={"type": "any", **once}, stream=True)
    yield case("the arguments, streaming", whole_stream, stream=True)
    yield case("the order of events", called, tool_choice={"type": "any", **once}, stream=True)
    bare = {"model": MODEL, "max_tokens": 20, "messages": ask}
    yield Case(
        suite,
        "tools: none",
        sends(MESSAGES, bare, lambda status, body: used(0)(status, body) and body["stop_reason"] in ("end_turn", "max_tokens")),
    )


def suites() -> Iterator[Case]:
    yield from completions()
    yield from chats()
    yield from embeddings()
    yield from tools()
    yield from responses()
    yield from messages()
