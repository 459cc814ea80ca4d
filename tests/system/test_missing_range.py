"""A layer range without a shard: how long a request waits, whichever way it came, and what its client hears meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest
from edge_tools import edge
from running import Run
from system_tools import until_leases

from mesh.bus import Bus, Received
from mesh.client import AsyncMeshClient, Waiting
from mesh.errors import Unavailable
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.protocol import topics

PATIENCE_S = 3.0
REQUEST: dict[str, Any] = {"tokens": [5, 17], "max_tokens": 20, "ignore_eos": True}
NO_SHARD = "layers 2-3 have no shard that is ready, for 3 s now: start one with `mesh join`"


def options(model: Path, **values: Any) -> LocalOptions:
    return LocalOptions(model=model, shards=2, rows=4, context=64, failover_timeout_s=PATIENCE_S, **values)


@pytest.fixture(scope="module")
def gap(model: Path) -> Iterator[LocalMesh]:
    """The second of two ranges has lost its only shard."""
    with LocalMesh(options(model)) as mesh:
        mesh.processes["shard-2"].kill()
        asyncio.run(until_leases(mesh, lambda leases: "shard-2" not in leases))
        yield mesh


@asynccontextmanager
async def raw(mesh: LocalMesh, request: dict[str, Any]) -> AsyncIterator[asyncio.Queue[Received]]:
    async with await Bus.connect(mesh.bus, name="raw") as bus:
        answers: asyncio.Queue[Received] = asyncio.Queue()
        inbox = bus.new_inbox()
        await bus.subscribe(inbox, answers.put)
        await bus.publish(topics.GENERATE.at("tiny").subject, orjson.dumps(request), reply=inbox)
        yield answers


async def by_nats(mesh: LocalMesh) -> str:
    async with raw(mesh, REQUEST) as answers:
        return (await answers.get()).headers["Nats-Service-Error"]


async def by_client(mesh: LocalMesh) -> str:
    async with AsyncMeshClient(mesh.url, model="tiny") as client:
        with pytest.raises(Unavailable) as raised:
            await client.generate(**REQUEST)
        return str(raised.value)


async def by_http(mesh: LocalMesh) -> str:
    def ask() -> httpx.Response:
        with edge(mesh.url) as url:
            return httpx.post(f"{url}/api/v1/inference", json=REQUEST, timeout=60)

    answer = await asyncio.to_thread(ask)
    assert answer.status_code == 503 and answer.json()["error"]["retryable"]
    return str(answer.json()["error"]["message"])


async def by_openai(mesh: LocalMesh) -> str:
    """With the retries that OpenAI's client makes where nothing tells it not to."""

    def ask() -> str:
        with edge(mesh.url) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
            with pytest.raises(openai.InternalServerError) as raised:
                client.completions.create(model="tiny", prompt="a", max_tokens=5)
            return str(raised.value)

    return await asyncio.to_thread(ask)


@pytest.mark.parametrize("ask", [by_nats, by_client, by_http, by_openai])
def test_the_error_comes_after_failover_timeout_whichever_way_the_request_came(
    gap: LocalMesh, run: Run, ask: Callable[[LocalMesh], Awaitable[str]]
) -> None:
    async def timed() -> None:
        began = time.monotonic()
        message = await ask(gap)
        assert NO_SHARD in message
        assert PATIENCE_S <= time.monotonic() - began <= 1.3 * PATIENCE_S

    run(timed())


@pytest.mark.parametrize("plain", [True, False], ids=["nats", "client"])
def test_another_coordinator_goes_on_with_the_wait_and_does_not_begin_it_again(model: Path, run: Run, plain: bool) -> None:
    async def owner(mesh: LocalMesh) -> int:
        async with AsyncMeshClient(mesh.url, model="tiny") as looking:
            while True:
                for coordinator in await looking.coordinators():
                    if coordinator.stats.queued:
                        return coordinator.stats.pid

    async def disturb(mesh: LocalMesh) -> None:
        mesh.processes["shard-2"].kill()
        await until_leases(mesh, lambda leases: "shard-2" not in leases)
        began = time.monotonic()
        asked = asyncio.create_task((by_nats if plain else by_client)(mesh))
        pid = await owner(mesh)
        await asyncio.sleep(PATIENCE_S / 2 - (time.monotonic() - began))  # half of the wait is over
        os.kill(pid, signal.SIGKILL)
        assert NO_SHARD in await asked
        assert PATIENCE_S <= time.monotonic() - began <= 1.3 * PATIENCE_S + 1  # one more second for what the record does not have

    with LocalMesh(options(model, coordinators=2)) as mesh:
        run(disturb(mesh))


def test_the_client_hears_at_once_which_layers_are_missing_and_for_how_long(gap: LocalMesh, run: Run) -> None:
    async def listen() -> None:
        heard: list[tuple[float, Waiting]] = []
        began = time.monotonic()
        async with AsyncMeshClient(gap.url, model="tiny") as client:
            stream = client.stream(**REQUEST, on_waiting=lambda waiting: heard.append((time.monotonic() - began, waiting)))
            with pytest.raises(Unavailable):
                await anext(stream)
        assert heard[0][0] < 1.0
        assert {(waiting.missing, waiting.patience_s) for _, waiting in heard} == {(("2-3",), PATIENCE_S)}
        waited = [round(waiting.waited_s) for _, waiting in heard]
        assert waited[:3] == [0, 1, 2] and len(waited) <= 4, "the last word may come just before the error"
        async with raw(gap, {**REQUEST, "stream": True}) as answers:
            first, second = [orjson.loads((await answers.get()).data) for _ in range(2)]
            assert "cancel" in first and second["missing"] == ["2-3"] and second["waited_s"] < 1 and not second["done"]

    run(listen())


def test_the_command_says_it_on_standard_error(gap: LocalMesh) -> None:
    command = [sys.executable, "-m", "mesh.cli", "generate", "--nats", gap.url, "--tokens", "5,17", "--max-tokens", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and not done.stdout
    assert "mesh: no shard serves layers 2-3: waiting, 0 of 3 s" in done.stderr
    assert NO_SHARD in done.stderr


def test_a_range_that_comes_back_in_time_gives_the_answer(model: Path, run: Run) -> None:
    """The wait is long enough for a start on a busy machine."""

    async def come_back() -> None:
        waiting = asyncio.Event()
        mesh.processes["shard-2"].kill()
        async with AsyncMeshClient(mesh.url, model="tiny") as client:
            stream = client.stream(**REQUEST, on_waiting=lambda document: waiting.set())
            first = asyncio.create_task(anext(stream))
            await waiting.wait()
            mesh.restart("shard-2")
            tokens = [(await first).token, *[chunk.token async for chunk in stream]]
            assert len([token for token in tokens if token is not None]) == 20

    with LocalMesh(LocalOptions(model=model, shards=2, rows=4, context=64, failover_timeout_s=60, http=False)) as mesh:
        run(come_back())
