"""Cases of vLLM's server, for embeddings, tokens, responses and Anthropic's messages: see peer_cases.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from peer_asking import MODEL, Body, Case, Check, Peer, all_of, ok, refused, sends
from peer_checks import TALK, is_message, is_response, output_text, packed, vectors, whole_response_stream, whole_stream

__all__ = ["suites"]

RESPONSES = "/v1/responses"


def embeddings() -> Iterator[Case]:
    suite, path, text = "vLLM, embed online", "/v1/embeddings", "The best thing about it is that it supports many different models"

    def case(name: str, body: Body, check: Check, reason: str = "") -> Case:
        return Case(suite, name, sends(path, {"model": MODEL, "encoding_format": "float", **body}, check), reason)

    whole = lambda status, body: status == 200 and body["count"] == len(body["tokens"]) > 0  # noqa: E731
    yield Case(suite, "tokenize", sends("/tokenize", {"model": MODEL, "prompt": text}, whole))
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
        yield Case(suite, name, sends("/invocations", {"model": MODEL, **body}, ok), "another route")
    yield case("base64", {"input": text, "encoding_format": "base64"}, packed)
    yield case("normalized", {"input": text, "normalize": True}, vectors(1))
    yield case("not normalized", {"input": text, "normalize": False}, vectors(1, unit=False))


def tokens() -> Iterator[Case]:
    suite, prompt = "vLLM, tokenize", "vllm1 This is a test prompt."

    def case(name: str, body: Body, reason: str = "", check: Check | None = None) -> Case:
        return Case(suite, name, sends("/tokenize", {"model": MODEL, **body}, check or _tokens), reason)

    for special in (False, True):
        yield case(f"a text, add_special_tokens {special}", {"prompt": prompt, "add_special_tokens": special})
    weather = {"name": "get_weather", "parameters": {"type": "object", "properties": {"location": {"type": "string"}}}}
    for tools in ([], [{"type": "function", "function": weather}]):
        for begins, goes_on in ((False, False), (False, True), (True, False)):
            talk = [*TALK, {"role": "assistant", "content": "Sure,"}] if goes_on else TALK
            body = {
                "messages": talk,
                "add_generation_prompt": begins,
                "continue_final_message": goes_on,
                **({"tools": tools} if tools else {}),
            }
            name = f"messages{', tools' if tools else ''}, begun {begins}, continued {goes_on}"
            yield case(name, {**body, "add_special_tokens": False})
            yield case(f"{name}, special tokens", {**body, "add_special_tokens": True}, "tokens of a template")
    named = lambda status, body: _tokens(status, {**body, "token_strs": None}) and len(body["token_strs"]) == body["count"]  # noqa: E731
    yield case("their texts", {"prompt": prompt, "return_token_strs": True}, check=named)
    yield Case(suite, "there and back", _back)
    for name in ("info", "info: its form", "info: the longest text", "info: the template"):
        yield Case(suite, name, lambda peer: peer.ask("/tokenizer_info", method="GET").status == 200, "another route")


def _tokens(status: int, body: Any) -> bool:
    return status == 200 and body["count"] == len(body["tokens"]) > 0 and body["max_model_len"] > 0 and body["token_strs"] is None


def _back(peer: Peer) -> bool:
    there = peer.ask("/tokenize", {"model": MODEL, "prompt": "This is a test prompt. vllm1", "add_special_tokens": False})
    return bool(
        peer.ask("/detokenize", {"model": MODEL, "tokens": there.body["tokens"]}).body == {"prompt": "This is a test prompt. vllm1"}
    )


def asked(given: Any = "What is 13 * 24?", **more: Any) -> Body:
    return {"input": given, "max_output_tokens": 12, "temperature": 0.0, **more}


def responses() -> Iterator[Case]:
    """Where its cases name no model, these do not either."""
    suite = "vLLM, responses"

    def case(name: str, check: Check, reason: str = "", given: Any = "What is 13 * 24?", **more: Any) -> Case:
        return Case(suite, name, sends(RESPONSES, asked(given, **more), check), reason)

    def message(role: str, text: str, kind: str = "input_text", **more: Any) -> Body:
        return {"type": "message", "role": role, "content": [{"type": kind, "text": text}], **more}

    yield case("a text", is_response)
    yield case("instructions", is_response, instructions="Finish with QED.")
    talk = [{"role": "system", "content": "Finish with QED."}, *TALK]
    yield case("a conversation", is_response, given=talk)
    yield case("input_text", is_response, given=[{"role": "user", "content": [{"type": "input_text", "text": "Hello!"}]}])
    include: Body = {"include": ["message.output_text.logprobs"], "top_logprobs": 5}

    def five(status: int, body: Any) -> bool:
        entries = [entry for item in body["output"] for part in item["content"] for entry in part["logprobs"]]
        return is_response(status, body) and bool(entries) and all(len(entry["top_logprobs"]) == 5 for entry in entries)

    yield case("logprobs", five, **include)
    yield case("streaming", whole_response_stream, stream=True)
    yield case("reasoning of no effort", is_response, model=MODEL, reasoning={"effort": "none"})
    yield case("its tokens", lambda _, body: bool(body["input_messages"]), "keys of that server", enable_response_messages=True)
    thought = {"type": "reasoning", "id": "x", "summary": [], "content": [{"type": "reasoning_text", "text": "A greeting."}]}
    yield case("an earlier thought", is_response, given=[{"type": "message", "role": "user", "content": "Hello."}, thought], model=MODEL)
    for name, said, thinks in (
        ("OpenAI's", {"id": "msg_1", "status": "completed"}, {"id": "rs_1", "status": "completed", "encrypted_content": None}),
        ("without ids", {}, {"encrypted_content": None}),
    ):
        history = [
            message("user", "Be brief."),
            message("assistant", "Yes.", "output_text", **said),
            {"type": "reasoning", "summary": [], **thinks},
        ]
        yield case(f"a history: {name}", is_response, given=[*history, message("user", "One sentence, please.")], model=MODEL)
    yield Case(suite, "a history: what was answered, without its ids", _replays)
    yield case("streaming, the whole text", whole_response_stream, model=MODEL, stream=True)

    def three(status: int, events: Any) -> bool:
        deltas = [event for event in events if event["type"] == "response.output_text.delta"]
        entries = [entry for delta in deltas for entry in delta["logprobs"]]
        return (
            whole_response_stream(status, events)
            and all(delta["logprobs"] for delta in deltas)
            and all(entry["logprob"] <= 0 and 0 < len(entry["top_logprobs"]) <= 3 for entry in entries)
        )

    yield case("logprobs, streaming", three, stream=True, **{**include, "top_logprobs": 3})
    for stream in (True, False):
        yield case(f"tokens of thoughts, streaming {stream}", _thought, "thinking", reasoning={"effort": "low"}, stream=stream)
    cut = lambda _, body: body["status"] == "incomplete" and body["incomplete_details"]["reason"] == "max_output_tokens"  # noqa: E731
    yield case("max_output_tokens", all_of(is_response, cut), reasoning={"effort": "low"}, ignore_eos=True)
    yield case("sampling", is_response, temperature=0.7, top_p=0.9, top_k=40, repetition_penalty=1.2, seed=42)
    yield case("the kinds of events", whole_response_stream, reasoning={"effort": "low"}, tools=[], stream=True, background=False)
    yield from kept(suite)
    event = {
        "type": "object",
        "properties": {"date": {"type": "string", "maxLength": 9}},
        "required": ["date"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "name": "event", "schema": event, "description": "An event.", "strict": True}}
    dated = lambda status, body: is_response(status, body) and list(json.loads(output_text(body))) == ["date"]  # noqa: E731
    yield case("a form", dated, given=talk, text=form, max_output_tokens=40)
    yield case("a form, as the client's parse asks for it", dated, text=form, instructions="Extract it.", max_output_tokens=40)
    yield from calls(suite)


def _thought(status: int, body: Any) -> bool:
    response = body[-1]["response"] if isinstance(body, list) else body
    return status == 200 and response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


def _replays(peer: Peer) -> bool:
    first = peer.ask(RESPONSES, asked("Remember the marker 729.", model=MODEL))
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": output_text(first.body)}]}
    history = [{"role": "user", "content": "Remember the marker 729."}, said, {"type": "reasoning", "summary": []}]
    second = peer.ask(RESPONSES, asked([*history, {"role": "user", "content": "Which marker was it?"}], model=MODEL))
    return is_response(first.status, first.body) and is_response(second.status, second.body)


def kept(suite: str) -> Iterator[Case]:
    """What is stored, and work in the background."""

    def stored(peer: Peer) -> bool:
        first, second = peer.ask(RESPONSES, asked("Hello!")), peer.ask(RESPONSES, asked("Hello!", store=False))
        found = peer.ask(f"{RESPONSES}/{first.body['id']}", method="GET")
        lost = peer.ask(f"{RESPONSES}/{second.body['id']}", method="GET")
        return found.body == first.body and lost.status == 404 and refused(lost.status, lost.body)

    def goes_on(peer: Peer) -> bool:
        first = peer.ask(RESPONSES, asked("My name is John.", instructions="Remember it."))
        others = [peer.ask(RESPONSES, asked(text, previous_response_id=first.body["id"])) for text in ("It is Mark.", "Which is it?")]
        third = peer.ask(RESPONSES, asked("Which is it?", previous_response_id=others[0].body["id"]))
        longer = third.body["usage"]["input_tokens"] > others[1].body["usage"]["input_tokens"]
        return longer and all(is_response(each.status, each.body) for each in (first, *others, third))

    yield Case(suite, "store", stored)
    yield Case(
        suite, "background", sends(RESPONSES, asked("Hello!", background=True), lambda _, body: body["status"] == "queued"), "background"
    )
    yield Case(suite, "background that is not stored", sends(RESPONSES, asked(background=True, store=False), refused))
    yield Case(suite, "background that is cancelled", sends(RESPONSES, asked("A long story.", background=True), ok), "background")

    def cancelled(peer: Peer) -> bool:
        answer = peer.ask(f"{RESPONSES}/{peer.ask(RESPONSES, asked('Hello')).body['id']}/cancel")
        return refused(answer.status, answer.body)

    yield Case(suite, "an answer that is complete is cancelled", cancelled)
    yield Case(suite, "previous_response_id", goes_on)
    yield Case(suite, "two that go on from one", goes_on)


TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "Current weather",
    "parameters": {"type": "object", "properties": {"location": {"type": "string", "maxLength": 20}}, "required": ["location"]},
}


def called(least: int, name: str = "get_weather") -> Check:
    def check(status: int, body: Any) -> bool:
        made = [item for item in body["output"] if item["type"] == "function_call"]
        right = all(item["name"] == name and "location" in json.loads(item["arguments"]) and item["call_id"] for item in made)
        return is_response(status, body) and len(made) >= least and right

    return check


def calls(suite: str) -> Iterator[Case]:
    weather = [{"role": "user", "content": "What is the weather in Berlin?"}]

    def case(name: str, check: Check, reason: str = "", **more: Any) -> Case:
        return Case(suite, name, sends(RESPONSES, asked(weather, **{"max_output_tokens": 60, **more}), check), reason)

    named, tools = {"type": "function", "name": "get_weather"}, [TOOL]
    yield case("a tool: auto", called(0), tools=tools, tool_choice="auto")
    yield case("a tool: required", called(1), tools=tools, tool_choice="required", parallel_tool_calls=False)
    none = lambda _, body: all(item["type"] != "function_call" for item in body["output"])  # noqa: E731
    cut = lambda _, body: body["incomplete_details"]["reason"] == "max_output_tokens"  # noqa: E731
    yield case("a call that is cut", all_of(is_response, none, cut), tools=tools, tool_choice="required", max_output_tokens=10)

    def with_its_result(peer: Peer) -> bool:
        first = peer.ask(RESPONSES, asked(weather, tools=[{**TOOL, "strict": True}], tool_choice=named, max_output_tokens=60))
        call = next(item for item in first.body["output"] if item["type"] == "function_call")
        result = {"type": "function_call_output", "call_id": call["call_id"], "output": "20 degrees"}
        second = peer.ask(RESPONSES, asked([*weather, call, result]))
        return called(1)(first.status, first.body) and is_response(second.status, second.body) and bool(output_text(second.body))

    yield Case(suite, "a named function, and its result", with_its_result)
    closed = {**TOOL, "strict": True, "parameters": {**TOOL["parameters"], "additionalProperties": False}}  # type: ignore[dict-item]
    yield case("arguments as they come", whole_response_stream, tools=[closed], stream=True)
    yield case("events of a tool", whole_response_stream, tools=tools, stream=True)
    yield case("events of a call", whole_response_stream, tools=tools, tool_choice="required", stream=True)
    short = {"max_output_tokens": 4}
    for name, more in (
        ("no tools", {}),
        ("an empty list", {"tools": []}),
        ("none without tools", {"tool_choice": "none"}),
        ("auto without tools", {"tool_choice": "auto"}),
        ("a tool", {"tools": tools}),
        ("a tool, none", {"tools": tools, "tool_choice": "none"}),
        ("a tool, auto again", {"tools": tools, "tool_choice": "auto"}),
        ("an empty list, none", {"tools": [], "tool_choice": "none"}),
        ("an empty list, auto", {"tools": [], "tool_choice": "auto"}),
        *((f"parallel_tool_calls {value}", {"parallel_tool_calls": value}) for value in (True, False, None)),
    ):
        yield case(f"taken: {name}", is_response, **short, **more)  # type: ignore[arg-type]
    yield case("taken: a function of its name", is_response, tools=tools, tool_choice=named, max_output_tokens=40)
    yield case("taken: required", is_response, tools=tools, tool_choice="required", max_output_tokens=40)
    for name, more in (
        ("required without tools", {"tool_choice": "required"}),
        ("required and an empty list", {"tools": [], "tool_choice": "required"}),
        ("a function without tools", {"tool_choice": named}),
        ("a function and an empty list", {"tools": [], "tool_choice": named}),
        ("another function", {"tools": tools, "tool_choice": {"type": "function", "name": "nonexistent"}}),
        ("a function without a name", {"tools": tools, "tool_choice": {"type": "function"}}),
        ("a function of an empty name", {"tools": tools, "tool_choice": {"type": "function", "name": ""}}),
    ):
        yield case(f"refused: {name}", refused, **short, **more)  # type: ignore[arg-type]
    for kind, url in (("input_image", "u"), ("input_image", {"url": "u"}), ("image_url", {"url": "u"}), ("input_image", None)):
        part = {"type": kind, "image_url": url, "detail": "low"}
        yield Case(suite, f"an image: {kind} {url}", sends(RESPONSES, asked([{"role": "user", "content": [part]}]), is_response), "images")


def messages() -> Iterator[Case]:
    suite = "vLLM, Anthropic's messages"
    weather = {"name": "get_current_weather", "description": "The weather", "input_schema": TOOL["parameters"]}

    def case(name: str, check: Check, **more: Any) -> Case:
        body = {"model": MODEL, "max_tokens": 30, "messages": [{"role": "user", "content": "how are you!"}], **more}
        return Case(suite, name, sends("/v1/messages", body, check))

    yield case("a message", is_message)
    yield case("system", is_message, system="you are of help")
    yield case("streaming", whole_stream, stream=True)
    yield case("a tool", is_message, tools=[weather], stream=False)
    yield case("a tool, streaming", whole_stream, tools=[weather], stream=True)


def suites() -> Iterator[Case]:
    yield from embeddings()
    yield from tokens()
    yield from responses()
    yield from messages()
