"""Anthropic's messages and OpenAI's responses with their own clients, and vLLM's routes for tokens: the same generations as everywhere."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from edge_tools import bearer, edge, token, verifier
from tiny_chat_model import END, make_chat_model

from mesh.client import MeshClient
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.model.tokenizer import Tokenizer

CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
GREEDY = {"temperature": 0}  # Anthropic's later clients have no argument for it
MESSAGE: dict[str, Any] = {"model": "tinychat", "messages": HELLO, "max_tokens": 12, "extra_body": GREEDY}
RESPONSE: dict[str, Any] = {"model": "tinychat", "input": "hello", "max_output_tokens": 12, "temperature": 0}
WEATHER: dict[str, Any] = {"name": "weather", "description": "the weather", "input_schema": CITY, "strict": True}
FUNCTION: dict[str, Any] = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}


def _prompt(usage: anthropic.types.Usage) -> int:
    """The tokens of a prompt: what was read from rows that were kept is counted apart."""
    return usage.input_tokens + (usage.cache_read_input_tokens or 0)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def mesh(chat_model: Path) -> Iterator[LocalMesh]:
    with LocalMesh(LocalOptions(model=chat_model, shards=1, rows=4, context=512, http=False)) as running:
        yield running


@pytest.fixture(scope="module")
def url(mesh: LocalMesh) -> Iterator[str]:
    with edge(mesh.url, model="tinychat") as running:
        yield running


@pytest.fixture(scope="module")
def expected(mesh: LocalMesh) -> str:
    with MeshClient(mesh.url, model="tinychat") as native:
        text = native.chat(HELLO, max_tokens=12).text
    assert text
    return text


@pytest.fixture
def claude(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture
def ai(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


# -- messages ------------------------------------------------------------------------------------------------------------------


def test_a_message_is_what_the_native_api_generates(claude: anthropic.Anthropic, expected: str) -> None:
    answer = claude.messages.create(**MESSAGE)
    (block,) = answer.content
    assert block.type == "text" and block.text == expected
    assert (answer.role, answer.stop_reason, answer.model) == ("assistant", "max_tokens", "tinychat") and answer.id.startswith("msg_")
    assert (
        answer.usage.output_tokens == 12
        and answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0)
        == claude.messages.count_tokens(model="tinychat", messages=HELLO).input_tokens
    )


def test_a_message_streamed(claude: anthropic.Anthropic, expected: str) -> None:
    with claude.messages.stream(**MESSAGE) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == expected == getattr(final.content[0], "text", None)
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 12 and _prompt(final.usage) > 0


def test_system_stop_sequences_and_the_beginning_of_an_answer(claude: anthropic.Anthropic, mesh: LocalMesh, expected: str) -> None:
    stop = expected[3:5]
    answer = claude.messages.create(**MESSAGE, stop_sequences=["never there", stop])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", stop)
    assert "".join(getattr(block, "text", "") for block in answer.content) == expected[: expected.index(stop)]
    with MeshClient(mesh.url, model="tinychat") as native:
        begun = [*HELLO, {"role": "assistant", "content": "Once"}]
        continued = native.chat(begun, max_tokens=12, continue_final_message=True).text
        told = native.chat([{"role": "system", "content": "be brief"}, *HELLO], max_tokens=12).text
    assert getattr(claude.messages.create(**{**MESSAGE, "messages": begun}).content[0], "text", None) == continued
    assert getattr(claude.messages.create(**MESSAGE, system="be brief").content[0], "text", None) == told != expected


def test_a_tool_is_called_streamed_and_its_result_taken(claude: anthropic.Anthropic) -> None:
    request: dict[str, Any] = {**MESSAGE, "max_tokens": 200, "tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}}
    whole = claude.messages.create(**request)
    with claude.messages.stream(**request) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_message()
    assert "input_json" in kinds
    (call,) = whole.content
    (streamed,) = final.content
    assert call.type == streamed.type == "tool_use" and whole.stop_reason == final.stop_reason == "tool_use"
    assert (call.name, call.input) == (streamed.name, streamed.input) == ("weather", call.input)
    assert set(call.input) == {"city", "days"} and call.input["city"] in ("Paris", "Rome")
    turns = [
        *HELLO,
        {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in whole.content]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "sun"}]},
    ]
    after = claude.messages.create(**{**MESSAGE, "messages": turns, "tools": [WEATHER], "tool_choice": {"type": "none"}})
    assert after.content and after.content[0].type == "text"
    with pytest.raises(anthropic.BadRequestError, match="which no message of the assistant before it has made"):
        forged = [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "forged", "content": "sun"}]}]
        claude.messages.create(**{**MESSAGE, "messages": forged})


def test_the_form_of_a_message(claude: anthropic.Anthropic) -> None:
    config: Any = {"format": {"type": "json_schema", "schema": CITY}}
    answer = claude.messages.create(**{**MESSAGE, "max_tokens": 100}, output_config=config)
    assert answer.stop_reason == "end_turn" and json.loads(getattr(answer.content[0], "text", ""))["city"] in ("Paris", "Rome")


def test_errors_are_anthropics_own(claude: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="there is tinychat"):
        claude.messages.create(**{**MESSAGE, "model": "another"})
    with pytest.raises(anthropic.BadRequestError) as wrong:
        claude.messages.create(**{**MESSAGE, "extra_body": {"temperature": 3}})
    body: Any = wrong.value.body
    assert (
        body["type"] == "error" and body["error"]["type"] == "invalid_request_error" and body["error"]["message"].startswith("temperature")
    )


def test_a_token_is_the_api_key_of_either_client(mesh: LocalMesh) -> None:
    with edge(mesh.url, model="tinychat", verifier=verifier()) as url:
        for right in ({"api_key": token("generate")}, {"auth_token": token("generate"), "api_key": None}):
            with anthropic.Anthropic(base_url=url, max_retries=0, **right) as client:
                assert client.messages.create(**MESSAGE).content
        with anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0) as client, pytest.raises(anthropic.AuthenticationError):
            client.messages.create(**MESSAGE)


# -- responses -----------------------------------------------------------------------------------------------------------------


def test_a_response_whole_and_streamed(ai: openai.OpenAI, expected: str) -> None:
    whole = ai.responses.create(**RESPONSE)
    assert whole.output_text == expected and whole.status == "incomplete" and whole.id.startswith("resp_")
    assert whole.incomplete_details is not None and whole.incomplete_details.reason == "max_output_tokens"
    assert whole.usage is not None and whole.usage.output_tokens == 12
    events = list(ai.responses.create(**RESPONSE, stream=True))
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    last = events[-1]
    assert last.type == "response.incomplete" and last.response.usage == whole.usage  # their helper for streams takes completed ones alone
    assert "".join(deltas) == last.response.output_text == expected and len(deltas) > 3
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_a_response_goes_on_with_the_one_before_at_any_gateway_and_is_forgotten(ai: openai.OpenAI, mesh: LocalMesh) -> None:
    first = ai.responses.create(**RESPONSE)
    with edge(mesh.url, model="tinychat") as other, openai.OpenAI(base_url=f"{other}/v1", api_key="none", max_retries=0) as elsewhere:
        assert elsewhere.responses.retrieve(first.id).output_text == first.output_text
        second = elsewhere.responses.create(**{**RESPONSE, "input": "more"}, previous_response_id=first.id)
    turns = [*HELLO, {"role": "assistant", "content": first.output_text}, {"role": "user", "content": "more"}]
    assert second.output_text == ai.responses.create(**{**RESPONSE, "input": turns}, store=False).output_text
    assert second.previous_response_id == first.id
    ai.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(first.id)
    with pytest.raises(openai.BadRequestError) as gone:
        ai.responses.create(**RESPONSE, previous_response_id=first.id)
    assert gone.value.param == "previous_response_id"
    unkept = ai.responses.create(**RESPONSE, store=False)
    with pytest.raises(openai.NotFoundError):
        ai.responses.retrieve(unkept.id)


def test_another_subject_reads_no_response(mesh: LocalMesh) -> None:
    with edge(mesh.url, model="tinychat", verifier=verifier()) as url:

        def of(subject: str) -> openai.OpenAI:
            return openai.OpenAI(base_url=f"{url}/v1", api_key=token("generate", subject=subject), max_retries=0)

        with of("ann") as ann, of("bob") as bob:
            mine = ann.responses.create(**RESPONSE)
            assert ann.responses.retrieve(mine.id).id == mine.id
            for refused in (lambda: bob.responses.retrieve(mine.id), lambda: bob.responses.delete(mine.id)):
                with pytest.raises(openai.NotFoundError):
                    refused()
            with pytest.raises(openai.BadRequestError):
                bob.responses.create(**RESPONSE, previous_response_id=mine.id)
            assert ann.responses.retrieve(mine.id).id == mine.id


def test_a_function_of_a_response_is_called_and_its_output_taken(ai: openai.OpenAI) -> None:
    request: dict[str, Any] = {**RESPONSE, "max_output_tokens": 200, "tools": [FUNCTION]}
    asked = {**request, "tool_choice": {"type": "function", "name": "weather"}}
    whole = ai.responses.create(**asked)
    with ai.responses.stream(**asked) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    (call,) = whole.output
    assert call.type == "function_call" and call.name == "weather" and set(json.loads(call.arguments)) == {"city", "days"}
    assert "".join(deltas) == call.arguments == getattr(final.output[0], "arguments", None)
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "sun"}]
    after = ai.responses.create(
        **{**request, "input": result, "tool_choice": "none", "max_output_tokens": 8}, previous_response_id=whole.id
    )
    assert after.output_text


def test_the_form_of_a_response(ai: openai.OpenAI) -> None:
    text: Any = {"format": {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}}
    answer = ai.responses.create(**{**RESPONSE, "max_output_tokens": 100}, text=text)
    assert answer.status == "completed" and json.loads(answer.output_text)["city"] in ("Paris", "Rome")


# -- tokens --------------------------------------------------------------------------------------------------------------------


def test_the_tokens_of_a_text_and_the_text_of_tokens(url: str, mesh: LocalMesh, chat_model: Path) -> None:
    tokenizer = Tokenizer.load(chat_model)
    text = f"hello{END} there"
    with httpx.Client(base_url=url, timeout=60) as http, MeshClient(mesh.url, model="tinychat") as native:
        found = http.post("/tokenize", json={"model": "tinychat", "prompt": text, "return_token_strs": True}).json()
        assert found["tokens"] == tokenizer.encode(text) and found["count"] == len(found["tokens"]) and found["max_model_len"] == 512
        assert found["token_strs"] == [tokenizer.token(id) for id in found["tokens"]]
        assert http.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
        assert native.detokenize(native.tokenize(text).tokens) == text
        messages = http.post("/tokenize", json={"messages": HELLO}).json()
        assert messages["count"] == native.chat(HELLO, max_tokens=1).usage.prompt_tokens and messages["token_strs"] is None
        for body, status, says in (
            ({"prompt": "a", "messages": HELLO}, 400, "exactly one of prompt and messages"),
            ({"prompt": "a", "model": "another"}, 404, "there is tinychat"),
            ({"prompt": "a", "chat_template": "x"}, 400, "chat_template: a mesh has the template of its model alone"),
            ({"prompt": "a " * 200_000}, 400, "no prompt of more than"),
        ):
            refused = http.post("/tokenize", json=body)
            assert refused.status_code == status and says in refused.json()["error"]["message"]
        unknown = http.post("/detokenize", json={"tokens": [10**6]})
        assert unknown.status_code == 400 and "is not in the vocabulary" in unknown.json()["error"]["message"]


def test_asking_for_tokens_needs_a_token_and_counts_as_a_request(mesh: LocalMesh) -> None:
    with edge(mesh.url, model="tinychat", verifier=verifier()) as url:
        assert httpx.post(f"{url}/tokenize", json={"prompt": "a"}).status_code == 401
        once = bearer(token("generate", subject="counted", requests_per_minute=1))
        assert [httpx.post(f"{url}/tokenize", json={"prompt": "a"}, headers=once).status_code for _ in range(2)] == [200, 429]


# -- completions ---------------------------------------------------------------------------------------------------------------


def test_echo_begins_each_choice_with_its_prompt(ai: openai.OpenAI, chat_model: Path) -> None:
    ids = Tokenizer.load(chat_model).encode("snow")
    request: dict[str, Any] = {"model": "tinychat", "temperature": 0, "max_tokens": 6}
    plain = [ai.completions.create(**request, prompt=prompt).choices[0].text for prompt in ("rain", "snow")]
    both = ai.completions.create(**request, prompt=["rain", "snow"], echo=True, n=2)
    assert [choice.text for choice in both.choices] == [f"rain{plain[0]}"] * 2 + [f"snow{plain[1]}"] * 2
    assert ai.completions.create(**request, prompt=ids, echo=True).choices[0].text == f"snow{plain[1]}"
    streamed = list(ai.completions.create(**request, prompt="rain", echo=True, stream=True))
    assert "".join(part.choices[0].text for part in streamed) == f"rain{plain[0]}"
    with pytest.raises(openai.BadRequestError) as refused:
        ai.completions.create(**request, prompt="rain", echo=True, logprobs=1)
    assert refused.value.param == "echo" and "log-probabilities of a prompt" in refused.value.message


# -- streams that are resumed --------------------------------------------------------------------------------------------------


def parts(
    url: str, path: str, body: dict[str, Any], last_id: str | None = None, most: int = 10**6
) -> list[tuple[str | None, dict[str, Any]]]:
    """(id, document) of each event, of `most` at most."""
    headers = {} if last_id is None else {"Last-Event-ID": last_id}
    found: list[tuple[str | None, dict[str, Any]]] = []
    with httpx.stream("POST", f"{url}{path}", json=body, headers=headers, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        id, name = None, None
        for line in answer.iter_lines():
            key, _, value = line.partition(": ")
            if key == "id":
                id = value
            elif key == "event":
                name = value
            elif key == "data":
                document = json.loads(value)
                assert name == document["type"], "clients go by the event's name"
                found.append((id, document))
                id = None
            if len(found) == most:
                break
    return found


def said(documents: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """The text and the arguments that the events add up to, and the types of all others."""
    texts, kinds = list[str](), list[str]()
    for document in documents:
        delta = document.get("delta")
        if isinstance(delta, dict) and "stop_reason" not in delta:
            texts.append(delta["text"] if "text" in delta else delta["partial_json"])
        elif isinstance(delta, str):
            texts.append(delta)
        else:
            kinds.append(document["type"])
    return "".join(texts), kinds


CALLS: dict[str, Any] = {"max_tokens": 200, "tools": [WEATHER], "tool_choice": {"type": "tool", "name": "weather"}}


@pytest.mark.parametrize("ended", [False, True], ids=["while it runs", "after its end"])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/messages", {"model": "tinychat", "messages": HELLO, "max_tokens": 12, "ignore_eos": True}),
        ("/v1/messages", {"model": "tinychat", "messages": HELLO, **CALLS}),
        ("/v1/responses", {"model": "tinychat", "input": "hello", "max_output_tokens": 12, "ignore_eos": True}),
    ],
    ids=["messages", "tool calls", "responses"],
)
def test_a_stream_goes_on_at_another_gateway_after_the_last_event(
    mesh: LocalMesh, url: str, path: str, body: dict[str, Any], ended: bool
) -> None:
    request = {**body, "stream": True}
    with edge(mesh.url, model="tinychat") as other:
        begun = parts(url, path, request, most=10**6 if ended else 9)
        stop = max(place for place, (id, _) in enumerate(begun[:9]) if id is not None and not id.endswith("e"))  # a token's last event
        rest = parts(other, path, request, begun[stop][0])
        whole = begun if ended else parts(other, path, request, f"{str(begun[stop][0]).partition('.')[0]}.0")
    resumed = [document for _, document in (*begun[: stop + 1], *rest)]
    assert said(resumed) == said([document for _, document in whole]), "each part once, and in order"
    if path == "/v1/responses":
        assert [document["sequence_number"] for document in resumed] == list(range(len(resumed)))
