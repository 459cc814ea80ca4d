"""Session records on a real server: who owns a session, and what becomes of a record that another took, or that was lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from test_coordinator import LONG, coordinator
from waiting import until

from mesh.bus import Bus, BusOptions
from mesh.coordinator.records import RECORDS_PER_S, Recorder, SessionRecord, digest_of, sessions_bucket
from mesh.local.nats_server import NatsServer
from mesh.protocol import topics
from mesh.protocol.generation import Generate

Run = Callable[[Any], Any]


class Side:
    """A recorder of one coordinator, and what it was told."""

    def __init__(self, bus: Bus, instance: str) -> None:
        self.lost: asyncio.Queue[tuple[str, SessionRecord]] = asyncio.Queue()
        self.recorder = Recorder(sessions_bucket(bus), "m", instance, lambda session, record: self.lost.put_nowait((session, record)))
        self.tokens: list[int] = []
        self.instance = instance
        self.epoch = 1

    def record(self) -> SessionRecord:
        return SessionRecord(
            session="s",
            model_hash="0" * 16,
            owner=self.instance,
            epoch=self.epoch,
            digest="d",
            message=Generate(tokens=(1, 2), seed=3),
            reply="inbox",
            given=tuple(self.tokens),
            told=len(self.tokens),
        )

    async def written(self, count: int) -> SessionRecord:
        """The record, once it has so many tokens."""

        async def asked() -> SessionRecord | None:
            found = await self.recorder.read("s")
            return found[0] if found is not None and len(found[0].given) == count else None

        found = await until(asked)
        assert found is not None
        return found


@asynccontextmanager
async def sides(server: NatsServer) -> AsyncIterator[tuple[Side, Side]]:
    async with (
        await Bus.connect(BusOptions((server.url,)), name="one") as one,
        await Bus.connect(BusOptions((server.url,)), name="two") as two,
    ):
        both = Side(one, "a"), Side(two, "b")
        for side in both:
            side.recorder.start()
        yield both
        for side in both:
            await side.recorder.stop()
            assert not side.recorder.counters["failed"]
        for record in await both[0].recorder.bucket.entries("m.>"):
            await both[0].recorder.bucket.delete(record.key)


def test_who_takes_a_session_over_has_it_and_the_other_hears_of_it(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with sides(server) as (a, b):
            a.recorder.keep("s", a.record)
            await a.written(0)
            a.tokens += [5, 6]
            a.recorder.touch("s")
            record = await b.written(2)
            assert record.owner == "a" and record.told == 2 and record.message.tokens == (1, 2)
            found = await b.recorder.read("s")
            taken = await b.recorder.take_over(*found)
            assert taken is not None and taken[0].owner == "b" and taken[0].epoch == 2
            assert await b.recorder.take_over(*found) is None, "taken twice"
            b.tokens, b.epoch = list(record.given), 2
            b.recorder.keep("s", b.record, revision=taken[1])
            a.tokens.append(7)
            a.recorder.touch("s")
            session, record = await asyncio.wait_for(a.lost.get(), 60)
            assert session == "s" and record.owner == "b"
            assert "s" not in a.recorder and "s" in b.recorder
            b.tokens.append(7)
            b.recorder.touch("s")
            assert (await a.written(3)).owner == "b"
            assert b.lost.empty()

    run(work())


def test_a_record_is_written_at_most_every_so_often(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with sides(server) as (a, _):
            a.recorder.keep("s", a.record)
            for token in range(200):
                a.tokens.append(token)
                a.recorder.touch("s")
                await asyncio.sleep(0.002)
            await a.written(200)
            assert a.recorder.counters["written"] < 20

    run(work())


def test_many_records_are_written_less_often_each(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with sides(server) as (a, _):
            names = [f"s{index}" for index in range(48)]
            began = time.monotonic()
            for name in names:
                a.recorder.keep(name, lambda name=name: a.record().model_copy(update={"session": name}))
            await until(lambda: a.recorder.counters["written"] >= len(names))
            while time.monotonic() < began + 1.2:  # at one every EVERY_S each, they would have been written twice more
                for name in names:
                    a.recorder.touch(name)
                await asyncio.sleep(0.01)
            most = 1 + (time.monotonic() - began) * RECORDS_PER_S / len(names)
            assert a.recorder.counters["written"] <= len(names) * most

    run(work())


def test_a_record_goes_with_its_session_or_keeps_its_answer(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with sides(server) as (a, b):
            a.recorder.keep("s", a.record)
            await a.written(0)
            a.recorder.end("s", None)

            async def gone() -> bool:
                return await b.recorder.read("s") is None

            async def answered() -> bool:
                return (found := await b.recorder.read("s")) is not None and found[0].answer is not None

            await until(gone)
            a.recorder.keep("s", a.record)
            a.recorder.end("s", a.record().model_copy(update={"answer": "{}"}))
            await until(answered)
            assert "s" not in a.recorder

    run(work())


def test_a_record_that_was_lost_with_its_server_is_written_again(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with sides(server) as (a, _):
            a.recorder.keep("s", a.record)
            await a.written(0)
            await a.recorder.bucket.delete(a.recorder.key("s"))
            a.tokens.append(1)
            a.recorder.touch("s")
            await a.written(1)
            assert a.lost.empty()

    run(work())


def test_a_record_that_is_too_large_is_not_written_and_counted(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with sides(server) as (a, _):
            a.tokens = list(range(300_000))
            a.recorder.keep("s", a.record)
            await until(lambda: a.recorder.counters["too_large"])
            assert await a.recorder.read("s") is None

    run(work())


def test_requests_for_the_same_generation_have_the_same_digest() -> None:
    first = Generate(prompt="a", seed=1, session="s")
    assert digest_of(first) == digest_of(first.model_copy(update={"attempt": 3, "given": (1, 2), "stream": True}))
    assert digest_of(first) != digest_of(first.model_copy(update={"seed": 2}))


def test_a_session_that_another_took_is_dropped_without_a_word(run: Run, server: NatsServer, model: Path) -> None:
    """As after a suspension. There is no shard, so that the session waits all the while."""

    async def work() -> None:
        async with coordinator(server.url, model) as serving:
            recorder, answers, inbox = serving.continuity.recorder, asyncio.Queue(), serving.bus.new_inbox()
            await serving.bus.subscribe(inbox, answers.put)
            request = Generate(**LONG | {"tokens": (1, 2)}, session="waits", stream=True)
            await serving.bus.publish(topics.GENERATE.at(serving.manifest.name).subject, request.to_bytes(), reply=inbox)
            found = await until(lambda: recorder.read("waits"))
            assert serving.core.live == 1
            other = found[0].model_copy(update={"owner": "another", "epoch": 7})
            revision = await recorder.bucket.update(recorder.key("waits"), other.to_bytes(), revision=found[1])
            recorder.touch_all()
            await until(lambda: not serving.core.live)
            assert recorder.counters["lost"] == 1
            again = await recorder.read("waits")
            assert again is not None and again[0].owner == "another" and again[1] == revision
            await recorder.bucket.delete(recorder.key("waits"))
            await serving.bus.flush()
            said = [answers.get_nowait() for _ in range(answers.qsize())]
            assert said and all("Nats-Service-Error" not in document.headers for document in said)

    run(work())


@pytest.mark.parametrize("given", [(99999,), tuple(range(41))])
def test_tokens_that_cannot_have_been_given_are_refused(run: Run, server: NatsServer, model: Path, given: tuple[int, ...]) -> None:
    from mesh.coordinator.requests import prepare
    from mesh.errors import BadRequest
    from mesh.model.manifest import Manifest

    with pytest.raises(BadRequest) as caught:
        run(prepare(Generate(**{**LONG, "tokens": (1,), "given": given}), "r", Manifest.load(model), None))
    assert caught.value.field == "given"


def test_coordinators_know_of_each_other_as_soon_as_the_later_one_is_there(run: Run, server: NatsServer, model: Path) -> None:
    """Its first beat is answered: who dies before the next beat, seconds later, leaves sessions that somebody takes over at once."""

    async def work() -> None:
        async with (
            coordinator(server.url, model, health_check_interval_s=60.0) as first,
            coordinator(server.url, model, health_check_interval_s=60.0) as later,
        ):
            await until(lambda: first.continuity.peers.lives(later.continuity.instance), 5)
            await until(lambda: later.continuity.peers.lives(first.continuity.instance), 5)

    run(work())
