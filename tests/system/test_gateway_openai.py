"""OpenAI's own Python client against a mesh."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from edge_tools import bearer, edge, token, verifier

from mesh.client import MeshClient
from mesh.local.mesh import LocalMesh

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "rain"}], "temperature": 0, "max_tokens": 8}


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def expected(mesh: LocalMesh) -> str:
    with MeshClient(mesh.url) as native:
        text = native.chat(CHAT["messages"], max_tokens=8).text
    assert text is not None
    return text


def test_a_chat_completion(client: openai.OpenAI, expected: str) -> None:
    answer = client.chat.completions.create(**CHAT)
    choice = answer.choices[0]
    assert (choice.message.content, choice.message.role, choice.finish_reason) == (expected, "assistant", "length")
    assert answer.usage is not None and (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (9, 8)
    assert answer.object == "chat.completion" and answer.model == "tiny" and answer.id.startswith("chatcmpl-")


def test_a_chat_completion_streamed(client: openai.OpenAI, expected: str) -> None:
    parts = list(client.chat.completions.create(**CHAT, stream=True))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts) == expected
    assert [part.choices[0].finish_reason for part in parts if part.choices[0].finish_reason] == ["length"]
    assert len(parts) == 8 + 2 and all(part.usage is None for part in parts)  # the role, a token each, the end


def test_usage_comes_last_where_it_is_asked_for(client: openai.OpenAI) -> None:
    *parts, last = list(client.chat.completions.create(**CHAT, stream=True, stream_options={"include_usage": True}))
    assert last.choices == [] and last.usage is not None and last.usage.total_tokens == 17
    assert all(part.usage is None for part in parts)


def test_the_asynchronous_client(url: str, expected: str) -> None:
    async def ask() -> None:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            whole, stream = await asyncio.gather(
                client.chat.completions.create(**CHAT), client.chat.completions.create(**CHAT, stream=True)
            )
            assert whole.choices[0].message.content == expected
            assert "".join([part.choices[0].delta.content or "" async for part in stream]) == expected
            assert [model.id async for model in client.models.list()] == ["tiny"]

    asyncio.run(ask())


def test_parts_of_messages_and_developers(client: openai.OpenAI, expected: str) -> None:
    parts = [{"type": "text", "text": "ra"}, {"type": "text", "text": "in"}]
    assert (
        client.chat.completions.create(**{**CHAT, "messages": [{"role": "user", "content": parts}]}).choices[0].message.content == expected
    )
    developer = [{"role": "developer", "content": "be brief"}, *CHAT["messages"]]
    system = [{"role": "system", "content": "be brief"}, *CHAT["messages"]]
    answers = [client.chat.completions.create(**{**CHAT, "messages": messages}).choices[0] for messages in (developer, system)]
    assert answers[0] == answers[1]


def test_stop_texts(client: openai.OpenAI, expected: str) -> None:
    stop = expected[3:5]
    for given in (stop, ["never there", stop]):
        choice = client.chat.completions.create(**CHAT, stop=given).choices[0]
        assert (choice.message.content, choice.finish_reason) == (expected[: expected.index(stop)], "stop")
    streamed = client.chat.completions.create(**CHAT, stop=stop, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in streamed) == expected[: expected.index(stop)]


def test_several_choices_differ_and_are_the_same_again_for_the_same_seed(client: openai.OpenAI) -> None:
    request = {**CHAT, "temperature": 1.0, "n": 3, "seed": 7}
    texts = [choice.message.content for choice in client.chat.completions.create(**request).choices]
    assert len(set(texts)) == 3
    again = dict.fromkeys(range(3), "")
    ends = []
    for part in client.chat.completions.create(**request, stream=True):
        choice = part.choices[0]
        again[choice.index] += choice.delta.content or ""
        ends += [choice.index] * (choice.finish_reason is not None)
    assert [again[index] for index in range(3)] == texts and sorted(ends) == [0, 1, 2]
    other = client.chat.completions.create(**{**request, "seed": 70}).choices
    assert [choice.message.content for choice in other] != texts


def test_a_prompt_counts_once_for_all_its_choices(mesh: LocalMesh) -> None:
    """In usage, and in what the caller's subject has used."""
    with edge(mesh.url, verifier=verifier()) as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=token("generate", subject="three"), max_retries=0) as client:
            whole = client.chat.completions.create(**CHAT, n=3)
            *_, last = client.chat.completions.create(**CHAT, n=3, stream=True, stream_options={"include_usage": True})
            texts = client.completions.create(model="tiny", prompt=["rain", "snow!"], n=2, max_tokens=2)
        for usage in (whole.usage, last.usage):
            assert usage is not None and (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (9, 24, 33)
        assert texts.usage is not None and (texts.usage.prompt_tokens, texts.usage.completion_tokens) == (9, 8)
        used = httpx.get(f"{url}/api/v1/usage", headers=bearer(token("generate", subject="three"))).json()
    (mine,) = [each for each in used["subjects"] if each["subject"] == "three"]
    assert (mine["prompt_tokens"], mine["completion_tokens"]) == (27, 24 + 24 + 8)


def test_log_probabilities(client: openai.OpenAI, expected: str) -> None:
    whole = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3).choices[0].logprobs
    assert whole is not None and whole.content is not None
    assert "".join(entry.token for entry in whole.content) == expected
    for entry in whole.content:
        assert entry.logprob <= 0 and entry.bytes == list(entry.token.encode())
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token
    parts = [part.choices[0] for part in client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=3, stream=True)]
    streamed = [entry for choice in parts if choice.logprobs for entry in choice.logprobs.content or ()]
    assert [entry.token for entry in streamed] == [entry.token for entry in whole.content]


def test_text_completions(mesh: LocalMesh, client: openai.OpenAI) -> None:
    with MeshClient(mesh.url) as native:
        first, second = (native.generate(prompt, raw=True, max_tokens=6).text for prompt in ("rain", "snow"))
    request: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 6}
    answer = client.completions.create(**request, prompt="rain", logprobs=2)
    assert answer.choices[0].text == first and answer.object == "text_completion"
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and "".join(logprobs.tokens) == first and logprobs.text_offset == list(range(6))
    both = client.completions.create(**request, prompt=["rain", "snow"])
    assert [choice.text for choice in both.choices] == [first, second]
    ids = client.completions.create(**request, prompt=[[ord(c) - 32 for c in "rain"], [ord(c) - 32 for c in "snow"]])
    assert [choice.text for choice in ids.choices] == [first, second]
    streamed = client.completions.create(**request, prompt="rain", stream=True)
    assert "".join(part.choices[0].text for part in streamed) == first
    assert len(client.completions.create(model="tiny", prompt="rain", extra_body={"ignore_eos": True}).choices[0].text) >= 16


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_errors_are_openais_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(**{**CHAT, "model": "another"})
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(**{**CHAT, "temperature": 3})
    assert wrong.value.param == "temperature" and wrong.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(**{**CHAT, "max_tokens": 600})
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as tools:
        client.chat.completions.create(**CHAT, functions=[{"name": "f"}])
    assert tools.value.param == "functions"
    with pytest.raises(openai.BadRequestError) as unknown:
        client.chat.completions.create(**CHAT, extra_body={"colour": "red"})
    assert unknown.value.param == "colour"
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**CHAT, stream=True, n=100)


def test_a_token_is_the_api_key(mesh: LocalMesh) -> None:
    def ask(key: str, times: int = 1) -> None:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as client:
            for _ in range(times):
                assert client.chat.completions.create(**CHAT).choices

    with edge(mesh.url, verifier=verifier()) as url:
        ask(token("generate"), 2)
        with pytest.raises(openai.AuthenticationError) as wrong:
            ask("wrong")
        assert wrong.value.code == "invalid_api_key"
        with pytest.raises(openai.PermissionDeniedError):
            ask(token("batch"))
        with pytest.raises(openai.RateLimitError) as busy:
            ask(token("generate", requests_per_minute=1), 2)
        assert int(busy.value.response.headers["retry-after"]) >= 1
