"""Answers of a form, through every interface; shards and coordinators that are killed meanwhile change no token of them.

`make test-structured` kills 200 times; the usual run a few times.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema_rs
import openai
import pytest
from pydantic import BaseModel, Field
from running import Run
from system_tools import until_leases
from tiny_chat_model import make_chat_model

from mesh.bus import Bus
from mesh.client import AsyncMeshClient, MeshClient
from mesh.errors import BadRequest
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.model.grammar import grammar_of
from mesh.model.manifest import Manifest
from mesh.protocol import topics
from mesh.protocol.status import ShardLease
from mesh.protocol.structured import StructuredOutputs
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams

KILLS = int(os.environ.get("MESH_KILLS", "6"))
CONTEXT, TOKENS = 256, 200
PROMPT = [5, 17, 33]
RECORDS: dict[str, Any] = {
    "type": "array",
    "minItems": 4,
    "maxItems": 4,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,6}$"},
            "kind": {"enum": ["a", "bc"]},
            "age": {"type": "integer", "minimum": 0, "maximum": 99},
        },
        "required": ["name", "kind", "age"],
        "additionalProperties": False,
    },
}
FORMS: list[dict[str, Any]] = [{"json": RECORDS}, {"regex": "([a-f]{3}-[0-9]{2};){25}"}]
SAMPLING: list[dict[str, Any]] = [{}, {"temperature": 1.0, "seed": 7, "presence_penalty": 0.5}]
NO_SPACES = {"0": -100.0}
"""Token 0 is the space. The model has random weights: where JSON may have spaces, it writes as many as it may."""
CASES = [(form, sampling | ({"logit_bias": NO_SPACES} if "json" in form else {})) for form in FORMS for sampling in SAMPLING]
"""The greedy answer of a regular expression takes the likeliest allowed tokens; the sampler draws the others."""


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_model(tmp_path_factory.mktemp("chat"))


@pytest.fixture(scope="module")
def expected(chat_model: Path) -> list[list[int]]:
    """The tokens of each of CASES, by one process."""
    pipeline = Pipeline.load(chat_model, context=CONTEXT)
    ends = pipeline.manifest.tokenizer.eos_ids if pipeline.manifest.tokenizer is not None else ()
    answers = []
    for form, sampling in CASES:
        params = SamplingParams(**sampling, grammar=grammar_of(StructuredOutputs.model_validate_json(json.dumps(form))))
        answers.append(pipeline.complete(PROMPT, params, max_tokens=TOKENS, stop_ids=ends))
    assert all(answer.finish_reason == "stop" and len(answer.ids) > 80 for answer in answers)
    return [answer.ids for answer in answers]


@pytest.fixture(scope="module")
def mesh(chat_model: Path) -> Iterator[LocalMesh]:
    """Two ranges, two shards of each, two coordinators."""
    with LocalMesh(LocalOptions(model=chat_model, shards=2, replicas=2, coordinators=2, rows=4, context=CONTEXT)) as running:
        yield running


@pytest.fixture(scope="module")
def client(mesh: LocalMesh) -> Iterator[MeshClient]:
    with MeshClient(mesh.url) as made:
        yield made


def test_tokens_that_came_with_a_request_and_do_not_have_its_form_are_an_error(mesh: LocalMesh, chat_model: Path, run: Run) -> None:
    subject = topics.GENERATE.at(Manifest.load(chat_model).name).subject

    async def answer(bus: Bus, given: list[int]) -> dict[str, Any]:
        asked = {"tokens": PROMPT, "max_tokens": 8, "structured_outputs": {"regex": "[a-f]{8}"}, "given": given}
        reply: dict[str, Any] = json.loads((await bus.ask(subject, json.dumps(asked).encode(), timeout_s=60)).data)
        return reply

    async def work() -> None:
        async with await Bus.connect(mesh.bus, name="test") as bus:
            begun = (await answer(bus, []))["tokens"]
            assert (await answer(bus, begun[:3]))["tokens"] == begun
            with pytest.raises(BadRequest, match="no token continues the answer"):
                await answer(bus, [0, 0, 0])

    run(work())


# -- interfaces --------------------------------------------------------------------------------------------------------


class Pet(BaseModel):
    name: str = Field(max_length=5)
    kind: Literal["cat", "dog"]
    legs: int = Field(ge=0, le=4)


def test_a_pydantic_model_in_an_instance_out(client: MeshClient) -> None:
    pets = [client.parse(Pet, "a pet", temperature=1.0, seed=seed, max_tokens=100, logit_bias=NO_SPACES) for seed in range(4)]
    assert all(isinstance(pet, Pet) for pet in pets) and len({pet.name for pet in pets}) > 1
    with pytest.raises(BadRequest, match="ended the answer after 3 tokens"):
        client.parse(Pet, "a pet", max_tokens=3)


def test_openais_client_parses_its_own_models(url: str) -> None:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as ai:
        answer = ai.chat.completions.parse(
            model="tinychat",
            messages=[{"role": "user", "content": "a pet"}],
            response_format=Pet,
            max_tokens=100,
            n=2,
            seed=3,
            logit_bias={"0": -100},
        )
        assert all(isinstance(choice.message.parsed, Pet) and choice.finish_reason == "stop" for choice in answer.choices)
        whole = ai.chat.completions.create(
            model="tinychat",
            messages=[{"role": "user", "content": "x"}],
            response_format={"type": "json_schema", "json_schema": {"name": "r", "schema": RECORDS, "strict": True}},
            max_tokens=TOKENS,
            temperature=0,
            logit_bias={"0": -100},
        )
        assert jsonschema_rs.is_valid(RECORDS, json.loads(whole.choices[0].message.content or ""))
        chosen = ai.completions.create(
            model="tinychat", prompt="x", logprobs=2, extra_body={"structured_outputs": {"choice": ["yes", "no"]}}, temperature=1
        )
        assert chosen.choices[0].text in ("yes", "no") and chosen.choices[0].logprobs is not None
        parts = ai.chat.completions.create(
            model="tinychat",
            messages=[{"role": "user", "content": "x"}],
            stream=True,
            seed=1,
            extra_body={"structured_outputs": {"regex": "[a-z]{12}"}},
        )
        text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
        assert len(text) == 12 and text.isalpha() and text.islower()


def test_the_native_api_and_what_it_refuses(url: str) -> None:
    ask = {"model": "tinychat", "prompt": "x", "max_tokens": 60, "temperature": 1.0}
    with httpx.Client(base_url=url, timeout=60) as http:
        form: dict[str, Any] = {"grammar": 'root ::= "<" [0-9] [0-9] ">"'}
        answer = http.post("/api/v1/inference", json={**ask, "structured_outputs": form, "seed": 2})
        assert answer.status_code == 200, answer.text
        assert len(answer.json()["text"]) == 4 and answer.json()["text"].strip("<>").isdigit()
        for form, why in (
            ({"json": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
            ({"json": {"enum": ["x" * 20 + str(number) for number in range(5_000)]}}, "bytes: at most"),
            ({"json": {"$ref": "#"}}, "no end"),
            ({"regex": "a", "choice": ["a"]}, "exactly one of"),
        ):
            refused = http.post("/api/v1/inference", json={**ask, "structured_outputs": form})
            assert refused.status_code == 400 and why in refused.json()["error"]["message"], refused.text
            assert refused.json()["error"]["field"].startswith("structured_outputs")
        both = http.post("/api/v1/inference", json={**ask, "ignore_eos": True, "structured_outputs": {"regex": "a"}})
        assert (both.status_code, both.json()["error"]["field"]) == (400, "ignore_eos")


def test_a_bias_forbids_and_demands_tokens(client: MeshClient) -> None:
    forced = client.generate(tokens=PROMPT, max_tokens=6, ignore_eos=True, logit_bias={"40": 100})
    assert forced.tokens == (40,) * 6
    plain = client.generate(tokens=PROMPT, max_tokens=6, ignore_eos=True)
    without = client.generate(tokens=PROMPT, max_tokens=6, ignore_eos=True, logit_bias={str(plain.tokens[0]): -100}, logprobs=1)
    assert plain.tokens[0] not in without.tokens
    assert without.logprobs is not None and without.logprobs[0].top[0][0] == plain.tokens[0], "of the model's own distribution"
    with pytest.raises(BadRequest, match="not in the vocabulary") as refused:
        client.generate(tokens=PROMPT, max_tokens=1, logit_bias={"96": 1.0})
    assert refused.value.field == "logit_bias.96"


def test_rows_with_and_without_a_form_in_one_batch_have_the_tokens_that_each_has_alone(mesh: LocalMesh, run: Run) -> None:
    asked: list[dict[str, Any]] = [
        {"tokens": [number, 9], "max_tokens": 40, "temperature": temperature, "seed": number, "structured_outputs": form}
        for temperature in (0.8, 0.0)  # greedy rows alone have no sampler, unlike beside the others
        for number, form in enumerate([None, {"regex": "[a-z]{30}"}, None, {"choice": ["abcdefghij" * 3]}, {"json": RECORDS}, None])
    ]

    async def both() -> None:
        async with AsyncMeshClient(mesh.url, model="tinychat") as client:
            together = await asyncio.gather(*(client.generate(**each) for each in asked))
            for each, answer in zip(asked, together, strict=True):
                assert (await client.generate(**each)).tokens == answer.tokens

    run(both())


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kills_of_shards_and_coordinators_change_no_token(mesh: LocalMesh, expected: list[list[int]]) -> None:
    picks = random.Random(0)
    names = [name for name in mesh.processes if name.startswith(("shard", "coordinator"))]

    def ready(found: Mapping[str, ShardLease]) -> bool:
        shards = {process.pid for name, process in mesh.processes.items() if name.startswith("shard")}
        return shards <= {lease.pid for lease in found.values() if lease.state == "ready"}

    async def one(client: AsyncMeshClient, kill: int) -> int:
        form, sampling = CASES[kill % len(CASES)]
        at, name, restarts = picks.randrange(5, 60), names[kill % len(names)], 0
        request = {"tokens": PROMPT, "max_tokens": TOKENS, "structured_outputs": form, **sampling}
        async with client.stream(**request) as stream:
            seen: list[int] = []
            async for chunk in stream:
                if chunk.token is not None:
                    seen.append(chunk.token.id)
                    if len(seen) == at:
                        process = mesh.processes[name]
                        process.kill()
            assert stream.completion is not None
            restarts = stream.completion.timing.restarts
            assert seen == expected[kill % len(CASES)] == list(stream.completion.tokens), f"kill {kill} of {name} at token {at}"
        return restarts

    async def disturb() -> None:
        restarts = 0
        async with AsyncMeshClient(mesh.url, model="tinychat") as client:
            for kill in range(KILLS + 3 * len(names)):  # more than asked for only until one has met a session
                if kill >= KILLS and restarts:
                    break
                await until_leases(mesh, ready)
                restarts += await one(client, kill)
                mesh.restart(names[kill % len(names)])
        assert restarts > 0, "no kill met a session"
        print(f"{KILLS} kills, {restarts} restarts of sessions, 0 tokens that differ")

    asyncio.run(asyncio.wait_for(disturb(), 600 + 60 * KILLS))
