"""Which bodies of Anthropic's messages and OpenAI's responses are taken, what generation they ask for, and which documents answer it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

from mesh.client import Chunk, Completion
from mesh.client.request import message_of
from mesh.errors import MeshError, MessageRejected
from mesh.gateway.app import _wrong_field
from mesh.gateway.messages_schema import MessageResponse, MessagesRequest
from mesh.gateway.messages_shape import MessageShape
from mesh.gateway.responses_schema import ResponseDocument, ResponsesRequest
from mesh.gateway.responses_shape import ResponseShape
from mesh.protocol import documents
from mesh.protocol.stream import Answer, Timing, Token, Usage
from mesh.protocol.tools import FORMATS, ToolParser, calls_of

USER = {"role": "user", "content": "a"}
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}


def read(model: type[BaseModel], body: dict[str, Any]) -> Any:
    data = json.dumps(body).encode()
    return model.model_validate(documents.read(model, data, limit_bytes=len(data)))


def refusal(model: type[BaseModel], body: dict[str, Any]) -> str | None:
    try:
        read(model, body)
    except ValidationError as error:
        found = error.errors()
        made: MeshError = _wrong_field(RequestValidationError([{**each, "loc": ("body", *each["loc"])} for each in found]))
        return str(made)
    except MessageRejected as error:
        return str(error)
    return None


def message(**keys: Any) -> dict[str, Any]:
    return {"model": "m", "max_tokens": 9, "messages": [USER], **keys}


def fields(**keys: Any) -> dict[str, Any]:
    """What a message asks of a coordinator; it must be a request that one takes."""
    made: dict[str, Any] = read(MessagesRequest, message(**keys)).fields()
    message_of(None, made)
    return made


def called(id: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}}


def response(before: list[dict[str, Any]] | None = None, **keys: Any) -> dict[str, Any]:
    made: dict[str, Any] = read(ResponsesRequest, {"model": "m", "input": "a", **keys}).fields(before or [])
    message_of(None, made)
    return made


def test_a_message_becomes_a_request() -> None:
    made = fields(system=[{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}], stop_sequences=["x"], top_k=5)
    system = {"role": "system", "content": "be\nbrief"}
    assert made == {"messages": [system, USER], "max_tokens": 9, "temperature": 1.0, "stop": ["x"], "top_k": 5}


def test_calls_and_results_become_messages_of_their_own() -> None:
    call = {"type": "tool_use", "id": "c1", "name": "f", "input": {"x": 1}}
    result = {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "no"}], "is_error": True}
    turns = [
        USER,
        {"role": "assistant", "content": [{"type": "text", "text": "so"}, call]},
        {"role": "user", "content": [result, {"type": "text", "text": "and"}]},
        {"role": "user", "content": "then"},
    ]
    made = fields(messages=turns, tools=[{"name": "f", "description": "d", "input_schema": SCHEMA, "strict": True}])
    assert made["messages"] == [
        USER,
        {
            "role": "assistant",
            "content": "so",
            "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "Error: no"},
        {"role": "user", "content": "and\nthen"},
    ]
    assert made["tools"] == [{"type": "function", "function": {"name": "f", "description": "d", "strict": True, "parameters": SCHEMA}}]
    assert "continue_final_message" not in made


def test_a_last_message_of_the_assistant_is_continued() -> None:
    assert fields(messages=[USER, {"role": "assistant", "content": "Once"}])["continue_final_message"] is True


def test_what_another_model_thought_is_left_out_of_messages() -> None:
    thought, hidden = {"type": "thinking", "thinking": "so", "signature": "s"}, {"type": "redacted_thinking", "data": "d"}
    said = {"role": "assistant", "content": [thought, hidden, {"type": "text", "text": "b"}]}
    assert fields(messages=[USER, said, USER])["messages"] == [USER, {"role": "assistant", "content": "b"}, USER]
    assert "continue_final_message" not in fields(messages=[USER, {"role": "assistant", "content": [thought]}])


@pytest.mark.parametrize(("choice", "formed"), [(None, True), ("auto", True), ("none", True), ("any", False), ("tool", False)])
def test_a_form_is_of_the_text_and_calls_that_are_forced_have_none(choice: str | None, formed: bool) -> None:
    tool, form = {"name": "f", "input_schema": SCHEMA}, {"format": {"type": "json_schema", "schema": SCHEMA}}
    named: dict[str, Any] = {} if choice is None else {"tool_choice": {"type": choice, **({"name": "f"} if choice == "tool" else {})}}
    assert ("structured_outputs" in fields(tools=[tool], output_config=form, **named)) is formed
    named = {"tool_choice": {"any": "required", "tool": {"type": "function", "name": "f"}}.get(choice or "", choice)}
    function, text = (
        {"type": "function", "name": "f", "parameters": SCHEMA},
        {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
    )
    assert ("structured_outputs" in response(tools=[function], text=text, **named)) is formed


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "any", "disable_parallel_tool_use": True}, {"tool_choice": "required", "parallel_tool_calls": False}),
        ({"type": "tool", "name": "f"}, {"tool_choice": {"type": "function", "function": {"name": "f"}}}),
        ({"type": "none"}, {"tool_choice": "none"}),
    ],
)
def test_choices_of_tools(choice: dict[str, Any], expected: dict[str, Any]) -> None:
    made = fields(tools=[{"name": "f", "input_schema": SCHEMA}], tool_choice=choice)
    assert {key: made[key] for key in ("tool_choice", "parallel_tool_calls") if key in made} == expected
    assert ("tools" in made) == (choice["type"] != "none")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"max_tokens": None}, "max_tokens: is missing: give it"),
        ({"temperature": 1.5}, "temperature: should be 1.0 or less"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}}, "thinking.type: a mesh keeps no thinking apart: leave thinking out"),
        ({"messages": [{"role": "system", "content": "a"}]}, "messages.0.role: should be 'user' or 'assistant'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "base64"}}]}]},
            "messages.0.content.0.type: should be 'text', 'tool_use', 'tool_result', 'thinking' or",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0: needs text with type text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {}}]}]},
            "messages.0: has a block tool_use, which messages of the role user do not have",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "so"}]}]},
            "messages.0: has a block thinking, which messages of the role user do not have",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type: should be 'custom'"),
        ({"tool_choice": {"type": "tool"}}, 'tool_choice: needs name with type "tool", and with no other'),
        ({"mcp_servers": [{}]}, "mcp_servers: a mesh calls no servers: leave it out"),
        ({"container": "c"}, "container: a mesh runs no containers: leave it out"),
        ({"logprobs": 1}, "logprobs: messages have no place for log-probabilities: leave it out"),
        ({"colour": "red"}, "colour is not a key here: there are model"),
    ],
)
def test_what_a_message_cannot_have_is_named(body: dict[str, Any], says: str) -> None:
    assert (refusal(MessagesRequest, message(**body)) or "").startswith(says)


def test_a_response_becomes_a_request() -> None:
    form = {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA, "strict": True}, "verbosity": "low"}
    made = response(instructions="be brief", max_output_tokens=5, text=form, store=False, reasoning={"effort": "low"}, metadata={"a": "b"})
    assert made == {
        "messages": [{"role": "system", "content": "be brief"}, USER],
        "max_tokens": 5,
        "temperature": 1.0,
        "structured_outputs": {"json": SCHEMA},
    }


def test_items_become_messages_after_those_of_earlier_responses() -> None:
    said = {"type": "output_text", "text": "so", "annotations": []}
    items = [
        {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [said]},
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "2"}]},
        {"role": "developer", "content": "go"},
    ]  # fmt: skip
    calls = [called("c1", "{}"), called("c2", "{}")]
    assert response([USER], input=items)["messages"] == [
        USER,
        {"role": "assistant", "content": "so", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "system", "content": "go"},
    ]


def test_what_another_model_thought_is_left_out_of_a_response() -> None:
    thought: dict[str, Any] = {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None, "status": "completed"}
    spoken = {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "reasoning_text", "text": "so"}, {"type": "output_text", "text": "b"}],
    }
    items = [USER, {**thought, "content": [{"type": "reasoning_text", "text": "so"}]}, spoken, thought]
    assert response(input=items)["messages"] == [USER, {"role": "assistant", "content": "b"}]


def test_functions_of_a_response() -> None:
    tools = [{"type": "function", "name": "f", "parameters": SCHEMA, "strict": True, "description": None}]
    made = response(tools=tools, tool_choice={"type": "function", "name": "f"}, parallel_tool_calls=False)
    assert made["tools"] == [{"type": "function", "function": {"name": "f", "parameters": SCHEMA, "strict": True}}]
    assert made["tool_choice"] == {"type": "function", "function": {"name": "f"}} and made["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"background": True}, "background: a mesh answers at once"),
        ({"conversation": "conv_1"}, "conversation: a mesh keeps responses, and no conversations"),
        ({"include": ["file_search_call.results"]}, "include.0: should be 'message.output_text.logprobs' or"),
        ({"truncation": "auto"}, "truncation: a mesh leaves no messages out"),
        ({"top_logprobs": 21}, "top_logprobs: should be 20 or less"),
        ({"logprobs": True}, "logprobs: give top_logprobs and include"),
        ({"top_logprobs": 2, "tools": [{"type": "function", "name": "f"}]}, "log-probabilities are not told apart"),
        ({"prompt": {"id": "p"}}, "prompt: a mesh keeps no prompts"),
        ({"max_tool_calls": 3}, "max_tool_calls: a mesh calls no tools itself"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type: should be 'function'"),
        ({"input": [{"type": "item_reference", "id": "i"}]}, "input.0.type: should be 'message', 'function_call', 'function_call_output'"),
        ({"input": [{"type": "function_call_output", "output": "1"}]}, "input.0: needs call_id with type function_call_output"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "u"}]}]}, "input.0.content.0.type: should"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text.format: needs schema"),
        ({"previous_response_id": "x"}, "previous_response_id: "),
        ({"colour": "red"}, "colour is not a key here"),
    ],
)  # fmt: skip
def test_what_a_response_cannot_have_is_named(body: dict[str, Any], says: str) -> None:
    assert (refusal(ResponsesRequest, {"model": "m", "input": "a", **body}) or "").startswith(says)


# -- documents -----------------------------------------------------------------------------------------------------------------

TEXT = 'so <tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>'
HERMES = FORMATS["hermes"]


def completion(text: str, *, reason: str = "stop", stop: str | None = None) -> Completion:
    content, calls = calls_of(text, HERMES, ["f"], "r")
    timing, usage = Timing(0, 0, None, 0, 0, None, 0), Usage(7, 3)
    answer = Answer("r", (1,), text, reason, usage, timing, tool_calls=calls, content=content, tool_format="hermes", stop_text=stop)
    return Completion.of(answer)


def streamed(shape: Any, answer: Completion) -> list[dict[str, Any]]:
    """The events of an answer that comes three characters at a time."""
    text = answer.text or ""
    shape.name("r")
    shape.read_calls(0, ToolParser(HERMES, ["f"], "r"))
    events: list[dict[str, Any]] = []
    pieces = [text[at : at + 3] for at in range(0, len(text), 3)]
    for index, piece in enumerate(pieces):
        events += shape.part(0, Chunk(piece, Token(index), index, 0.0), None)
    return [*events, *shape.part(0, Chunk("", None, len(pieces), 0.0), answer), *shape.end([answer])]


def test_a_message_and_its_events_say_the_same() -> None:
    shape = MessageShape("m")
    shape.name("r")
    whole = shape.whole([completion(TEXT)])
    MessageResponse.model_validate(whole)
    assert (
        whole["stop_reason"] == "tool_use"
        and whole["usage"]
        == {
            "input_tokens": 7,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": 3,
        }
        and whole["id"] == "msg_r"
    )
    assert [block["type"] for block in whole["content"]] == ["text", "tool_use"]
    events = streamed(MessageShape("m"), completion(TEXT))
    blocks = [event["content_block"] for event in events if event["type"] == "content_block_start"]
    for event in events:
        if event["type"] == "content_block_delta":
            delta, block = event["delta"], blocks[event["index"]]
            key = "text" if delta["type"] == "text_delta" else "partial_json"
            block[key] = block.get(key, "") + delta[key]
    assert blocks[0] == whole["content"][0]
    assert {**whole["content"][1], "partial_json": '{"x": 1}'} == {**blocks[1], "input": {"x": 1}}
    kinds = [event["type"] for event in events]
    assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 2
    assert events[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None} and events[-2]["usage"] == whole["usage"]


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (completion("a"), ("end_turn", None)),
        (completion("a", reason="length"), ("max_tokens", None)),
        (completion("a", stop="x"), ("stop_sequence", "x")),
        (completion(TEXT[:-30], reason="length"), ("max_tokens", None)),
    ],
)
def test_why_a_message_ends(answer: Completion, expected: tuple[str, str | None]) -> None:
    whole = MessageShape("m").whole([answer])
    assert (whole["stop_reason"], whole["stop_sequence"]) == expected
    assert all(block["type"] == "text" for block in whole["content"]), "a call that is not complete has no input"
    end = streamed(MessageShape("m"), answer)[-2]["delta"]
    assert (end["stop_reason"], end["stop_sequence"]) == expected


@pytest.mark.parametrize("reason", ["stop", "length"])
def test_a_response_and_its_events_say_the_same(reason: str) -> None:
    echoed = read(ResponsesRequest, {"model": "m", "input": "a"}).echoed()
    shape = ResponseShape("m", 5, echoed)
    shape.name("r")
    whole = shape.whole([completion(TEXT, reason=reason)])
    ResponseDocument.model_validate(whole)
    assert whole["status"] == ("completed" if reason == "stop" else "incomplete")
    assert [item["type"] for item in whole["output"]] == ["message", "function_call"]
    events = streamed(ResponseShape("m", 5, echoed), completion(TEXT, reason=reason))
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1] == {"type": f"response.{whole['status']}", "sequence_number": len(events) - 1, "response": whole}
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == whole["output"]
    deltas = "".join(event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta")
    assert deltas == whole["output"][1]["arguments"] == '{"x": 1}'


@pytest.mark.parametrize(
    ("asked", "most"),
    [({}, None), ({"top_logprobs": 0}, None), ({"top_logprobs": 3}, 3), ({"include": ["message.output_text.logprobs"]}, 0)],
)
def test_log_probabilities_of_a_response(asked: dict[str, Any], most: int | None) -> None:
    assert response(**asked).get("logprobs") == most


def test_log_probabilities_of_a_response_are_in_its_events_and_in_the_whole() -> None:
    """Each once, also those of tokens that complete no character."""
    pieces = [("a", None), ("\ufffd", b"\xc3"), ("\ufffd", b"\xa9"), ("b", None)]
    tokens = [Token(id, -0.5, ((id, -0.5), (9, -1.5)), piece, ("z",), raw) for id, (piece, raw) in enumerate(pieces)]
    tokens = [replace(token, top_pieces=(token.piece, "z"), top_raws=(token.raw, None)) for token in tokens]
    answer = replace(completion("aéb"), logprobs=tuple(tokens))
    shape, texts = ResponseShape("m", 5, {}), ("a", "", "é", "b")
    chunks = [Chunk(text, token, token.id, 0.0) for text, token in zip(texts, tokens, strict=True)]
    shape.name("r")
    events = [event for chunk in chunks for event in shape.part(0, chunk, None)]
    events += [*shape.part(0, Chunk("", None, 4, 0.0), answer), *shape.end([answer])]
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert [len(delta["logprobs"]) for delta in deltas] == [1, 2, 1]
    (part,) = events[-1]["response"]["output"][0]["content"]
    assert part["logprobs"] == [entry for delta in deltas for entry in delta["logprobs"]]
    assert part["logprobs"][0] == {"token": "a", "logprob": -0.5, "bytes": [97], "top_logprobs": part["logprobs"][0]["top_logprobs"]}
    assert bytes(byte for entry in part["logprobs"] for byte in entry["bytes"]).decode() == "aéb"
    whole = ResponseShape("m", 5, {})
    whole.name("r")
    assert whole.whole([answer])["output"] == events[-1]["response"]["output"]


def test_the_turn_of_a_response_is_a_message_that_a_later_request_takes() -> None:
    shape = ResponseShape("m", 5, {})
    shape.name("r")
    shape.whole([completion(TEXT)])
    call = shape.document["output"][1]
    later = response([USER, shape.turn()], input=[{"type": "function_call_output", "call_id": call["call_id"], "output": "1"}])
    assert [turn["role"] for turn in later["messages"]] == ["user", "assistant", "tool"]
