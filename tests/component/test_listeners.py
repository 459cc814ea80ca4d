"""A request whose sender has gone gives its row back, also where it asked for a whole answer."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import nats
import nats.aio.client
import orjson
import pytest
from running import Run
from serving import connect, coordinator, shards
from waiting import until

from mesh.coordinator import listeners
from mesh.coordinator.listeners import heard_by
from mesh.coordinator.service import Coordinator
from mesh.local.nats_server import NatsServer
from mesh.protocol.headers import REQUEST_HEADER
from mesh.types import even_ranges

ENDLESS: dict[str, Any] = {"tokens": [5, 17, 33], "max_tokens": 3000, "ignore_eos": True}
ROWS, CONTEXT = 2, 4096
ASKED = "the server is asked again and again"


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny model would be done with 3,000 tokens before it is asked twice."""
    monkeypatch.setattr(listeners, "ASK_S", 0.1)


async def ask_and_leave(server: NatsServer, count: int, **more: Any) -> list[nats.aio.client.Client]:
    """As the command `nats req` does it: a subscription of its own for each answer. Returns the connections, which are to be closed."""
    connections = []
    for _ in range(count):
        raw = await nats.connect(server.url)
        reply = f"_INBOX.cli.{raw.client_id}"
        await raw.subscribe(reply)
        await raw.publish("mesh.v1.tiny.generate", orjson.dumps({**ENDLESS, **more}), reply=reply)
        await raw.flush()
        connections.append(raw)
    return connections


async def held(serving: Coordinator, count: int) -> None:
    await until(lambda: len(serving.jobs.table) == count, because=ASKED)


def test_senders_that_gave_up_leave_rows_and_the_queue(server: NatsServer, model: Path, run: Run) -> None:
    """Some of them are generated, others wait; one listens on, and gets its answer alone."""

    async def work() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 1), rows=ROWS, context=CONTEXT),
            coordinator(server.url, model) as serving,
            await connect(server) as bus,
        ):
            gone = await ask_and_leave(server, 5)
            await held(serving, 5)
            assert serving.stats().queued == 3
            listening = asyncio.create_task(bus.ask("mesh.v1.tiny.generate", orjson.dumps({**ENDLESS, "max_tokens": 40}), timeout_s=60))
            await held(serving, 6)
            for raw in gone:
                await raw.close()
            answer = orjson.loads((await listening).data)
            assert answer["done"] and len(answer["tokens"]) == 40
            await held(serving, 0)
            counts = serving.core.counters.as_dict()
            assert (counts["cancelled"], counts["finished"]) == (5, 1)

    run(work())


def test_a_sender_that_listens_is_asked_without_hearing_of_it(server: NatsServer, model: Path, run: Run) -> None:
    async def work() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 1), rows=ROWS, context=CONTEXT),
            coordinator(server.url, model) as serving,
            await connect(server) as bus,
        ):
            asked = asyncio.Event()
            reports: list[bool] = []

            def on_report(data: bytes) -> None:
                reports.append(heard_by(data)[1])
                if len(reports) >= 3:
                    asked.set()

            await bus.subscribe_direct(serving.listeners._reports, on_report)
            (raw,) = await ask_and_leave(server, 1)
            subscription = await raw.subscribe(f"_INBOX.cli.{raw.client_id}")
            await asked.wait()
            assert all(reports) and len(serving.jobs.table) == 1 and subscription.pending_msgs == 0
            await raw.close()
            await held(serving, 0)

    run(work())


def report(*events: dict[str, Any], **header: list[str]) -> bytes:
    return orjson.dumps({"server": {}, "request": {"header": {REQUEST_HEADER: ["r"], **header}}, "events": events})


IN, OUT = {"type": "in", "kind": 0, "subj": "_INBOX.a"}, {"type": "eg", "kind": 0, "cid": 7}


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (report(IN), ("r", False)),
        (report(IN, OUT), ("r", True)),
        (report(IN, {"type": "eg", "kind": 1}), ("r", True)),  # a server of the cluster, or a leaf node
        (report(IN, {"type": "si"}), ("r", True)),  # another account's
        (report({**IN, "error": "no"}), ("r", True)),
        (report({**IN, "kind": 1}), ("", True)),  # what another server says of its own listeners
        (report(OUT), ("", True)),
        (report(), ("", True)),
        (b"{}", ("", True)),
        (b"no json", ("", True)),
        (b"[]", ("", True)),
        (b" " * 100_000 + report(IN), ("", True)),
    ],
)
def test_what_a_report_says(data: bytes, expected: tuple[str, bool]) -> None:
    assert heard_by(data) == expected
