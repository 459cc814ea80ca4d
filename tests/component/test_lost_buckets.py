"""A bucket that is deleted under those who use it is made again by whatever is done with it next, and that is said."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from running import Run
from serving import connect, unique
from waiting import Heard

from mesh.bus import Bucket
from mesh.local.nats_server import NatsServer

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
