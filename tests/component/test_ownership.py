"""A generation belongs to whoever knows its session: nothing that others can see lets them cancel it, read it or speak for it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest
from running import Run
from serving import LONG, LONG_TOKENS, PROMPT, connect, coordinator, shards
from waiting import until

from mesh.bus import Bus, Received
from mesh.client import AsyncMeshClient
from mesh.errors import BadRequest
from mesh.local.nats_server import NatsServer
from mesh.protocol import topics
from mesh.protocol.generation import Cancel, Generate, TraceRequest, public_id
from mesh.types import even_ranges

SECRET = "known-to-its-owner-alone"
TOLD = "a stream that reads on shows what it drops"


async def statistics(bus: Bus) -> bytes:
    """Everything that the coordinators say of themselves to anyone."""
    return (await bus.ask("$SRV.STATS.mesh-coordinator", b"", timeout_s=10)).data


def test_what_others_see_of_a_request_gives_no_right_to_it(run: Run, server: NatsServer, model: Path, expected: list[int]) -> None:
    async def work() -> None:
        async with (
            await connect(server) as other,
            shards(server.url, model, even_ranges(3, 2)),
            coordinator(server.url, model) as serving,
            AsyncMeshClient(server.url, model="tiny") as client,
        ):
            seen: list[Received] = []

            async def note(received: Received) -> None:
                seen.append(received)

            sniffing = await other.subscribe("_INBOX.>", note)
            shown = b""
            tokens = []
            async with client.stream(**LONG, session=SECRET) as stream:
                async for chunk in stream:
                    if chunk.token is not None:
                        tokens.append(chunk.token.id)
                    if chunk.index == 2 and chunk.token is not None:
                        shown = await statistics(other)
                        await other.send(topics.CANCEL.at("tiny", serving.name), Cancel(request=stream.request))
                        question = TraceRequest(request=stream.request)
                        answer = await other.request(topics.TRACE.at("tiny", serving.name), question, timeout_s=10)
                        assert answer.trace is None, "the public id is not the owner's name"
            assert tokens == expected and serving.core.counters.as_dict()["cancelled"] == 0
            await other.flush()
            assert stream.request == public_id(SECRET) and stream.request.encode() in shown
            answers = [received for received in seen if received.subject == stream._subject]
            assert len(answers) > LONG_TOKENS and all(orjson.loads(received.data)["id"] == stream.request for received in answers)
            for received in answers:
                shown += received.data + received.reply.encode() + repr(received.headers).encode()
            assert SECRET.encode() not in shown
            assert (await client.trace(SECRET) or {})["request"] == stream.request
            assert (await client.inspect(stream.request) or {})["tokens"] == LONG_TOKENS
            await sniffing.stop()

    run(work())


def test_a_request_without_a_name_is_cancelled_by_the_name_that_only_its_answers_have(run: Run, server: NatsServer, model: Path) -> None:
    async def work() -> None:
        async with (
            await connect(server) as bus,
            shards(server.url, model, even_ranges(3, 1)),
            coordinator(server.url, model, idle=False) as serving,
        ):
            documents: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

            async def take(received: Received) -> None:
                documents.put_nowait({**orjson.loads(received.data), "headers": received.headers})

            inbox = bus.new_inbox()
            await bus.subscribe(inbox, take)
            await bus.send(topics.GENERATE.at("tiny"), Generate(**LONG | {"tokens": tuple(PROMPT)}, stream=True), reply=inbox)
            first = await documents.get()
            assert first["id"] == public_id(first["request"]) and first["request"].encode() not in await statistics(bus)
            await bus.publish(first["cancel"], Cancel(request=first["request"]).to_bytes())
            while (document := await documents.get()).get("code") != "cancelled":
                assert document["id"] == first["id"]
            assert document["headers"]["Mesh-Request"] == first["id"]
            assert serving.core.counters.as_dict()["cancelled"] == 1

    run(work())


@pytest.mark.parametrize("named", [True, False], ids=["tells the session", "tells nothing"])
def test_nobody_speaks_for_another_request(run: Run, server: NatsServer, model: Path, expected: list[int], named: bool) -> None:
    """A peer that knows the inbox of a stream lets coordinators answer there, and writes there itself; the stream reads none of it."""

    async def work() -> None:
        async with (
            await connect(server) as peer,
            shards(server.url, model, even_ranges(3, 2), rows=8),
            coordinator(server.url, model),
            AsyncMeshClient(server.url, model="tiny") as client,
        ):
            tokens = []
            async with client.stream(**LONG) as stream:
                async for chunk in stream:
                    if chunk.token is not None:
                        tokens.append(chunk.token.id)
                    if chunk.index == 2 and chunk.token is not None:
                        headers = {"Mesh-Session": "mine"} if named else None
                        generate = topics.GENERATE.at("tiny")
                        mine = Generate(tokens=(9, 9), max_tokens=8, ignore_eos=True, stream=True, session="mine", attempt=1000)
                        await peer.send(generate, mine, reply=stream._subject, headers=headers)
                        wrong = mine.model_copy(update={"session": stream.request, "attempt": 2000})
                        await peer.send(generate, wrong, reply=stream._subject, headers=headers)
                        await peer.publish(generate.subject, b"?", reply=stream._subject, headers=headers)
                        error = {"Nats-Service-Error": "no", "Nats-Service-Error-Code": "400", "Mesh-Epoch": "junk"}
                        await peer.publish(stream._subject, b"", headers=error)
                        for junk in (b"", b"[]", b'{"done": true, "epoch": 99999}', b'{"waiting": 1, "epoch": 99999, "done": false}'):
                            await peer.publish(stream._subject, junk)
            assert tokens == expected and stream.completion is not None and list(stream.completion.tokens) == expected
            await until(lambda: stream.foreign > 5, because=TOLD)

    run(work())


def test_another_request_does_not_take_a_session_that_it_names(run: Run, server: NatsServer, model: Path) -> None:
    name = "another-name-of-its-owner"

    async def work() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 1)),
            coordinator(server.url, model),
            AsyncMeshClient(server.url, model="tiny") as client,
        ):
            async with client.stream(**LONG, session=name) as stream:
                await anext(stream)
                with pytest.raises(BadRequest, match="another request"):
                    await client.generate(tokens=[1], max_tokens=2, session=name)
                assert name not in str(await client.coordinators())
            again = await client.generate(**LONG | {"max_tokens": 3}, session="second")
            assert again.session == "second" and again.request == public_id("second")

    run(work())
