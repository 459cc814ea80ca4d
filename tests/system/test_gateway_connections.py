"""1,000 connections, of which 10 ask for something; one more; and coordinators and shards that die while HTTP streams."""

from __future__ import annotations

import asyncio
import json
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
from edge_tools import edge
from oracle import Oracle
from running import Run
from waiting import until

from mesh.local.mesh import LocalMesh, LocalOptions

LIMIT, STREAMS = 1000, 10
LONG = {"max_tokens": 50, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def pairs(model: Path) -> Iterator[LocalMesh]:
    """Two shards of each of two ranges, two coordinators."""
    with LocalMesh(LocalOptions(model=model, shards=2, replicas=2, coordinators=2, rows=8, context=64)) as running:
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


async def stream_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, tokens: list[int]) -> list[int]:
    """`stream` on a connection that is there already."""
    body = json.dumps({"tokens": tokens, **LONG}).encode()
    head = f"POST /api/v1/inference HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
    seen: list[int] = []
    while True:
        line = await reader.readline()
        if line.startswith(b"data: "):
            document = json.loads(line.removeprefix(b"data: "))
            if document["done"]:
                assert document["tokens"] == seen
                return seen
            seen.append(document["token"])


def test_a_thousand_connections_and_one_more(pairs: LocalMesh, oracle: Oracle, run: Run) -> None:
    url = pairs.http_urls[0]
    host, port = urlsplit(url).hostname, urlsplit(url).port

    async def fill() -> None:
        opened = await asyncio.gather(*(asyncio.open_connection(host, port) for _ in range(LIMIT)))
        try:
            reader, writer = await asyncio.open_connection(host, port)
            opened.append((reader, writer))
            told = await reader.read()
            assert told.startswith(b"HTTP/1.1 503 ") and b"retry-after: 1\r\n" in told and b"too_many_connections" in told
            prompts = [[number, 7, 2 * number, 11] for number in range(STREAMS)]
            streams = [stream_on(*connection, prompt) for connection, prompt in zip(opened[::100], prompts, strict=False)]
            for prompt, seen in zip(prompts, await asyncio.gather(*streams), strict=True):
                assert seen == oracle.greedy(prompt, 50)
            assert sum(not silent.at_eof() for silent, _ in opened[:LIMIT]) == LIMIT
        finally:
            for _, closing in opened:
                closing.close()
            await asyncio.gather(*(closing.wait_closed() for _, closing in opened), return_exceptions=True)

    with many_files(2 * LIMIT + 200):
        run(fill())


@pytest.fixture(scope="module")
def url(pairs: LocalMesh) -> Iterator[str]:
    """A gateway that outlives the coordinators."""
    with edge(pairs.url) as running:
        yield running


async def streams_through_a_death(
    http: httpx.AsyncClient, process: subprocess.Popen[bytes], prompts: list[list[int]], oracle: Oracle
) -> None:
    """Kill the process once every stream has begun; each stream still brings every token once."""
    begun = [asyncio.Event() for _ in prompts]
    tasks = [asyncio.create_task(stream(http, prompt, event)) for prompt, event in zip(prompts, begun, strict=True)]
    for event in begun:
        await event.wait()
    process.send_signal(signal.SIGKILL)
    for prompt, seen in zip(prompts, await asyncio.gather(*tasks), strict=True):
        assert seen == oracle.greedy(prompt, 50)


def test_a_coordinator_that_dies_costs_an_http_stream_a_pause_and_no_token(pairs: LocalMesh, url: str, oracle: Oracle, run: Run) -> None:
    async def kill() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            prompts = [[number, 4, 5 * number, 2] for number in range(8)]
            await streams_through_a_death(http, pairs.processes["coordinator-2"], prompts, oracle)

    run(kill())


def test_a_shard_that_dies_costs_an_http_stream_a_pause_and_no_token(pairs: LocalMesh, url: str, oracle: Oracle, run: Run) -> None:
    async def kill() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            prompts = [[number, 9, 3 * number, 1] for number in range(6)]
            await streams_through_a_death(http, pairs.processes["shard-1"], prompts, oracle)
            assert (await http.get("/api/v1/health")).status_code == 200

    run(kill())


def test_health_tells_the_truth_when_a_range_is_gone(pairs: LocalMesh, url: str, run: Run) -> None:
    """Its last shard is killed: not ready, and says what lacks; the process lives on."""

    async def kill() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=120) as http:
            for name in ("shard-3", "shard-4"):
                pairs.processes[name].send_signal(signal.SIGKILL)

            async def said() -> bool:
                answer = await http.get("/api/v1/health")  # first a probe that is not answered, or leases that still stand
                assert answer.status_code in (200, 503)
                return answer.status_code == 503 and "layers from 2 on have no shard that is ready" in answer.json()["reason"]

            await until(said, because="a gateway says how the mesh is when it is asked")
            assert (await http.get("/api/v1/health/live")).status_code == 200

    run(kill())
