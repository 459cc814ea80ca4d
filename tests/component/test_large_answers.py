"""Answers that are larger than a message of the server: refused before anything is computed, or in the parts of a stream; never silence."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from running import Run
from serving import PROMPT, connect, coordinator, shards

from mesh.bus import Received
from mesh.bus.connection import ERROR_HEADER, _headers_size, reply_error
from mesh.client import AsyncMeshClient
from mesh.coordinator.service import Coordinator
from mesh.errors import BadRequest, PayloadTooLarge
from mesh.local.nats_server import NatsServer
from mesh.protocol import topics
from mesh.protocol.batches import BatchItem, BatchQuery
from mesh.protocol.headers import SESSION_HEADER
from mesh.protocol.stream import fitted
from mesh.types import even_ranges

LIMIT = 32 * 1024
LARGE: dict[str, Any] = {"tokens": PROMPT, "max_tokens": 40, "ignore_eos": True, "logprobs": 20, "seed": 1}
"""Its answer has about 50 kB."""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A server that takes messages of 32 KiB."""
    config = tmp_path_factory.mktemp("nats") / "small.conf"
    config.write_text(f'max_payload: {LIMIT}\njetstream {{ store_dir: "{config.parent}" }}\n')
    with NatsServer.start(config=config) as running:
        yield running


@asynccontextmanager
async def mesh(server: NatsServer, model: Path) -> AsyncIterator[tuple[Coordinator, AsyncMeshClient]]:
    async with (
        shards(server.url, model, even_ranges(3, 2)),
        coordinator(server.url, model) as serving,
        AsyncMeshClient(server.url, model="tiny") as client,
    ):
        yield serving, client


@asynccontextmanager
async def asked(server: NatsServer, request: dict[str, Any]) -> AsyncIterator[asyncio.Queue[Received]]:
    async with await connect(server) as bus:
        answers: asyncio.Queue[Received] = asyncio.Queue()
        inbox = bus.new_inbox()
        await bus.subscribe(inbox, answers.put)
        await bus.publish(topics.GENERATE.at("tiny").subject, orjson.dumps(request), reply=inbox)
        yield answers


async def documents(answers: asyncio.Queue[Received]) -> list[dict[str, Any]]:
    """Until the last."""
    found: list[dict[str, Any]] = []
    while not found or not found[-1]["done"]:
        received = await asyncio.wait_for(answers.get(), 60)
        assert ERROR_HEADER not in received.headers, received.headers
        found.append(orjson.loads(received.data))
    return found


def test_a_plain_request_whose_answer_would_not_fit_is_refused_before_it_begins(run: Run, small: NatsServer, model: Path) -> None:
    async def ask() -> None:
        async with mesh(small, model) as (serving, _):
            async with asked(small, LARGE) as answers:
                received = await asyncio.wait_for(answers.get(), 60)
            assert received.headers["Nats-Service-Error-Code"] == "413"
            for word in ("max_payload", "stream: true", "max_tokens up to 21"):
                assert word in received.headers[ERROR_HEADER]
            assert not serving.core.counts()["submitted"]
            async with asked(small, {**LARGE, "max_tokens": 15}) as answers:
                (document,) = await documents(answers)
            assert len(document["logprobs"]) == 15

    run(ask())


def test_a_stream_has_everything_although_its_last_document_cannot(run: Run, small: NatsServer, model: Path) -> None:
    async def ask() -> None:
        async with mesh(small, model) as (serving, client):
            async with asked(small, {**LARGE, "stream": True, "session": "named"}) as answers:
                *parts, last = await documents(answers)
            tokens = [part for part in parts if "index" in part]
            assert [part["token"] for part in tokens] == last["tokens"] and len(tokens) == 40
            assert last["omitted"] == ["logprobs"] and last["logprobs"] is None and all(len(part["top"]) == 20 for part in tokens)
            async with asked(small, {**LARGE, "stream": True, "session": "named", "given": []}) as answers:
                assert [part for part in await documents(answers) if "index" in part] == tokens, "who asks again gets the parts again"
            assert serving.core.counts()["submitted"] == 1
            answer = await client.generate(**LARGE)
            assert answer.logprobs is not None and [token.id for token in answer.logprobs] == last["tokens"] == list(answer.tokens)
            assert answer.text == last["text"] and not answer.omitted

    run(ask())


def test_a_batch_refuses_such_a_request_when_it_is_submitted(run: Run, small: NatsServer, model: Path) -> None:
    async def submit() -> None:
        async with mesh(small, model) as (_, client):
            with pytest.raises(PayloadTooLarge, match=r"requests\.1: the answer may take"):
                await client.submit_batch([{**LARGE, "max_tokens": 2}, LARGE])
            status = await client.submit_batch([{**LARGE, "max_tokens": 15}] * 3, id="kept")
            await client.wait_batch(status.id, timeout_s=60)
            results = await client.batch_results("kept")
            assert [len(result.completion.logprobs or ()) for result in results if result.completion is not None] == [15, 15, 15]
            async with await connect(small) as bus:  # in several messages, of which each fits
                got: list[BatchItem] = []
                offset: int | None = 0
                while offset is not None:
                    page = await bus.request(topics.BATCH_RESULT.at("tiny"), BatchQuery(id="kept", offset=offset), timeout_s=10)
                    got, offset = [*got, *page.items], page.next
            assert [item.index for item in got] == [0, 1, 2]

    run(submit())


def test_the_client_asks_again_without_its_tokens_where_they_make_the_request_too_large(run: Run, small: NatsServer, model: Path) -> None:
    async def ask() -> None:
        request = {**LARGE, "logprobs": None}
        async with mesh(small, model) as (serving, client):
            expected = (await client.generate(**request)).tokens
            bus = client._connected
            async with client.stream(**request) as stream:
                tokens = []
                async for chunk in stream:
                    tokens += [] if chunk.token is None else [chunk.token.id]
                    if len(tokens) == 10:
                        again = stream._message.model_copy(update={"attempt": 1, "epoch": stream._epoch})
                        headers = _headers_size({SESSION_HEADER: stream.session})
                        bus.client._max_payload = len(again.to_bytes()) + headers + 20  # ten tokens take more
                        await serving.bus.publish(f"{serving.outbox.unheard}.{stream.request}", b"", headers={"Status": "503"})
            assert tuple(tokens) == expected
            assert serving.core.counts()["cancelled"] == 1

    run(ask())


def test_the_largest_parts_are_left_out_first() -> None:
    document = {"tokens": [1] * 100, "text": "x" * 1000, "logprobs": ["y" * 1000] * 10, "done": True}
    assert fitted(document, 20_000) == document
    for limit, omitted in ((2000, ["logprobs"]), (600, ["logprobs", "text"]), (200, ["logprobs", "text", "tokens"])):
        made = fitted(document, limit)
        assert made["omitted"] == omitted and len(orjson.dumps(made)) <= limit and made["done"]


def test_an_error_that_quotes_a_large_request_can_be_sent() -> None:
    body, headers = reply_error(BadRequest("x" * 5_000_000, field="y" * 5_000_000))
    assert len(body) + sum(map(len, headers.values())) < 10_000
