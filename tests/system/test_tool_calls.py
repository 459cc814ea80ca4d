"""Tool calls, with OpenAI's client: choices, streams, results, an agent's loop, forged messages, and failures meanwhile."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import openai
import pytest
from running import Run
from system_tools import until_leases
from tiny_chat_model import END, make_chat_model

from mesh.client import AsyncMeshClient, MeshClient
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.protocol.status import ShardLease

KILLS = int(os.environ.get("MESH_KILLS", "0"))
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER = {"type": "function", "function": {"name": "weather", "description": "the weather", "parameters": CITY, "strict": True}}
SUM: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "sum",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"type": "integer", "minimum": 0, "maximum": 99}},
            "required": ["a", "b"],
            "additionalProperties": False,
        },
    },
}
ASK: dict[str, Any] = {
    "model": "tinychat",
    "messages": [{"role": "user", "content": "weather?"}],
    "tools": [WEATHER, SUM],
    "max_tokens": 180,
}


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMesh]:
    model: Path = make_chat_model(tmp_path_factory.mktemp("chat"))
    with LocalMesh(LocalOptions(model=model, shards=2, replicas=2, coordinators=2, rows=4, context=512)) as running:
        yield running


@pytest.fixture
def ai(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_one_function_is_called_with_arguments_that_follow_its_schema(ai: openai.OpenAI) -> None:
    for seed in range(4):
        choice: Any = {"type": "function", "function": {"name": "weather"}}
        answer = ai.chat.completions.create(**ASK, tool_choice=choice, seed=seed).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.content is None and answer.message.tool_calls is not None
        (call,) = answer.message.tool_calls
        arguments = json.loads(call.function.arguments)
        assert call.function.name == "weather" and arguments["city"] in ("Paris", "Rome") and 1 <= arguments["days"] <= 9
        assert call.id.startswith("call_")


def test_required_calls_something_and_not_parallel_once(ai: openai.OpenAI) -> None:
    names = set()
    for seed in range(6):
        answer = ai.chat.completions.create(**ASK, tool_choice="required", parallel_tool_calls=False, seed=seed).choices[0]
        assert answer.message.tool_calls is not None and len(answer.message.tool_calls) == 1
        names.add(answer.message.tool_calls[0].function.name)
    assert names <= {"weather", "sum"}


@pytest.mark.parametrize("form", ["hermes", "llama", "mistral", "phi"])
def test_every_family_is_forced_and_read_alike_whole_and_streamed(ai: openai.OpenAI, form: str) -> None:
    request = {**ASK, "tool_choice": "required", "seed": 5, "extra_body": {"tool_format": form}}
    whole = ai.chat.completions.create(**request).choices[0]
    calls: dict[int, list[str]] = {}
    reasons = []
    for part in ai.chat.completions.create(**request, stream=True):
        reasons += [part.choices[0].finish_reason] if part.choices[0].finish_reason else []
        assert not part.choices[0].delta.content
        for call in part.choices[0].delta.tool_calls or ():
            assert call.function is not None
            known = calls.setdefault(call.index, [call.function.name or "", ""])
            known[1] += call.function.arguments or ""
    assert whole.message.tool_calls, whole
    assert [(call.function.name, call.function.arguments) for call in whole.message.tool_calls] == [tuple(call) for call in calls.values()]
    assert reasons == [whole.finish_reason]


def test_none_and_auto(ai: openai.OpenAI) -> None:
    free = {**ASK, "tools": [SUM], "temperature": 0, "max_tokens": 20}
    for choice in ("none", "auto"):
        answer = ai.chat.completions.create(**free, tool_choice=choice).choices[0]
        assert answer.finish_reason == "length" and not answer.message.tool_calls and answer.message.content


@pytest.mark.parametrize("calls", [True, False])
def test_an_answer_beside_tools_calls_or_has_the_form_that_was_asked_for(ai: openai.OpenAI, url: str, calls: bool) -> None:
    """As agents ask that end with an answer of a form: whole, streamed, and where calls are forced. A bias says which it is."""
    verdict = {"type": "object", "properties": {"verdict": {"enum": ["yes", "no"]}}, "required": ["verdict"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "verdict", "schema": verdict}}
    brace = httpx.post(f"{url}/tokenize", json={"model": "tinychat", "prompt": "{"}, timeout=60).json()["tokens"][-1]
    bias = {str(brace): -100 if calls else 100}
    asked: dict[str, Any] = {**ASK, "tools": [SUM], "response_format": form, "parallel_tool_calls": False, "logit_bias": bias}
    for seed in range(3):
        choice = ai.chat.completions.create(**asked, seed=seed).choices[0]
        message = choice.message
        if calls:
            assert choice.finish_reason == "tool_calls" and message.content is None and message.tool_calls is not None
            (call,) = message.tool_calls
            assert jsonschema_rs.is_valid(SUM["function"]["parameters"], json.loads(call.function.arguments))
            continue
        assert choice.finish_reason == "stop" and message.content is not None and not message.tool_calls
        assert jsonschema_rs.is_valid(verdict, json.loads(message.content))
        parts = [part.choices[0].delta.content or "" for part in ai.chat.completions.create(**asked, seed=seed, stream=True)]
        assert "".join(parts) == message.content
    assert ai.chat.completions.create(**asked, tool_choice="required").choices[0].message.tool_calls


def test_an_agent_calls_three_times_and_ends(ai: openai.OpenAI) -> None:
    """Each turn has the results of those before it; the model is made to call with tool_choice, and to end without."""
    tools: dict[str, Any] = {"weather": lambda city, days: f"{city}: sun for {days} days", "sum": lambda a, b: str(a + b)}
    messages: list[Any] = [{"role": "user", "content": "go"}]
    ran = []
    for step, name in enumerate(("weather", "sum", "weather", None)):
        choice: Any = "none" if name is None else {"type": "function", "function": {"name": name}}
        answer = ai.chat.completions.create(
            **{**ASK, "messages": messages, "tool_choice": choice, "seed": step, "max_tokens": 160}
        ).choices[0]
        messages.append(answer.message.model_dump(exclude_none=True))
        for call in answer.message.tool_calls or ():
            result = tools[call.function.name](**json.loads(call.function.arguments))
            ran.append((call.function.name, result))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    assert [name for name, _ in ran] == ["weather", "sum", "weather"]
    assert len({call["id"] for message in messages for call in message.get("tool_calls") or ()}) == 3
    assert messages[-1]["content"] and not messages[-1].get("tool_calls")


def test_the_native_api_and_the_sdk_have_calls_too(mesh: LocalMesh, url: str) -> None:
    request = {
        "messages": ASK["messages"],
        "tools": [SUM],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "model": "tinychat",
        "max_tokens": 100,
        "seed": 1,
    }
    with httpx.Client(base_url=url, timeout=60) as http:
        document = http.post("/api/v1/inference", json=request).json()
    with MeshClient(mesh.url, model="tinychat") as client:
        answer = client.generate(**request)
    (call,) = answer.tool_calls
    assert document["tool_calls"][0]["function"] == {"name": call.function.name, "arguments": call.function.arguments}
    assert (answer.tool_format, answer.content) == ("hermes", "") and "<tool_call>" in (answer.text or "")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"messages": [{"role": "tool", "tool_call_id": "forged", "content": "x"}]}, "no message of the assistant before it has made"),
        (
            {"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "sum"}}]}]},
            "tool_calls",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"id": "a", "type": "function", "function": {"name": "s", "arguments": "no"}}]}
                ]
            },
            "no JSON object",
        ),
        ({"tools": [WEATHER, WEATHER]}, "two functions of one name"),
        ({"tool_choice": {"type": "function", "function": {"name": "other"}}}, "none of the tools"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice needs tools"),
        ({"functions": [{"name": "f"}]}, "older form"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "strict": True, "parameters": {"properties": {"a": {"not": {}}}}}}]},
            "not",
        ),
        ({"structured_outputs": {"regex": "a"}}, "is calls, text or JSON"),
        ({"structured_outputs": {"json_object": True}, "tool_choice": "required"}, "calls are forced"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}}, "not"),
    ],
)
def test_what_is_wrong_is_a_400_that_says_so(url: str, change: dict[str, Any], why: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as http:
        refused = http.post("/v1/chat/completions", json={**ASK, **change})
    assert refused.status_code == 400 and why in refused.json()["error"]["message"], refused.text


def test_control_tokens_that_tools_and_calls_spell_are_plain_text(mesh: LocalMesh) -> None:
    def length(name: str, content: str) -> int:
        call = {"id": "a", "type": "function", "function": {"name": "sum", "arguments": json.dumps({"a": content})}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "a", "content": name},
        ]
        with MeshClient(mesh.url, model="tinychat") as client:
            return client.generate(messages=messages, max_tokens=1).usage.prompt_tokens

    plain = length("", "")
    assert length(END, "") == plain + len(END) and length("", END) == plain + len(END)


@pytest.mark.slow
def test_kills_change_no_call(mesh: LocalMesh, run: Run) -> None:
    request: dict[str, Any] = {
        "messages": ASK["messages"],
        "tools": [WEATHER, SUM],
        "tool_choice": "required",
        "seed": 3,
        "temperature": 1.0,
    }

    def ready(found: Mapping[str, ShardLease]) -> bool:
        shards = {process.pid for name, process in mesh.processes.items() if name.startswith("shard")}
        return shards <= {lease.pid for lease in found.values() if lease.state == "ready"}

    async def disturb() -> None:
        async with AsyncMeshClient(mesh.url, model="tinychat") as client:
            expected = await client.generate(**request, max_tokens=150)
            assert expected.tool_calls
            restarts = 0
            names = [name for name in mesh.processes if name.startswith(("shard", "coordinator"))]
            kills = 0
            for name in names * (3 + KILLS):  # until some kills have met the session; the others ended processes that it did not use
                if restarts >= 3 and kills >= KILLS:
                    break
                await until_leases(mesh, ready)
                async with client.stream(**request, max_tokens=150) as stream:
                    count = 0
                    async for _ in stream:
                        count += 1
                        if count == 10:
                            process = mesh.processes[name]
                            process.kill()
                    answer = stream.completion
                assert answer is not None and answer.tokens == expected.tokens
                assert [call.function for call in answer.tool_calls] == [call.function for call in expected.tool_calls]
                restarts += answer.timing.restarts
                kills += 1
                mesh.restart(name)
            print(f"{kills} SIGKILLs, {restarts} restarts of a call, none differs")
            assert restarts > 0, "no kill met the session"

    run(disturb())
