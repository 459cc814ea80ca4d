"""What the cases of other servers' test suites are made of: requests, and checks of what is answered. See peer_cases.py."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import jsonschema_rs

__all__ = [
    "MODEL",
    "REASONS",
    "Answer",
    "Body",
    "Case",
    "Check",
    "Peer",
    "all_of",
    "an_object",
    "both_ways",
    "calls_in",
    "choice_of",
    "fits",
    "function",
    "joined",
    "ok",
    "refused",
    "same_streamed",
    "says",
    "sends",
    "streamed",
    "well_called",
]

Body = dict[str, Any]
MODEL = "MODEL"
"""In a case's request, the name of the model that is served."""

REASONS = {
    "mixed lists": "a list is of texts, of token ids, or of lists of ids: OpenAI's own schema",
    "objects as input": "OpenAI's schema has no objects there",
    "empty text": "a text without a token has no last token: a 400 that names it",
    "another pooling": "mean needs the states of all positions; positions that are reused have none",
    "messages to embed": "not in OpenAI's embeddings; `messages` with `embed` works over NATS",
    "truncation": "nothing is cut in silence: a 400 that says so",
    "another route": "a route of that server alone",
    "images": "a mesh takes text alone: a 400",
    "thinking": "asks for what a mesh does not do, or for a model that thinks: no thinking is kept apart",
    "no messages": "Anthropic's own API refuses an empty list too",
    "keys of that server": "a key that OpenAI's API does not have, and a mesh neither: a 400 that names it",
    "parts of that server's answer": "a key of the answer that OpenAI's API does not have",
    "usage at the start": "a stream begins before its prompt is tokenized; the counts come at its end",
    "fingerprint": "OpenAI has made system_fingerprint optional",
    "two turns of one side": "templates that take two messages of the assistant in a row get them",
    "log-probabilities of a prompt": "a mesh computes none: a 400",
    "unknown keys": "a key that is not known may be a misspelt one: a 400 that names it",
    "a role of one's own": "OpenAI's API has none",
    "tokens of a template": "the template of messages has those tokens: a 400 that says so",
    "background": "a mesh answers at once: a 400; /api/v1/batch has work that goes on alone",
    "taken here": "the suite expects an error, and a mesh does what is asked for",
    "a wrong key of the suite": "Anthropic's own API wants tool_use_id there",
}


@dataclass(frozen=True)
class Answer:
    """body: a document, or of a stream its events. ended: whether a stream said that it is over."""

    status: int
    body: Any
    ended: bool = True


Check = Callable[[int, Any], bool]


class Peer:
    """The server that is asked. faults: requests that were answered by a fault of the server, or not at all: no case may have any."""

    def __init__(self, http: httpx.Client, model: str) -> None:
        self.http = http
        self.model = model
        self.faults: list[str] = []
        self.requests = 0
        self.last = ""
        """What was answered last, in short."""

    def ask(self, path: str, body: Any = None, *, method: str = "POST", content: bytes | None = None) -> Answer:
        self.requests += 1
        sent = (
            {"content": content, "headers": {"content-type": "application/json"}}
            if content is not None
            else {"json": _named(body, self.model)}
        )
        try:
            response = self.http.request(method, path, **(sent if method == "POST" else {}))
        except httpx.HTTPError as error:
            self.faults.append(f"{path}: {error!r}")
            return Answer(0, {})
        answer = _answer(response)
        self.last = f"{answer.status} {str(answer.body)[:400]}"
        if answer.status >= 500 or not answer.ended:
            self.faults.append(f"{path}: {self.last}")
        return answer


def _named(body: Any, model: str) -> Any:
    return body | {"model": model} if isinstance(body, dict) and body.get("model") == MODEL else body


def _answer(response: httpx.Response) -> Answer:
    if response.headers.get("content-type", "").startswith("text/event-stream"):
        lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
        events = [json.loads(line) for line in lines if line != "[DONE]"]
        kinds = {event.get("type", "") for event in events}
        return Answer(response.status_code, events, bool(kinds & _LAST) or lines[-1:] == ["[DONE]"])
    try:
        return Answer(response.status_code, response.json())
    except ValueError:
        return Answer(response.status_code, response.text)


_LAST = {"message_stop", "error", "response.completed", "response.incomplete", "response.failed"}


@dataclass(frozen=True)
class Case:
    """`run` says whether the answers are what the suite expects. reason: why they are not, one of REASONS; empty: they should be."""

    suite: str
    name: str
    run: Callable[[Peer], bool] = field(repr=False)
    reason: str = ""


def sends(path: str, body: Any, check: Check) -> Callable[[Peer], bool]:
    """One request, and a check of its answer."""

    def run(peer: Peer) -> bool:
        answer = peer.ask(path, body)
        return check(answer.status, answer.body)

    return run


# -- checks ------------------------------------------------------------------------------------------------------------


def ok(status: int, body: Any) -> bool:
    return status == 200


def refused(status: int, body: Any) -> bool:
    """A clear error of the request."""
    return 400 <= status < 500 and bool(body["error"]["message"])


def says(*parts: str) -> Check:
    """Refused, with an error that has all of these in it."""
    return lambda status, body: refused(status, body) and all(part in body["error"]["message"] for part in parts)


def all_of(*checks: Check) -> Check:
    return lambda status, body: all(check(status, body) for check in checks)


def choice_of(body: Any) -> Any:
    return body["choices"][0]


def fits(schema: Body) -> Check:
    """The answer of a chat or a completion is whole, and JSON by this schema."""

    def check(status: int, body: Any) -> bool:
        choice = choice_of(body)
        text = choice["text"] if "text" in choice else choice["message"]["content"]
        return status == 200 and _valid(json.loads(text), schema)

    return check


def an_object(status: int, body: Any) -> bool:
    """Any JSON object; a weak model may never end one, so that max_tokens does."""
    choice = choice_of(body)
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return status == 200 and (text.startswith("{") if choice["finish_reason"] == "length" else isinstance(json.loads(text), dict))


def _valid(value: Any, schema: Body) -> bool:
    return jsonschema_rs.is_valid(schema, value)


# -- tools -------------------------------------------------------------------------------------------------------------


def function(name: str, required: Sequence[str] = (), /, *, strict: bool | None = None, **properties: Body) -> Body:
    """A tool, as the chat API has it. Its parameters are closed, so that a weak model's calls end."""
    parameters = {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}
    about = {"name": name, "description": f"Does {name.replace('_', ' ')}", "parameters": parameters}
    return {"type": "function", "function": about | ({} if strict is None else {"strict": strict})}


def calls_in(body: Any) -> list[Body]:
    return choice_of(body)["message"].get("tool_calls") or []


def well_called(tools: Sequence[Body], *, least: int = 0, most: int = 64) -> Check:
    """A whole chat answer: text, or so many calls, each of one of the tools, with arguments that fit where there is a schema to keep."""
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in tools}

    def check(status: int, body: Any) -> bool:
        choice, calls = choice_of(body), calls_in(body)
        right = all(
            call["type"] == "function" and len(call["id"]) >= 9 and _called(call["function"], schemas, forced=least > 0) for call in calls
        )
        ends = choice["finish_reason"] == "tool_calls" if calls else choice["message"]["content"] is not None
        empty = not least or choice["message"]["content"] in (None, "")
        return status == 200 and choice["message"]["role"] == "assistant" and right and ends and empty and least <= len(calls) <= most

    return check


def _called(called: Body, schemas: dict[str, Body], *, forced: bool) -> bool:
    arguments = json.loads(called["arguments"])
    return isinstance(arguments, dict) and called["name"] in schemas and (not forced or _valid(arguments, schemas[called["name"]]))


# -- streams -----------------------------------------------------------------------------------------------------------


def joined(events: Sequence[Body], index: int = 0) -> Body:
    """The whole document's choice that the parts of a stream make. AssertionError: they contradict each other."""
    made: Body = {"index": index, "finish_reason": None, "logprobs": [], "message": {"role": None, "content": ""}}
    calls: dict[int, Body] = {}
    for choice in (choice for event in events for choice in event["choices"] if choice["index"] == index):
        assert made["finish_reason"] is None, "something follows the end"
        made["finish_reason"] = choice["finish_reason"]
        made["logprobs"] += [choice["logprobs"]] if choice.get("logprobs") else []
        if "text" in choice:
            made["text"] = made.get("text", "") + choice["text"]
        delta = choice.get("delta", {})
        if delta.get("role"):
            assert made["message"]["role"] is None, "the role comes twice"
            made["message"]["role"] = delta["role"]
        made["message"]["content"] += delta.get("content") or ""
        for part in delta.get("tool_calls") or ():
            _add(calls, part)
    assert made["finish_reason"] is not None, "the choice has no end"
    if calls:
        made["message"]["tool_calls"] = [calls[number] for number in sorted(calls)]
    return made


def _add(calls: dict[int, Body], part: Body) -> None:
    if part["index"] not in calls:
        assert part["id"] and part["function"]["name"], "a call begins without its name"
        calls[part["index"]] = {"id": part["id"], "type": part["type"], "function": {"name": part["function"]["name"], "arguments": ""}}
    else:
        assert not part.get("id") and not part["function"].get("name"), "the name comes twice"
    calls[part["index"]]["function"]["arguments"] += part["function"].get("arguments") or ""


def streamed(check: Check) -> Check:
    """The same check of the whole answer that a stream makes."""

    def of(status: int, events: Any) -> bool:
        if status != 200:
            return False
        numbers = sorted({choice["index"] for event in events for choice in event["choices"]})
        return check(status, {"choices": [joined(events, number) for number in numbers]})

    return of


def both_ways(path: str, body: Body, check: Check) -> Iterator[tuple[str, Callable[[Peer], bool]]]:
    """The case whole, and as a stream."""
    yield "", sends(path, body, check)
    yield ", streaming", sends(path, body | {"stream": True}, streamed(check))


def same_streamed(path: str, body: Body, check: Check) -> Callable[[Peer], bool]:
    """Whole and streamed, the answer is the same, and right."""

    def run(peer: Peer) -> bool:
        whole, parts = peer.ask(path, body), peer.ask(path, body | {"stream": True})
        if not check(whole.status, whole.body) or parts.status != 200:
            return False
        one, other = choice_of(whole.body), joined(parts.body)
        if "text" in one:
            return bool(one["text"] == other["text"] and one["finish_reason"] == other["finish_reason"])
        message = one["message"]
        equal = (message["content"] or "") == other["message"]["content"] and one["finish_reason"] == other["finish_reason"]
        return equal and [call["function"] for call in calls_in(whole.body)] == [
            call["function"] for call in other["message"].get("tool_calls", ())
        ]

    return run
