"""Embeddings through every interface, any number of shards and any failure: always the vectors of one process."""

from __future__ import annotations

import asyncio
import base64
import random
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import orjson
import pytest
from edge_tools import bearer, edge, token, verifier
from running import Run
from system_tools import all_rows_free, raw
from waiting import until

from mesh.client import AsyncMeshClient, MeshClient
from mesh.errors import BadRequest, PromptTooLong
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.model.tokenizer import Tokenizer
from mesh.protocol import topics
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams

EMBED = SamplingParams(embed=True)
TEXTS = ["hello", "Rain falls.", "x"]
LONG, VOCABULARY = 250, 95


class Reference:
    """The vectors of one process. `token`: of a text's tokens."""

    def __init__(self, model: Path, context: int = 256) -> None:
        self._pipeline = Pipeline.load(model, context=context)
        self._tokenizer = Tokenizer.load(model)

    def __call__(self, given: str | Sequence[int], dimensions: int | None = None) -> np.ndarray:
        tokens = self._tokenizer.encode(given) if isinstance(given, str) else given
        state = self._pipeline.start(0, tokens, EMBED, max_tokens=1).state
        assert state is not None
        return np.asarray(state[:dimensions] / np.linalg.norm(state[:dimensions]))


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture(scope="module")
def ai(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def same(ours: Any, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=0, atol=2e-5)


def test_vectors_are_those_of_one_process_for_any_number_of_shards(any_mesh: LocalMesh, reference: Reference) -> None:
    with MeshClient(any_mesh.url, model="tiny") as client:
        given: list[str | list[int]] = [*TEXTS, [5, 17, 33]]
        found = client.embed(given)
        assert found.usage.prompt_tokens == 5 + 11 + 1 + 3 and found.usage.completion_tokens == 0
        for vector, one in zip(found.vectors, given, strict=True):
            same(vector, reference(one))
            assert abs(np.linalg.norm(vector) - 1) < 1e-6
        same(client.embed("hello", dimensions=7).vectors[0], reference("hello", 7))
        raw_state = client.embed("hello", normalize=False).vectors[0]
        same(np.array(raw_state) / np.linalg.norm(raw_state), reference("hello"))
        assert client.generate(tokens=[5, 17, 33], max_tokens=2).usage.completion_tokens == 2


def test_openais_client_and_the_forms_of_its_input(ai: openai.OpenAI, reference: Reference) -> None:
    one = ai.embeddings.create(model="tiny", input="hello")  # the client asks for base64, and decodes it
    assert (one.object, one.model, one.data[0].index, one.data[0].object) == ("list", "tiny", 0, "embedding")
    same(one.data[0].embedding, reference("hello"))
    assert (one.usage.prompt_tokens, one.usage.total_tokens) == (5, 5)
    given: list[Any] = [TEXTS, [5, 17, 33], [[5, 17], [90]]]
    entries: list[Any] = [TEXTS, [[5, 17, 33]], [[5, 17], [90]]]
    for inputs, parts in zip(given, entries, strict=True):
        answer = ai.embeddings.create(model="tiny", input=inputs, encoding_format="float", user="me")
        assert [entry.index for entry in answer.data] == list(range(len(parts)))
        for entry, part in zip(answer.data, parts, strict=True):
            same(entry.embedding, reference(part))
    short = ai.embeddings.create(model="tiny", input="hello", dimensions=4)
    same(short.data[0].embedding, reference("hello", 4))
    many = ai.embeddings.create(model="tiny", input=[[index % VOCABULARY, index // VOCABULARY] for index in range(200)])
    assert len(many.data) == 200 and many.usage.prompt_tokens == 400
    same(many.data[123].embedding, reference([28, 1]))


def test_both_encodings_are_the_same_numbers(url: str) -> None:
    with httpx.Client(base_url=url, timeout=60) as http:
        forms = [http.post("/v1/embeddings", json={"input": "hello", "encoding_format": form}).json() for form in ("float", "base64")]
    floats, packed = (form["data"][0]["embedding"] for form in forms)
    data = base64.b64decode(packed)
    assert np.array_equal(np.array(floats, np.float32), np.array(struct.unpack(f"<{len(data) // 4}f", data), np.float32))


def test_what_cannot_be_is_refused_by_name(url: str) -> None:
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"input": []}, "input", ""),
        ({"input": ""}, "input", "empty"),
        ({"input": ["a", 3]}, "input", ""),
        ({"input": "a", "dimensions": 0}, "dimensions", "1 or more"),
        ({"input": "a", "dimensions": 33}, "dimensions", "a vector has 32"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "base64"),
        ({"input": "a", "pooling": "mean"}, "pooling", "last"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "never cut"),
        ({"input": "a", "temperature": 1}, "temperature", ""),
        ({"input": [[5], [96]]}, "input.1", "not in the vocabulary"),
        ({"input": ["a", "a" * 65]}, "input.1", "has 65 tokens, but rows here hold 64: shorten the prompt"),
        ({"input": ["a"] * 2049}, "input", ""),
    ]
    with httpx.Client(base_url=url, timeout=60) as http:
        for body, field, why in wrong:
            answer = http.post("/v1/embeddings", json=body)
            error = answer.json()["error"]
            assert answer.status_code == 400 and why in error["message"], (body, answer.text)
            assert field in (error["param"] or ""), (body, error)
        whole = http.post("/v1/embeddings", json={"input": "a" * 64})
        assert whole.status_code == 200, "a prompt may fill the context: no token follows"


def test_a_plain_nats_request_brings_one_document(mesh: LocalMesh, reference: Reference, run: Run) -> None:
    async def work() -> None:
        subject = topics.GENERATE.at("tiny").subject
        answer = orjson.loads((await raw(mesh.url, subject, {"prompt": "hello", "embed": {}})).data)
        assert (answer["done"], answer["tokens"], answer["text"], answer["finish_reason"]) == (True, [], None, "stop")
        same(answer["embedding"], reference("hello"))
        talk = {"messages": [{"role": "user", "content": "hello"}], "embed": {}}
        answer = orjson.loads((await raw(mesh.url, subject, talk)).data)
        same(answer["embedding"], reference("u:hello;a:"))
        for body, field in (
            ({"prompt": "a", "embed": {"pooling": "mean"}}, "embed.pooling"),
            ({"prompt": "a", "embed": {}, "stop": ["b"]}, "stop"),
            ({"prompt": "a", "embed": {}, "temperature": 0.5}, "temperature"),
        ):
            refused = orjson.loads((await raw(mesh.url, subject, body)).data)
            assert field in refused["message"], refused

    run(work())


def test_a_beginning_that_was_computed_is_reused(mesh: LocalMesh, reference: Reference) -> None:
    tokens = random.Random(3).choices(range(VOCABULARY), k=60)
    with MeshClient(mesh.url, model="tiny") as client:
        first = client.generate(tokens=tokens[:40], max_tokens=4, ignore_eos=True)
        assert first.usage.cached_tokens == 0
        second = client.embed([tokens])
        assert second.usage.cached_tokens == 32
        same(second.vectors[0], reference(tokens))
        third = client.embed([tokens])
        assert third.usage.cached_tokens == 48
        same(third.vectors[0], reference(tokens))


def test_its_trace_says_that_it_is_an_embedding(mesh: LocalMesh) -> None:
    with MeshClient(mesh.url, model="tiny") as client:
        done = client.generate(tokens=[5, 17, 33], embed={})
        found = client.trace(done.session)
    assert found is not None
    generation = next(span for span in found["spans"] if span["name"].startswith("embeddings "))
    assert generation["attributes"]["gen_ai.usage.output_tokens"] == 0


def test_tokens_and_vectors_are_computed_side_by_side(mesh: LocalMesh, reference: Reference, run: Run) -> None:
    prompts = [random.Random(seed).choices(range(VOCABULARY), k=3 + 3 * seed) for seed in range(12)]

    async def work() -> None:
        async with AsyncMeshClient(mesh.url, model="tiny") as client:
            alone = [await client.generate(tokens=prompt, max_tokens=20, ignore_eos=True) for prompt in prompts]
            texts = [client.generate(tokens=prompt, max_tokens=20, ignore_eos=True) for prompt in prompts]
            embedding = asyncio.create_task(client.embed(prompts, concurrency=12))
            answers = await asyncio.gather(*texts)
            found = await embedding
        assert [answer.tokens for answer in answers] == [answer.tokens for answer in alone]
        for vector, prompt in zip(found.vectors, prompts, strict=True):
            same(vector, reference(prompt))

    run(work())


def test_quotas_count_its_tokens_and_errors_cancel_the_rest(mesh: LocalMesh, run: Run) -> None:
    with edge(mesh.url, verifier=verifier()) as url, httpx.Client(base_url=url, timeout=60) as http:
        mine = bearer(token("generate", subject="mine", tokens_per_minute=40))
        assert http.post("/v1/embeddings", json={"input": "x"}).status_code == 401
        assert http.post("/v1/embeddings", json={"input": [[5] * 20, [6] * 10]}, headers=mine).status_code == 200
        used = http.get("/api/v1/usage", headers=mine).json()["subjects"][0]
        assert (used["requests"], used["prompt_tokens"], used["completion_tokens"]) == (2, 30, 0)
        refused = http.post("/v1/embeddings", json={"input": [5] * 30}, headers=mine)
        assert refused.status_code == 429 and "retry-after" in refused.headers
    with MeshClient(mesh.url, model="tiny") as client:
        with pytest.raises(BadRequest, match="not in the vocabulary"):
            client.embed([[5], [96], [6]])
        with pytest.raises(PromptTooLong):
            client.embed([[5] * 65])
        with pytest.raises(BadRequest, match="nothing to embed"):
            client.embed([])
    run(all_rows_free(mesh))


def test_sixteen_bits_between_shards_cost_precision_and_no_more(model: Path, reference: Reference) -> None:
    options = LocalOptions(model=model, shards=2, rows=4, context=64, compression=True, http=False)
    with LocalMesh(options) as mesh, MeshClient(mesh.url, model="tiny") as client:
        np.testing.assert_allclose(np.array(client.embed("hello").vectors[0]), reference("hello"), rtol=0, atol=2e-2)


@pytest.mark.slow
def test_kills_of_shards_and_coordinators_change_no_vector(model: Path, run: Run) -> None:
    reference = Reference(model)
    prompts = [random.Random(seed).choices(range(VOCABULARY), k=LONG) for seed in range(48)]
    expected = [reference(prompt) for prompt in prompts]
    options = LocalOptions(model=model, shards=2, replicas=2, coordinators=2, rows=4, context=256, http=False, prefix_reuse="off")

    async def work(mesh: LocalMesh) -> None:
        async with AsyncMeshClient(mesh.url, model="tiny") as client:
            for role in ("shard", "coordinator"):
                met = 0
                for number in range(6):
                    met += await kill_one(mesh, client, f"{role}-{1 + number % 2}")
                    if met:
                        break
                assert met, f"no kill of a {role} met a session"
        await all_rows_free(mesh)

    async def kill_one(mesh: LocalMesh, client: AsyncMeshClient, victim: str) -> int:
        """Kill a process once the first of many answers is there; how many sessions went on elsewhere."""
        before = client.sent_again
        asking = [asyncio.create_task(client.generate(tokens=prompt, embed={})) for prompt in prompts]
        await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        mesh.processes[victim].kill()
        for answer, vector in zip(await asyncio.gather(*asking), expected, strict=True):
            same(answer.embedding, vector)
        mesh.restart(victim)
        await until(lambda: all_there(mesh, client), because=f"{victim} is back")
        return sum(task.result().timing.restarts for task in asking) + client.sent_again - before

    with LocalMesh(options) as mesh:
        run(work(mesh))


async def all_there(mesh: LocalMesh, client: AsyncMeshClient) -> bool | None:
    status = await client.status()
    found = {shard.pid for shard in status.shards if shard.state == "ready"} | {each.stats.pid for each in status.coordinators}
    return {process.pid for process in mesh.processes.values()} <= found or None
