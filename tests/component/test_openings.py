"""Rows that are asked for while a shard is being asked go out together, whatever becomes of the answers before."""

from __future__ import annotations

import asyncio
from typing import Any

from running import Run
from serving import connect

from mesh.bus import Endpoint, Received, Service
from mesh.coordinator.openings import Openings
from mesh.errors import MeshError, Unavailable
from mesh.local.nats_server import NatsServer
from mesh.protocol import topics
from mesh.protocol.control import Open, Opened, OpenedMany
from mesh.protocol.failures import ErrorReply


def opening(session: int) -> Open:
    return Open(session=session, epoch=1, coordinator="c", model_hash="0" * 16, prompt_length=3)


def opened(message: Open) -> Opened | ErrorReply:
    """Even sessions are refused."""
    if message.session % 2 == 0:
        return ErrorReply.of(Unavailable("not here"))
    return Opened(
        session=message.session, epoch=1, shard="s", instance="i", layers_start=0, layers_end=1, row=0, filled=0, context=9, chunk=4
    )  # fmt: skip


def test_what_waits_is_asked_for_together_and_a_defect_before_it_changes_nothing(run: Run, server: NatsServer) -> None:
    asked: list[list[int]] = []
    answers: dict[str, bool] = {}
    first, others = asyncio.Event(), asyncio.Event()

    async def on_open(received: Received) -> Opened:
        message = topics.OPEN.parse(received.data)
        asked.append([message.session])
        first.set()
        await others.wait()
        answer = opened(message)
        assert isinstance(answer, Opened)
        return answer

    async def on_many(received: Received) -> OpenedMany:
        message = topics.OPEN_MANY.parse(received.data)
        asked.append([one.session for one in message.opens])
        return OpenedMany(answers=tuple(map(opened, message.opens)))

    async def work() -> None:
        done = asyncio.Event()

        async def answered(shard: str, found: list[tuple[str, Opened | MeshError]]) -> None:
            if not answers:
                answers["first"] = True
                raise RuntimeError("a defect")
            answers.update({what: isinstance(answer, Opened) for what, answer in found})
            done.set()

        async with await connect(server) as bus:
            endpoints: list[Endpoint[Any]] = [
                Endpoint("open", topics.OPEN.at("s"), on_open),
                Endpoint("open-many", topics.OPEN_MANY.at("s"), on_many),
            ]
            service = await Service.start(bus, name="shard", version="1.0.0", description="", endpoints=endpoints)
            openings: Openings[str] = Openings(bus, answered, timeout_s=5.0)
            openings.ask("s", "session 1", opening(1))
            await asyncio.wait_for(first.wait(), 10)
            for session in (2, 3, 5):
                openings.ask("s", f"session {session}", opening(session))
            others.set()
            await asyncio.wait_for(done.wait(), 10)
            await service.stop()

    run(work())
    assert asked == [[1], [2, 3, 5]]
    assert answers == {"first": True, "session 2": False, "session 3": True, "session 5": True}
