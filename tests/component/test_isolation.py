"""A defect that belongs to one session ends that session, and nothing else of the step. A task that fails is begun again, slowly.

The defects are planted: a part of one session raises what nobody expects.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson
import pytest
from running import Run
from serving import LONG, connect, coordinator, shards

from mesh.bus import end_tasks
from mesh.client import AsyncMeshClient
from mesh.coordinator.service import Coordinator
from mesh.errors import MeshError
from mesh.local.nats_server import NatsServer
from mesh.protocol.generation import public_id
from mesh.protocol.headers import REQUEST_HEADER, SESSION_HEADER
from mesh.types import even_ranges

BAD = "bad"


def planted(*_: Any, **__: Any) -> Any:
    raise OverflowError("planted")


def in_push(serving: Coordinator, bad: str) -> None:
    """Taking a token of the bad session fails."""
    job = serving.jobs.table[bad]
    job.text = None if job.text is None else type("Text", (), {"push": planted, "finish": planted})()


def in_answer(serving: Coordinator, bad: str) -> None:
    """The bad session's last document cannot be made."""
    job = serving.jobs.table[bad]
    job.began = "never"  # type: ignore[assignment]


def in_core(serving: Coordinator, bad: str) -> None:
    """The core fails at the next token of the bad session."""
    object.__setattr__(serving.core._state.by_id[bad].request, "stop_ids", None)


PLACES: dict[str, Callable[[Coordinator, str], None]] = {"push": in_push, "answer": in_answer, "core": in_core}


@pytest.mark.parametrize("place", PLACES)
def test_a_defect_of_one_session_ends_that_session_alone(
    server: NatsServer, model: Path, run: Run, expected: list[int], place: str
) -> None:
    async def work() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 2)),
            coordinator(server.url, model) as serving,
            AsyncMeshClient(server.url, model="tiny") as client,
        ):
            half_way, bad = asyncio.Event(), f"{place}-bad"

            async def one(session: str) -> list[int] | MeshError:
                tokens = []
                try:
                    async with client.stream(**LONG, session=session) as stream:
                        async for chunk in stream:
                            if chunk.token is not None:
                                tokens.append(chunk.token.id)
                            if session == bad and len(tokens) == 5 and not half_way.is_set():
                                half_way.set()
                                PLACES[place](serving, session)
                except MeshError as error:
                    return error
                return tokens

            async with asyncio.timeout(60):
                answers = await asyncio.gather(one(f"{place}-a"), one(bad), one(f"{place}-b"))
            assert answers[0] == answers[2] == expected
            assert isinstance(answers[1], MeshError) and "internal error" in str(answers[1])
            stats = serving.stats()
            assert stats.defects + stats.errors.get("effects", 0) >= 1
            assert not serving.jobs.table and await one(f"{place}-c") == expected

    run(work())


def test_a_turn_of_the_core_that_fails_ends_its_request_and_not_the_loop(
    server: NatsServer, model: Path, run: Run, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 2)),
            coordinator(server.url, model) as serving,
            AsyncMeshClient(server.url, model="tiny") as client,
        ):
            with monkeypatch.context() as patch:
                patch.setattr(serving.core, "_reason_to_refuse", planted)
                with pytest.raises(MeshError, match="internal error"):
                    await client.generate(**LONG)
            assert serving.stats().errors["core"] == 1 and not serving.jobs.table
            assert list((await client.generate(**LONG)).tokens) == expected

    run(work())


def test_a_request_that_cannot_fit_is_answered_without_being_read(
    server: NatsServer, model: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The payload is dropped as it arrives. The error still names the request, and other sizes of other endpoints have their own bounds."""

    async def work() -> None:
        async with coordinator(server.url, model, idle=False) as serving, await connect(server) as bus:
            read: list[int] = []
            parse = serving.requests.parse

            def parsed(data: bytes) -> object:
                read.append(len(data))
                return parse(data)

            monkeypatch.setattr(serving.requests, "parse", parsed)
            most = serving.requests.most_bytes()
            for size, code, context in ((most + 1, "prompt_too_long", "context"), (most, "message_rejected", "objects")):
                answer = await bus.client.request(
                    "mesh.v1.tiny.generate", b"{" * size, headers={SESSION_HEADER: "mine", "other": "kept"}, timeout=10
                )
                error = orjson.loads(answer.data)
                assert error["code"] == code and context in error["message"]
                assert (answer.headers or {})[REQUEST_HEADER] == public_id("mine")
            assert read == [most]
            with pytest.raises(MeshError, match="at most 65,536 are read"):
                await bus.ask("mesh.v1.tiny.batch.status", b"{" * 700_000, timeout_s=10)

    run(work())


def test_a_record_that_cannot_be_made_stops_no_other_record(
    server: NatsServer, model: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        async with coordinator(server.url, model, idle=False) as serving:
            recorder = serving.continuity.recorder
            failed = recorder.counters["failed"]
            recorder.keep(BAD, planted)
            while recorder.counters["failed"] == failed:
                await asyncio.sleep(0)
            for _ in range(100):  # each token of the session asks for a write
                recorder.touch(BAD)
                await asyncio.sleep(0)
            assert recorder.counters["failed"] == failed + 1
            recorder.forget(BAD)

    with caplog.at_level(logging.ERROR):
        run(work())
    assert sum("session record" in each.getMessage() for each in caplog.records) == 1


def test_a_task_that_fails_is_begun_again_after_a_pause_and_counted(server: NatsServer, run: Run, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            loop, begun, often = asyncio.get_running_loop(), [], asyncio.Event()

            async def fails() -> None:
                begun.append(loop.time())
                if len(begun) == 4:
                    often.set()
                raise OverflowError("planted")

            task = bus.keep(fails, "a task")
            async with asyncio.timeout(30):
                await often.wait()
            await end_tasks(task)
            pauses = [later - earlier for earlier, later in pairwise(begun)]
            assert pauses[0] >= 0.09 and pauses[1] >= 0.19 and pauses[2] >= 0.39
            assert bus.counters["task_failures"] >= 3

    with caplog.at_level(logging.ERROR):
        run(work())
    assert sum("a task failed" in each.getMessage() for each in caplog.records) == 1


def test_a_task_that_is_done_is_not_begun_again(server: NatsServer, run: Run) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            begun = 0

            async def once() -> None:
                nonlocal begun
                begun += 1

            await bus.keep(once, "once")
            assert begun == 1 and not bus.counters["task_failures"]

    run(work())
