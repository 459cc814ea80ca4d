"""A coordinator dies, is suspended or leaves while it generates. Another one continues, with the tokens of an undisturbed run."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from running import Run
from system_tools import all_rows_free
from waiting import until

from mesh.bus import Bus, BusOptions, Received
from mesh.client import AsyncMeshClient
from mesh.client.aio import COORDINATOR_SERVICE
from mesh.coordinator.records import sessions_bucket
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.protocol import subjects, topics

PROMPT = [5, 17, 33]
TOKENS = 240  # long enough that a generation is under way when it is known which coordinator has it
LONG: dict[str, Any] = {"tokens": PROMPT, "max_tokens": TOKENS, "ignore_eos": True}
CONTEXT = 256


@pytest.fixture
def twins(model: Path) -> Iterator[LocalMesh]:
    """Two shards, two coordinators."""
    with LocalMesh(LocalOptions(model=model, shards=2, coordinators=2, rows=4, context=CONTEXT)) as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> list[int]:
    from mesh.runtime.generate import Pipeline
    from mesh.runtime.sampling import SamplingParams

    return Pipeline.load(model, context=CONTEXT).complete(PROMPT, SamplingParams(temperature=0.0), max_tokens=TOKENS).ids


async def owner(mesh: LocalMesh) -> int:
    """The process that generates, known from the first answer: the other coordinators are not awaited."""
    async with await Bus.connect(BusOptions(urls=(mesh.url,)), name="asking") as bus, asyncio.timeout(60):
        answers: asyncio.Queue[Received] = asyncio.Queue()
        inbox = bus.new_inbox()
        await bus.subscribe(inbox, answers.put)
        while True:
            await bus.publish(f"$SRV.STATS.{COORDINATOR_SERVICE}", b"", reply=inbox)
            with contextlib.suppress(TimeoutError):
                while True:
                    answer = await asyncio.wait_for(answers.get(), 0.1)
                    data = next(e["data"] for e in orjson.loads(answer.data)["endpoints"] if e["name"] == "generate")
                    if data["live"] and data["records"].get("written"):  # before that another coordinator knows nothing of it
                        return int(data["pid"])


@asynccontextmanager
async def asked(mesh: LocalMesh, request: dict[str, Any]) -> AsyncIterator[asyncio.Queue[Received]]:
    """A plain NATS request, and what comes back."""
    async with await Bus.connect(BusOptions(urls=(mesh.url,)), name="raw") as bus:
        answers: asyncio.Queue[Received] = asyncio.Queue()
        inbox = bus.new_inbox()
        await bus.subscribe(inbox, answers.put)
        await bus.publish(topics.GENERATE.at("tiny").subject, orjson.dumps(request), reply=inbox)
        yield answers


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM], ids=lambda number: number.name)
def test_a_stream_of_the_client_goes_on_with_another_coordinator(twins: LocalMesh, undisturbed: list[int], run: Run, number: int) -> None:
    async def disturb() -> None:
        async with AsyncMeshClient(twins.url, model="tiny") as client, client.stream(**LONG) as stream:
            seen: list[int] = []
            text, pid = "", 0
            async for chunk in stream:
                text += chunk.text
                if chunk.token is not None:
                    assert chunk.index == len(seen)
                    seen.append(chunk.token.id)
                if len(seen) == 10 and not pid:
                    pid = await owner(twins)
                    os.kill(pid, number)
            assert stream.completion is not None
            assert seen == undisturbed == list(stream.completion.tokens)
            assert text == stream.completion.text
            assert stream.completion.timing.restarts >= 1
            if number == signal.SIGSTOP:
                os.kill(pid, signal.SIGCONT)
                answer = await client.generate(**LONG)
                assert list(answer.tokens) == undisturbed
        await all_rows_free(twins)

    run(disturb())


def test_a_plain_stream_goes_on_and_its_indexes_show_repeated_tokens(twins: LocalMesh, undisturbed: list[int], run: Run) -> None:
    async def disturb() -> None:
        async with asked(twins, LONG | {"stream": True}) as answers:
            documents: dict[int, dict[str, Any]] = {}
            killed, epochs, first = False, [], 0
            while True:
                received = await asyncio.wait_for(answers.get(), 60)
                assert "Nats-Service-Error" not in received.headers, received.headers
                document = orjson.loads(received.data)
                if document["done"]:
                    break
                if "cancel" in document:
                    epochs.append(document["epoch"])
                    first = document["next"]
                    assert first <= len(documents), "a token was left out"
                if "index" in document:
                    index = document["index"]
                    assert index == first, "documents of one coordinator are in order"
                    first += 1
                    assert documents.setdefault(index, document)["token"] == document["token"]
                    assert documents[index]["text"] == document["text"]
                if len(documents) == 10 and not killed:
                    kill(await owner(twins))
                    killed = True
            assert [documents[index]["token"] for index in range(TOKENS)] == undisturbed == document["tokens"]
            assert len(epochs) == 2 and epochs[0] < epochs[1]
        await all_rows_free(twins)

    run(disturb())


def test_a_plain_stream_survives_the_loss_of_all_records_and_then_of_its_coordinator(
    twins: LocalMesh, undisturbed: list[int], run: Run
) -> None:
    """The client drops what has a lower epoch than it has seen, as nats/README.md says."""

    async def disturb() -> None:
        async with (
            asked(twins, LONG | {"stream": True}) as answers,
            await Bus.connect(BusOptions(urls=(twins.url,)), name="operator") as bus,
        ):
            bucket = sessions_bucket(bus)
            tokens: dict[int, int] = {}
            lost, epoch = False, 0
            while True:
                received = await asyncio.wait_for(answers.get(), 60)
                assert "Nats-Service-Error" not in received.headers, received.headers
                document = orjson.loads(received.data)
                if document["epoch"] < epoch:
                    continue
                epoch = document["epoch"]
                if "index" in document:
                    tokens[document["index"]] = document["token"]
                if document["done"]:
                    break
                if len(tokens) == 10 and not lost:
                    lost = True
                    pid, shard = await owner(twins), twins.processes["shard-2"]
                    shard.send_signal(signal.SIGSTOP)  # the generation does not end meanwhile
                    await bus.client.jetstream().delete_stream(f"KV_{subjects.KV_SESSIONS}")
                    await until(bucket.entries, because="a coordinator tells nobody that it has written a session down again")
                    kill(pid)
                    shard.send_signal(signal.SIGCONT)
            assert [tokens[index] for index in range(TOKENS)] == undisturbed == document["tokens"]

    run(disturb())


def test_a_plain_request_is_answered_once_by_the_other_coordinator(twins: LocalMesh, undisturbed: list[int], run: Run) -> None:
    async def disturb() -> None:
        async with AsyncMeshClient(twins.url, model="tiny") as client, asked(twins, LONG) as answers:
            kill(await owner(twins))
            received = await asyncio.wait_for(answers.get(), 60)
            assert orjson.loads(received.data)["tokens"] == undisturbed
            await client.generate(tokens=[1], max_tokens=1)
            assert answers.empty()

    run(disturb())


@pytest.mark.slow
def test_what_was_accepted_is_answered_although_the_coordinator_dies_at_once(twins: LocalMesh, undisturbed: list[int], run: Run) -> None:
    async def disturb() -> None:
        for _ in range(4):
            async with AsyncMeshClient(twins.url, model="tiny") as client:
                while len(there := await client.coordinators()) < 2:
                    pass
                pids = {coordinator.name: coordinator.stats.pid for coordinator in there}
            async with asked(twins, LONG | {"stream": True}) as answers:
                first = orjson.loads((await asyncio.wait_for(answers.get(), 60)).data)
                name = first["cancel"].rpartition(".")[2]
                kill(pids[name])
                assert first["recorded"]
                tokens: dict[int, int] = {}
                while not (document := orjson.loads((await asyncio.wait_for(answers.get(), 60)).data))["done"]:
                    if "index" in document:
                        assert tokens.setdefault(document["index"], document["token"]) == document["token"]
                assert [tokens[index] for index in range(TOKENS)] == undisturbed == document["tokens"]
            (child,) = [child for child, process in twins.processes.items() if process.pid == pids[name]]
            twins.restart(child)

    run(disturb())


@pytest.mark.parametrize("what", ["logprobs", "stop"])
def test_sampled_tokens_with_a_stop_text_or_log_probabilities_go_on_too(twins: LocalMesh, run: Run, what: str) -> None:
    async def disturb() -> None:
        common: dict[str, Any] = {
            "tokens": PROMPT,
            "temperature": 0.9,
            "top_p": 0.95,
            "seed": 11,
            "max_tokens": 240,
            "repetition_penalty": 1.1,
        }
        async with AsyncMeshClient(twins.url, model="tiny") as client:
            whole = await client.generate(**common)
            assert whole.text is not None
            request = common | ({"logprobs": 2} if what == "logprobs" else {"stop": [whole.text[100:104]]})
            right = await client.generate(**request)
            text, logprobs, killed = "", [], False
            async with client.stream(**request) as stream:
                async for chunk in stream:
                    text += chunk.text
                    logprobs += [] if chunk.token is None else [chunk.token]
                    if chunk.index == 10 and not killed:
                        killed = True
                        kill(await owner(twins))
            assert stream.completion is not None and stream.completion.tokens == right.tokens
            assert stream.completion.finish_reason == right.finish_reason
            assert text == stream.completion.text == right.text
            if what == "logprobs":
                assert stream.completion.logprobs is not None and right.logprobs is not None
                assert [token.id for token in logprobs] == [token.id for token in stream.completion.logprobs] == list(whole.tokens)
                for token, expected in zip(logprobs, right.logprobs, strict=True):
                    assert token.logprob == pytest.approx(expected.logprob, abs=1e-3)

    run(disturb())


def test_a_request_that_is_repeated_at_another_coordinator_is_the_running_one(twins: LocalMesh, undisturbed: list[int], run: Run) -> None:
    async def twice() -> None:
        request = LONG | {"session": "mine", "seed": 1}
        async with AsyncMeshClient(twins.url, model="tiny") as client:
            answers = await asyncio.gather(*(client.generate(**request) for _ in range(8)))
            assert all(list(answer.tokens) == undisturbed for answer in answers)
            status = await client.status()
            assert sum(c.stats.finished for c in status.coordinators) == 1
            again = await asyncio.gather(*(client.generate(**request) for _ in range(8)))
            assert all(list(answer.tokens) == undisturbed for answer in again)
            status = await client.status()
            assert sum(c.stats.finished for c in status.coordinators) == 1

    run(twice())


@pytest.mark.slow
def test_the_only_coordinator_comes_back_and_goes_on(model: Path, undisturbed: list[int], run: Run, tmp_path: Path) -> None:
    """systemd would start it again like this. It finds its sessions and continues them, for a plain request and for the client."""
    options = LocalOptions(model=model, shards=1, rows=4, context=CONTEXT, logs=tmp_path)

    async def disturb(mesh: LocalMesh) -> None:
        async with (
            AsyncMeshClient(mesh.url, model="tiny") as client,
            asked(mesh, LONG) as answers,
            client.stream(**LONG) as stream,
        ):
            seen = []
            async for chunk in stream:
                seen += [] if chunk.token is None else [chunk.token.id]
                if chunk.index == 10 and chunk.token is not None:
                    kill(await owner(mesh))
                    mesh.restart("coordinator-1")
            assert seen == undisturbed
            received = await asyncio.wait_for(answers.get(), 60)
            assert orjson.loads(received.data)["tokens"] == undisturbed

    with LocalMesh(options) as mesh:
        run(disturb(mesh))
