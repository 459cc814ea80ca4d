"""Cases of vLLM's server, for chats, completions, tools and structured output: see peer_cases.py."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
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
    same_streamed,
    says,
    sends,
    streamed,
    well_called,
)

__all__ = ["suites"]

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SUM = [{"role": "system", "content": "You are of help"}, {"role": "user", "content": "what is 1+1?"}]
HELLO = [{"role": "user", "content": "Hello"}]
UNIT = {"type": "string", "enum": ["celsius", "fahrenheit"]}
WEATHER = function("get_current_weather", city={"type": "string"}, state={"type": "string"}, unit=UNIT)
SEARCH = function("web_search", ["search_term"], search_term={"type": "string"})
EMPLOYEE: Body = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 18, "maximum": 99},
        "skills": {"type": "array", "items": {"type": "string", "maxLength": 10}, "minItems": 3, "maxItems": 4},
        "work_history": {
            "type": "array",
            "maxItems": 1,
            "items": {
                "type": "object",
                "properties": {
                    "company": {"type": "string", "maxLength": 10},
                    "duration": {"type": "number"},
                    "position": {"type": "string"},
                },
                "required": ["company", "position"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["name", "age", "skills", "work_history"],
    "additionalProperties": False,
}
IP = r"((25[0-5]|(2[0-4]|1\d|[1-9]|)\d)\.){3}(25[0-5]|(2[0-4]|1\d|[1-9]|)\d)"
LANGUAGES = ["Python", "Java", "JavaScript", "C++", "C#", "PHP", "TypeScript", "Ruby", "Swift", "Kotlin"]


def chat_body(messages: list[Body] = SUM, **more: Any) -> Body:
    return {"model": MODEL, "messages": messages, "max_completion_tokens": 8, "temperature": 0.0, **more}


def content(check: Callable[[str], object]) -> Check:
    return lambda status, body: status == 200 and bool(check(choice_of(body)["message"]["content"]))


def choices(count: int) -> Check:
    def check(status: int, body: Any) -> bool:
        texts = [choice["text"] if "text" in choice else choice["message"]["content"] for choice in body["choices"]]
        return status == 200 and [choice["index"] for choice in body["choices"]] == list(range(count)) and all(texts)

    return check


def chats() -> Iterator[Case]:
    suite = "vLLM, chat"

    def case(name: str, check: Check, reason: str = "", messages: list[Body] = SUM, **more: Any) -> Case:
        return Case(suite, name, sends(CHAT, chat_body(messages, **more), check), reason)

    def top(count: int) -> Check:
        return lambda status, body: status == 200 and len(choice_of(body)["logprobs"]["content"][0]["top_logprobs"]) == count

    yield case("no logprobs", lambda status, body: status == 200 and choice_of(body)["logprobs"] is None, logprobs=False)
    yield case("no top logprobs", top(0), logprobs=True, top_logprobs=0)
    yield case("five top logprobs", top(5), logprobs=True, top_logprobs=5)
    yield case("too many logprobs, streaming", refused, logprobs=True, top_logprobs=21, stream=True)
    yield case("too many logprobs", refused, logprobs=True, top_logprobs=30)
    yield case("an answer after them", content(str))
    for count in (1, 0, 2):
        many = lambda status, body: status == 200 and len(body["prompt_logprobs"]) > 0  # noqa: E731
        yield case(f"prompt_logprobs {count}", many, "log-probabilities of a prompt", prompt_logprobs=count)
    yield case("prompt_logprobs -1", refused, prompt_logprobs=-1)
    yield case("no prompt_logprobs", lambda status, body: status == 200 and body.get("prompt_logprobs") is None)
    yield Case(suite, "a session", _session)
    yield Case(suite, "streaming", same_streamed(CHAT, chat_body(), content(str)))
    yield from stream_options(suite, CHAT, chat_body())
    least = content(lambda text: len(text) >= 10)
    yield case("min_characters", streamed(least), "keys of that server", min_characters=10, stream=True)
    yield Case(suite, "a choice, twice", _choices)
    yield case("json", fits(EMPLOYEE), structured_outputs={"json": EMPLOYEE}, max_completion_tokens=400)
    yield case("regex", content(re.compile(IP).fullmatch), structured_outputs={"regex": IP}, max_completion_tokens=20)
    yield case("regex that is an object", refused, structured_outputs={"regex": {"1": "Python", "2": "C++"}})
    low = lambda status, body: all(each["logprob"] >= -9999 for each in choice_of(body)["logprobs"]["content"][0]["top_logprobs"])  # noqa: E731
    yield case("log-probabilities of a choice", low, structured_outputs={"choice": LANGUAGES}, logprobs=True, top_logprobs=5)
    ask = [{"role": "user", "content": 'what is 1+1? Answer with JSON, such as {"result": 2}'}]
    number = {
        "type": "object",
        "properties": {"result": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["result"],
        "additionalProperties": False,
    }
    yield case("json_object", an_object, messages=ask, response_format={"type": "json_object"}, max_completion_tokens=100)
    named = {"type": "json_schema", "json_schema": {"name": "foo_test", "schema": number}}
    yield case("json_schema", fits(number), messages=ask, response_format=named, max_completion_tokens=100)
    yield case("text", content(str), response_format={"type": "text"})
    yield case("a key of one's own", content(str), "unknown keys", [{**SUM[1], "extra_field": "0"}])
    yield case("parts", content(str), messages=[{"role": "user", "content": [{"type": "text", "text": "what is 1+1?"}]}], seed=0)
    yield case("a role of one's own", content(str), "a role of one's own", [{"role": "my-custom-role", "content": "what is 1+1?"}])
    for seed in (-(2**63) - 1, 2**63):
        yield case(f"the seed {seed}", refused, seed=seed)
    yield Case(suite, "invocations", sends("/invocations", chat_body(), content(str)), "another route")
    warm: Body = {"temperature": 0.7}
    yield case("n", choices(3), n=3, **warm)
    yield case("n, streaming", streamed(choices(2)), n=2, stream=True, **warm)
    yield case("n with a seed", choices(2), n=2, seed=42, **warm)
    yield case("n is one", choices(1), n=1, **warm)
    start = [HELLO[0], {"role": "assistant", "content": "Here is a saying. An apple a day, keeps"}]
    going: Body = {"continue_final_message": True, "add_generation_prompt": False}
    yield case("a message continued", content(lambda text: "saying" not in text), messages=start, **going)
    yield case("echo: a message continued", content(lambda text: "saying" in text), "keys of that server", start, echo=True, **going)
    yield case("echo: false", content(str), "keys of that server", start, echo=False, **going)
    yield case("all log-probabilities of the prompt", ok, "log-probabilities of a prompt", prompt_logprobs=-1)
    yield case("all log-probabilities", ok, "keys of that server", logprobs=True, top_logprobs=-1)
    yield case("logit_bias", content(str), logit_bias={"49151": 1.0})
    yield case("logit_bias beyond the vocabulary", says("999999"), logit_bias={"999999": 1.0})
    yield case("logit_bias of a word", says("not_a_token_id"), logit_bias={"not_a_token_id": 50})
    yield case("logit_bias that is no number", refused, logit_bias={"1": "not_a_number"})
    yield case("logit_bias of words", says("bad1"), logit_bias={"bad1": 50.0, "bad2": 20.0})
    yield case("stop_token_ids", content(str), "keys of that server", stop_token_ids=[49151])
    yield case("stop_token_ids beyond the vocabulary", refused, stop_token_ids=[999999])
    yield case("stop_token_ids below it", refused, stop_token_ids=[-1])
    yield case("token ids", lambda _, body: bool(choice_of(body)["token_ids"]), "keys of that server", return_token_ids=True)
    yield case("token ids, streaming", ok, "keys of that server", return_token_ids=True, stream=True)
    for given in (b"this is not json{{{", b'["not", "an", "object"]', b"42", b"null"):
        yield Case(suite, f"the body {given.decode()}", lambda peer, given=given: _refuses(peer, given))  # type: ignore[misc]
    yield case("an empty cache_salt", refused, cache_salt="")
    thought = {"role": "assistant", "content": "4", "reasoning_content": "2+2 equals 4"}
    yield case("an earlier thought", content(str), messages=[*HELLO, thought, *HELLO])
    yield case("an earlier thought by both names", content(str), messages=[*HELLO, {**thought, "reasoning": "two and two"}, *HELLO])
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    yield Case(suite, "a form", lambda peer: peer.http.post(CHAT, content=b"a=b", headers=form).status_code in (400, 415, 422))


def _refuses(peer: Peer, content: bytes) -> bool:
    answer = peer.ask(CHAT, content=content)
    return refused(answer.status, answer.body)


def _session(peer: Peer) -> bool:
    first = peer.ask(CHAT, chat_body(logprobs=True, top_logprobs=5, ignore_eos=True))
    usage, choice = first.body["usage"], choice_of(first.body)
    said = {"role": "assistant", "content": choice["message"]["content"]}
    second = peer.ask(CHAT, chat_body([*SUM, said, {"role": "user", "content": "as JSON, please"}]))
    counted = usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] and usage["completion_tokens"] == 8
    return counted and choice["finish_reason"] == "length" and content(str)(second.status, second.body)


def _choices(peer: Peer) -> bool:
    body = chat_body(structured_outputs={"choice": LANGUAGES}, temperature=0.7, max_completion_tokens=10)
    first = peer.ask(CHAT, body)
    said = choice_of(first.body)["message"]["content"]
    other = [*SUM, {"role": "assistant", "content": said}, {"role": "user", "content": "I disagree, pick another one"}]
    second = peer.ask(CHAT, body | {"messages": other})
    return said in LANGUAGES and choice_of(second.body)["message"]["content"] in LANGUAGES


def stream_options(suite: str, path: str, body: Body) -> Iterator[Case]:
    def case(name: str, check: Check, options: Body, reason: str = "", *, stream: bool = True, **more: Any) -> Case:
        return Case(
            suite, f"stream_options: {name}", sends(path, body | {"stream": stream, "stream_options": options, **more}, check), reason
        )

    def without(status: int, events: Any) -> bool:
        return status == 200 and all(event.get("usage") is None for event in events)

    def at_the_end(status: int, events: Any) -> bool:
        *others, last = events
        usage = last["usage"]
        whole = usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] and usage["completion_tokens"] > 0
        return without(status, others) and last["choices"] == [] and whole

    def always(status: int, events: Any) -> bool:
        return status == 200 and all(event["usage"]["prompt_tokens"] > 0 for event in events)

    yield case("no usage", without, {"include_usage": False})
    yield case("no usage, again and again", without, {"include_usage": False, "continuous_usage_stats": True})
    yield case("usage", at_the_end, {"include_usage": True, "continuous_usage_stats": False})
    yield case("usage, again and again", always, {"include_usage": True, "continuous_usage_stats": True}, "usage at the start")
    yield case("none", without, {})
    for options in ({"include_usage": None}, {"include_usage": True}, {"continuous_usage_stats": None}, {"continuous_usage_stats": True}):
        yield case(f"{options} without a stream", refused, options, stream=False)


def completions() -> Iterator[Case]:
    suite, text, ids = "vLLM, completions", "Hello, my name is", [0, 0, 0, 0, 0]

    def case(name: str, check: Check, reason: str = "", prompt: Any = ids, **more: Any) -> Case:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 5, "temperature": 0.0, **more}
        return Case(suite, name, sends(TEXT, body, check), reason)

    def counted(status: int, body: Any) -> bool:
        usage, choice = body["usage"], choice_of(body)
        whole = usage["total_tokens"] == usage["prompt_tokens"] + 5 and usage["prompt_tokens_details"]["cached_tokens"] >= 0
        return status == 200 and choice["finish_reason"] == "length" and whole and len(body["choices"]) == 1

    def top(least: int, most: int) -> Check:
        def check(status: int, body: Any) -> bool:
            logprobs = choice_of(body)["logprobs"]
            return status == 200 and logprobs["token_logprobs"] is not None and least <= len(logprobs["top_logprobs"][0]) <= most

        return check

    yield case("a text", counted, prompt=text, ignore_eos=True)
    yield case("ids", lambda status, body: status == 200 and choice_of(body).get("prompt_logprobs") is None)
    for side in ("right", "left"):
        yield case(f"truncation: {side}", ok, "truncation", prompt=list(range(8)), truncate_prompt_tokens=4, truncation_side=side)
    yield case("no logprobs", lambda status, body: choice_of(body)["logprobs"] is None, logprobs=None)
    yield case("no top logprobs", top(1, 1), logprobs=0)
    yield case("five top logprobs", top(5, 6), logprobs=5)
    yield case("too many logprobs", refused, logprobs=21)
    yield case("too many logprobs, streaming", refused, logprobs=30, stream=True)
    yield case("an answer after them", ok)
    two = ["A robot may not injure another robot", "My name is"]
    yield case("prompt_logprobs -1", refused, prompt=two, prompt_logprobs=-1)
    for count in (0, 1):
        yield case(f"prompt_logprobs {count}", ok, "log-probabilities of a prompt", prompt=two, prompt_logprobs=count)
    yield case("no prompt_logprobs", choices(2), prompt=two)
    asked = {"model": MODEL, "prompt": "Once upon a time there was", "max_tokens": 5, "temperature": 0.0}
    yield Case(suite, "streaming", same_streamed(TEXT, asked, choices(1)))

    def unlike(status: int, body: Any) -> bool:
        return choices(3)(status, body) and len({choice["text"] for choice in body["choices"]}) == 3

    many: Body = {"prompt": "Once upon a time there was", "n": 3, "temperature": 1.0, "seed": 42, "max_tokens": 20}
    yield case("n", unlike, logprobs=0, **many)
    yield case("n, streaming", streamed(unlike), stream=True, **many)
    yield from stream_options(suite, TEXT, asked)

    def alike(status: int, body: Any) -> bool:
        return choices(2)(status, body) and len({choice["text"] for choice in body["choices"]}) == 1

    for kind, prompts in (("texts", [text] * 2), ("lists of ids", [ids] * 2)):
        yield case(kind, alike, prompt=prompts)
        yield case(f"{kind}, with beam search", choices(4), "keys of that server", prompt=prompts, n=2, use_beam_search=True)
        yield case(f"{kind}, streaming", streamed(alike), prompt=prompts, stream=True)
    for kind, prompt in (("a text", text), ("ids", ids)):
        for count in (1, 0):
            yield case(f"echo of {kind}, logprobs {count}", ok, "log-probabilities of a prompt", prompt=prompt, echo=True, logprobs=count)
    car = {"type": "object", "properties": {"brand": {"type": "string"}, "foo": "bar"}, "required": ["brand"]}
    yield case("a schema that is none", refused, prompt=text, structured_outputs={"json": car})
    yield case("a regex that is none", refused, prompt=text, structured_outputs={"regex": "[.*"}, stop=["\n"])
    sql = 'root ::= select_statementinvalidsyntax\nselect_statement ::= "SELECT " column\ncolumn ::= "col_1 " | "col_2 "'
    yield case("a grammar that is none", refused, prompt=text, structured_outputs={"grammar": sql})
    yield case("no prompt", refused, prompt=None, prompt_embeds=[])
    yield case("no prompts", refused, prompt=[])
    yield case("one prompt", choices(1), prompt=["hello"])
    yield case("an id beyond the vocabulary", says("999999"), prompt=[999999])
    emoji: Body = {"prompt": "I love coding 🚀", "logprobs": 1, "max_tokens": 10}
    yield case("token ids", lambda _, body: bool(choice_of(body)["token_ids"]), "keys of that server", return_token_ids=True, **emoji)
    yield case("tokens as ids", ok, "keys of that server", return_tokens_as_token_ids=True, **emoji)


def structured() -> Iterator[Case]:
    """Its cases for a model in the process, asked of the route that takes the same keys."""
    suite = "vLLM, structured output"

    def case(name: str, check: Check, prompt: str = "Answer as short as possible.", **form: Any) -> Case:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 400, "temperature": 0.8, "seed": 1, "structured_outputs": form}
        return Case(suite, name, sends(TEXT, body, check))

    def text(check: Callable[[str], object]) -> Check:
        return lambda status, body: status == 200 and bool(check(choice_of(body)["text"]))

    grade = {"type": "string", "pattern": "^[A-D]$"}
    mail = {"type": "string", "pattern": r"^[a-zA-Z0-9._%+-]{1,9}@[a-zA-Z0-9.-]{1,9}\.[a-zA-Z]{2,4}$"}
    score = {"type": "integer", "minimum": 0, "maximum": 100}
    word = {"type": "string", "pattern": "^[a-z]{1,10}$"}
    tagged = {"score": score, "grade": grade, "email": mail, "tags": {"type": "array", "items": word, "maxItems": 4}}
    step = {"type": "object", "properties": {"explanation": word, "output": word}, "required": ["explanation", "output"]}
    steps = {"steps": {"type": "array", "items": {"$ref": "#/$defs/Step"}, "maxItems": 3}, "final_answer": word}
    state = {
        "status": {"enum": ["active", "inactive"]},
        "category": {"type": "object", "properties": {"severity": {"enum": [1, 2, 3]}}, "required": ["severity"]},
    }
    multiple = {"score": {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}}
    for name, properties in (("patterns", tagged), ("enums", state), ("multipleOf", multiple)):
        schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
        yield case(f"json: {name}", fits(schema), json=schema)
    defined = {"$defs": {"Step": step}, "type": "object", "properties": steps, "required": list(steps)}
    yield case("json: definitions", fits(defined), json=defined)
    yield case("json: an employee", fits(EMPLOYEE), json=EMPLOYEE)
    yield case("json_object", an_object, prompt='A person as JSON, such as {"name": "Jo"}:', json_object=True)
    lines = [("select", '"SELECT " column " from " table'), ("column", '"col_1" | "col_2"'), ("table", '"table_1" | "table_2"')]
    select = re.compile(r"SELECT col_[12] from table_[12]").fullmatch
    ebnf = "root ::= select\n" + "\n".join(f"{name} ::= {rule}" for name, rule in lines)
    yield case("grammar: EBNF", text(select), grammar=ebnf)
    yield case("grammar: Lark", text(select), grammar="start: select\n" + "\n".join(f"{name}: {rule}" for name, rule in lines))
    yield case("grammar: none", refused, grammar="not a grammar")
    yield case("regex", text(re.compile(IP).fullmatch), regex=IP)
    yield case("choice", text(LANGUAGES.__contains__), choice=LANGUAGES)
    yield case("two forms", refused, json={"type": "object"}, regex=".*")
    yield Case(suite, "3 as a form", sends(CHAT, chat_body(structured_outputs=3), refused))
    yield Case(
        suite,
        "a form of JSON by a null tool_choice",
        sends(CHAT, chat_body(structured_outputs={"json": EMPLOYEE}, tool_choice=None, max_completion_tokens=400), fits(EMPLOYEE)),
    )


def tools() -> Iterator[Case]:
    suite, both = "vLLM, tools", [WEATHER, SEARCH]
    joke = [HELLO[0], {"role": "assistant", "content": "How can I help?"}, {"role": "user", "content": "Tell me a joke please"}]
    dallas = [{"role": "user", "content": "What is the weather in Dallas, Texas in Fahrenheit?"}]

    def case(name: str, check: Check, reason: str = "", messages: list[Body] = dallas, **more: Any) -> Case:
        return Case(suite, name, sends(CHAT, chat_body(messages, **more), check), reason)

    def same(name: str, check: Check, messages: list[Body], **more: Any) -> Case:
        return Case(suite, name, same_streamed(CHAT, chat_body(messages, **{"max_completion_tokens": 40, **more}), check))

    def called(id: str, city: str) -> Body:
        return {"id": id, "type": "function", "function": {"name": "get_current_weather", "arguments": json.dumps({"city": city})}}

    def result(id: str) -> Body:
        return {"role": "tool", "tool_call_id": id, "content": "98 degrees, partly cloudy"}

    yield same("no tools, whole and streamed", content(str), joke)
    yield same("tools that are not needed, whole and streamed", well_called([WEATHER]), joke, tools=[WEATHER])
    yield same("a call, whole and streamed", well_called(both), dallas, tools=both)
    one: list[Body] = [*dallas, {"role": "assistant", "tool_calls": [called("chatcmpl-tool-1", "Dallas")]}, result("chatcmpl-tool-1")]
    yield same("a result, whole and streamed", well_called(both), one, tools=both)
    two: list[Body] = [
        *dallas,
        {"role": "assistant", "tool_calls": [called("chatcmpl-tool-1", "Dallas"), called("chatcmpl-tool-2", "Orlando")]},
    ]
    yield same(
        "two results, whole and streamed", well_called(both), [*two, result("chatcmpl-tool-1"), result("chatcmpl-tool-2")], tools=both
    )
    yield same("two calls, whole and streamed", well_called(both), dallas, tools=both, max_completion_tokens=60)
    yield case("no list of tools", content(str))
    yield case("null tools", content(str), tools=None)
    yield case("an empty list of tools", refused, "taken here", tools=[])
    for choice in ("auto", "required"):
        yield case(f"{choice} without tools", refused, "taken here" if choice == "auto" else "", tool_choice=choice)
        yield case(f"{choice} with null tools", refused, "taken here" if choice == "auto" else "", tool_choice=choice, tools=None)
    named = {"type": "function", "function": {"name": "get_current_weather"}}
    form: Body = {"structured_outputs": {"json": {"type": "object"}}}
    yield case("a function, and a form", refused, tools=[WEATHER], tool_choice=named, **form)
    yield case("a form, or calls", ok, tools=[WEATHER], tool_choice="auto", max_completion_tokens=40, **form)
    yield case("tools without a choice", well_called([WEATHER]), tools=[WEATHER], max_completion_tokens=60)
    yield case("a null choice", well_called([WEATHER]), tools=[WEATHER], tool_choice=None, max_completion_tokens=60)
    yield case("a null choice without tools", content(str), tool_choice=None)
    yield case("a choice that is none", refused, tools=[WEATHER], tool_choice="bogus")
    yield case("none of them", lambda status, body: status == 200 and not calls_in(body), tools=[WEATHER], tool_choice="none")
    options = {"type": "object", "properties": {"days": {"type": "integer", "minimum": 1, "maximum": 7}}, "additionalProperties": False}
    where: Body = {
        "city": {"type": "string", "maxLength": 10, "default": "Vienna"},
        "country": {"type": "string", "maxLength": 10},
        "unit": UNIT,
    }
    now = function("get_current_weather", ["country", "unit"], **where, options={"$ref": "#/$defs/Options"})
    now["function"]["parameters"]["$defs"] = {"Options": options}
    later = function("get_forecast", ["country", "days", "unit"], days={"type": "integer", "minimum": 1, "maximum": 7}, **where)
    berlin = [{"role": "user", "content": "How is the weather in Berlin, and for the next 5 days, in fahrenheit?"}]
    ways: tuple[Any, ...] = ("auto", "required", named)
    for thinking in (False, True):
        for choice in ways:
            use: Body = {"tools": [now, later], "tool_choice": choice, "parallel_tool_calls": False, "max_completion_tokens": 200}
            body = chat_body(berlin, **use, chat_template_kwargs={"enable_thinking": thinking})
            right = well_called([now, later], least=0 if choice == "auto" else 1)
            check = all_of(right, lambda _, body: bool(choice_of(body)["message"]["reasoning"])) if thinking else right
            for way, run in both_ways(CHAT, body, check):
                what = choice if isinstance(choice, str) else "a function"
                yield Case(suite, f"{what}, thinking {thinking}{way}", run, "thinking" if thinking else "")
    for arguments in ("{}", ""):
        time = function("get_current_time")
        call = {"id": "call-of-a-clock", "type": "function", "function": {"name": "get_current_time", "arguments": arguments}}
        asked: list[Body] = [{"role": "user", "content": "What time is it?"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
        yield case(f"the result of a call without arguments: {arguments!r}", content(str), messages=[*asked, result("call-of-a-clock")])
        yield case(
            f"the same with its tool: {arguments!r}", well_called([time]), messages=[*asked, result("call-of-a-clock")], tools=[time]
        )
    dummy = {"type": "function", "function": {"name": "dummy_function_name", "description": "Makes it", "parameters": EMPLOYEE}}
    only = {"type": "function", "function": {"name": "dummy_function_name"}}
    for way, run in both_ways(
        CHAT, chat_body(tools=[dummy], tool_choice=only, max_completion_tokens=400), well_called([dummy], least=1, most=1)
    ):
        yield Case(suite, f"a named function{way}", run)
    yield case("a named function without tools", refused, tool_choice=only)
    yield case(
        "a named function that is none of the tools", refused, tools=[dummy], tool_choice={"type": "function", "function": {"name": "x"}}
    )
    yield case("an empty choice", refused, tools=[dummy], tool_choice={})

    def cut(status: int, body: Any) -> bool:
        return status == 200 and choice_of(body)["finish_reason"] == "length" and choice_of(body)["message"].get("tool_calls") is None

    for what, forced in (("required", ways[1]), ("a function", named)):
        yield case(f"a call that one token cuts: {what}", cut, tools=[now, later], tool_choice=forced, max_completion_tokens=1)


def suites() -> Iterator[Case]:
    yield from chats()
    yield from completions()
    yield from structured()
    yield from tools()
