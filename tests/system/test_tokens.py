"""What a mesh of any number of shards generates is what one process generates."""

from __future__ import annotations

import asyncio
from random import Random
from typing import Any

from oracle import Oracle
from running import Run

from mesh.client import AsyncMeshClient, Completion, GenerateArguments, MeshClient
from mesh.errors import MeshError
from mesh.local.mesh import LocalMesh


def _requests(count: int, seed: int) -> list[dict[str, Any]]:
    """Prompts of 1 to 40 tokens, 1 to 20 more wanted."""
    random = Random(seed)
    return [
        {"tokens": [random.randrange(96) for _ in range(random.randint(1, 40))], "max_tokens": random.randint(1, 20)} for _ in range(count)
    ]


def test_greedy_tokens_alone_equal_one_process(any_mesh: LocalMesh, oracle: Oracle) -> None:
    with MeshClient(any_mesh.url) as client:
        for request in _requests(4, seed=1):
            answer = client.generate(**request)
            assert list(answer.tokens) == oracle.greedy(request["tokens"], request["max_tokens"])
            assert answer.finish_reason == "length"
            assert answer.usage.prompt_tokens == len(request["tokens"])
            assert answer.usage.completion_tokens == request["max_tokens"]
            assert answer.timing.restarts == 0


def test_sixteen_sessions_of_different_lengths_joining_and_leaving_equal_one_process(any_mesh: LocalMesh, oracle: Oracle, run: Run) -> None:
    async def generate() -> list[Completion | MeshError]:
        async with AsyncMeshClient(any_mesh.url, model="tiny") as client:
            return await client.batch(requests, concurrency=16)

    requests = _requests(40, seed=2)
    for request, answer in zip(requests, run(generate()), strict=True):
        assert isinstance(answer, Completion), answer
        assert list(answer.tokens) == oracle.greedy(request["tokens"], request["max_tokens"])


def test_sampled_tokens_follow_the_seed_alone(any_mesh: LocalMesh, oracle: Oracle, run: Run) -> None:
    params: GenerateArguments = {"temperature": 0.9, "top_p": 0.9, "seed": 7, "repetition_penalty": 1.1}

    async def generate() -> list[Completion | MeshError]:
        async with AsyncMeshClient(any_mesh.url, model="tiny") as client:
            return await client.batch(requests, concurrency=8, **params)

    requests = _requests(8, seed=3)
    for request, answer in zip(requests, run(generate()), strict=True):
        assert isinstance(answer, Completion), answer
        assert list(answer.tokens) == oracle.sampled(request["tokens"], request["max_tokens"], **dict[str, Any](params))


def test_a_stream_brings_each_token_once_and_in_order(any_mesh: LocalMesh, oracle: Oracle, run: Run) -> None:
    request = _requests(1, seed=4)[0] | {"max_tokens": 20}

    async def stream() -> None:
        async with AsyncMeshClient(any_mesh.url, model="tiny") as client:
            streams = [client.stream(**request) for _ in range(6)]

            async def read(stream: Any) -> list[Any]:
                async with stream:
                    return [chunk async for chunk in stream]

            for chunks, one in zip(await asyncio.gather(*map(read, streams)), streams, strict=True):
                tokens = [chunk.token.id for chunk in chunks if chunk.token is not None]
                assert one.completion is not None
                assert tokens == oracle.greedy(request["tokens"], 20) == list(one.completion.tokens)
                assert "".join(chunk.text for chunk in chunks) == one.completion.text

    run(stream())
