"""A bucket that is deleted under those who use it is made again by whatever is done with it next, and that is said."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from running import Run
from serving import connect, coordinator, shards, unique
from waiting import Heard

from mesh.bus import Bucket, EventLog, Received
from mesh.bus.batches import BatchQueue
from mesh.local.nats_server import NatsServer
from mesh.protocol import topics
from mesh.protocol.generation import Generate
from mesh.protocol.stream import with_epoch
from mesh.protocol.subjects import STREAM_BATCH, STREAM_EVENTS
from mesh.types import even_ranges

Operation = Callable[[Bucket], Awaitable[Any]]

OPERATIONS: dict[str, tuple[Operation, Any]] = {
    "put": (lambda bucket: bucket.put("a", b"2"), 1),
    "create": (lambda bucket: bucket.update("b", b"2", revision=0), 1),
    "update": (lambda bucket: bucket.update("a", b"2", revision=1), None),
    "get": (lambda bucket: bucket.get("a"), None),
    "delete": (lambda bucket: bucket.delete("a", revision=1), False),
    "entries": (lambda bucket: bucket.entries(), []),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_lost_bucket_is_made_again(run: Run, server: NatsServer, name: str) -> None:
    operation, wanted = OPERATIONS[name]

    async def work() -> None:
        async with await connect(server) as bus:
            bucket = Bucket(bus, unique("lost"), durable=True)
            await bucket.put("a", b"1")
            jetstream = bus.client.jetstream()
            await jetstream.delete_stream(f"KV_{bucket.name}")
            with Heard("mesh.bus") as heard:
                assert await operation(bucket) == wanted
                await heard.wait(f"{bucket.name} was lost")
            assert bucket.remade == 1
            await bucket.put("a", b"3")
            assert bucket.remade == 1
            await jetstream.delete_stream(f"KV_{bucket.name}")

    run(work())


def test_epochs_do_not_go_back_where_the_record_of_a_session_was_lost(run: Run, server: NatsServer, model: Path) -> None:
    """Nor where the clock of the coordinator that answers next is behind, if the client says what it has seen."""

    async def work() -> None:
        async with shards(server.url, model, even_ranges(3, 1)), await connect(server) as bus:

            async def epochs(**said: Any) -> set[int]:
                """The epochs of the answer, by a coordinator that knows nothing of the session."""
                answers: asyncio.Queue[Received] = asyncio.Queue()
                inbox = bus.new_inbox()
                subscription = await bus.subscribe(inbox, answers.put)
                request = Generate(tokens=(5, 17, 33), max_tokens=4, seed=1, ignore_eos=True, stream=True, session="again", **said)
                found: set[int] = set()
                async with coordinator(server.url, model):
                    await bus.send(topics.GENERATE.at("tiny"), request, reply=inbox)
                    while True:
                        document = orjson.loads((await asyncio.wait_for(answers.get(), 60)).data)
                        found.add(document["epoch"])
                        if document["done"]:
                            break
                await bus.client.jetstream().delete_stream("KV_mesh_sessions")  # only now has the coordinator written its last record
                await subscription.stop()
                return found

            (first,) = await epochs()
            (second,) = await epochs(attempt=1)
            assert second > first
            (third,) = await epochs(attempt=2, epoch=second + 10**9)
            assert third > second + 10**9

    run(work())


def test_answers_that_were_kept_are_given_with_the_epoch_that_the_client_has_seen() -> None:
    kept = b'{"done":true,"epoch":5}'
    assert with_epoch(kept, None) == kept
    assert orjson.loads(with_epoch(kept, 7))["epoch"] == 7 and orjson.loads(with_epoch(kept, 3))["epoch"] == 5


@pytest.mark.parametrize("what", ["events", "queue"])
def test_a_lost_stream_is_made_again(run: Run, server: NatsServer, what: str) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            kept = EventLog(bus) if what == "events" else BatchQueue(bus)
            name = STREAM_EVENTS if what == "events" else STREAM_BATCH
            await kept.open()
            await bus.client.jetstream().delete_stream(name)
            with Heard("mesh.bus") as heard:
                await kept.open()
                await heard.wait(f"{name} was lost")
            assert kept.remade == 1
            assert (await bus.client.jetstream().stream_info(name)).config.name == name

    run(work())
