"""1,000 connections, of which 10 ask for something; one more; and a shard that dies while HTTP streams."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from mesh.local import LocalMesh, LocalOptions

LIMIT, STREAMS = 1000, 10
LONG = {"max_tokens": 50, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def pairs(model: Path) -> Iterator[LocalMesh]:
    """Two shards of each of two ranges."""
    with LocalMesh(LocalOptions(model=model, shards=2, replicas=2, rows=8, context=64)) as running:
        yield running


@contextmanager
def many_files(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < count:
        pytest.skip(f"this user may have {hard} open files, and the test needs {count}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def stream(http: httpx.AsyncClient, tokens: list[int], begun: asyncio.Event | None = None) -> list[int]:
    """What came as events, one each."""
    seen: list[int] = []
    async with http.stream("POST", "/api/v1/inference", json={"tokens": tokens, **LONG}) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            document = json.loads(line.removeprefix("data: "))
            if document["done"]:
                assert "error" not in document and document["tokens"] == seen
                return seen
            seen.append(document["token"])
            if len(seen) == 5 and begun is not None:
                begun.set()
    raise AssertionError("the stream ended without its end")


def test_a_thousand_connections_and_one_more(pairs, oracle, run):
    url = pairs.http_urls[0]
    host, port = urlsplit(url).hostname, urlsplit(url).port

    async def fill() -> None:
        idle = await asyncio.gather(*(asyncio.open_connection(host, port) for _ in range(LIMIT - STREAMS)))
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            prompts = [[number, 7, 2 * number, 11] for number in range(STREAMS)]
            begun = [asyncio.Event() for _ in prompts]  # each on a connection of its own, which is kept
            tasks = [asyncio.create_task(stream(http, prompt, event)) for prompt, event in zip(prompts, begun, strict=True)]
            for event in begun:
                await event.wait()
            reader, writer = await asyncio.open_connection(host, port)
            told = await reader.read()
            assert told.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in told and b"too_many_connections" in told
            writer.close()
            for prompt, seen in zip(prompts, await asyncio.gather(*tasks), strict=True):
                assert seen == oracle.greedy(prompt, 50)
            assert all(not silent.at_eof() for silent, _ in idle)
            for _, closing in idle:
                closing.close()
            await asyncio.gather(*(closing.wait_closed() for _, closing in idle), return_exceptions=True)

    with many_files(2 * LIMIT + 200):
        run(fill())


def test_a_shard_that_dies_costs_an_http_stream_a_pause_and_no_token(pairs, oracle, run):
    async def kill() -> None:
        async with httpx.AsyncClient(base_url=pairs.http_urls[0], timeout=120) as http:
            prompts = [[number, 9, 3 * number, 1] for number in range(6)]
            begun = [asyncio.Event() for _ in prompts]
            tasks = [asyncio.create_task(stream(http, prompt, event)) for prompt, event in zip(prompts, begun, strict=True)]
            for event in begun:
                await event.wait()
            pairs.processes["shard-1"].send_signal(signal.SIGKILL)
            for prompt, seen in zip(prompts, await asyncio.gather(*tasks), strict=True):
                assert seen == oracle.greedy(prompt, 50)
            assert (await http.get("/api/v1/health")).status_code == 200

    run(kill())


def test_health_tells_the_truth_when_a_range_is_gone(pairs, run):
    """Its last shard is killed: not ready, and says what lacks; the process lives on."""

    async def kill() -> None:
        async with httpx.AsyncClient(base_url=pairs.http_urls[0], timeout=120) as http:
            for name in ("shard-3", "shard-4"):
                pairs.processes[name].send_signal(signal.SIGKILL)
            while (answer := await http.get("/api/v1/health")).status_code == 200:
                await asyncio.sleep(0.1)
            assert answer.status_code == 503
            while "layers from 2 on have no shard that is ready" not in answer.json()["reason"]:
                answer = await http.get("/api/v1/health")  # until then a probe that is not answered, or leases that still stand
            assert (await http.get("/api/v1/health/live")).status_code == 200

    run(kill())
