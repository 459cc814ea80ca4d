"""Session records on a real server: who owns a session, and what happens to a record that was taken over or lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import orjson
import pytest
from running import Run
from serving import LONG, coordinator, shards, unique
from waiting import entry, until

from mesh.bus import Bus, BusOptions, Received
from mesh.bus.kv import Entry
from mesh.coordinator.records import RECORDS_PER_S, Recorder, SessionRecord, digest_of, sessions_bucket
from mesh.local.nats_server import NatsServer
from mesh.protocol import topics
from mesh.protocol.generation import Cancel, Generate
from mesh.types import even_ranges

COUNTERS = "counters are counted without a word"
PEERS = "a coordinator tells nobody which others it knows of"


def parsed(found: Entry | None) -> SessionRecord | None:
    return None if found is None or found.value is None else SessionRecord.parse(found.value)


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
            reply="_INBOX.r",
            given=tuple(self.tokens),
            told=len(self.tokens),
        )

    async def written(self, count: int) -> SessionRecord:
        """The record, once it has so many tokens."""

        def whole(found: Entry | None) -> SessionRecord | None:
            record = parsed(found)
            return record if record is not None and len(record.given) == count else None

        return await entry(self.recorder.bucket, self.recorder.key("s"), whole)


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


def test_a_session_that_is_taken_over_has_one_owner_and_the_former_owner_learns_it(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with sides(server) as (a, b):
            a.recorder.keep("s", a.record)
            await a.written(0)
            a.tokens += [5, 6]
            a.recorder.touch("s")
            record = await b.written(2)
            assert record.owner == "a" and record.told == 2 and record.message.tokens == (1, 2)
            found = await b.recorder.read("s")
            assert found is not None
            taken = await b.recorder.take_over(*found)
            assert taken is not None and taken[0].owner == "b" and taken[0].epoch > record.epoch
            assert await b.recorder.take_over(*found) is None, "taken twice"
            b.tokens, b.epoch = list(record.given), taken[0].epoch
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


def test_a_session_that_begins_while_old_answers_are_deleted_is_written_at_once(
    run: Run, server: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It used to be forgotten until the next write of another session, at most 40 s later."""

    async def work() -> None:
        async with sides(server) as (a, _):
            deleting, go_on = asyncio.Event(), asyncio.Event()
            monkeypatch.setattr("mesh.coordinator.records.KEPT_S", 0.0)
            delete = a.recorder.bucket.delete

            async def delete_slowly(key: str, revision: int | None = None) -> bool:
                deleting.set()
                await go_on.wait()
                return await delete(key, revision=revision)

            monkeypatch.setattr(a.recorder.bucket, "delete", delete_slowly)
            a.recorder.keep("old", lambda: a.record().model_copy(update={"session": "old"}))
            a.recorder.end("old", a.record().model_copy(update={"session": "old", "answer": "{}"}))
            await asyncio.wait_for(deleting.wait(), 60)
            a.recorder.keep("s", a.record)
            go_on.set()
            await asyncio.wait_for(a.written(0), 10)

    run(work())


def test_a_record_that_is_too_large_is_written_without_its_tokens_and_otherwise_not_at_all(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with sides(server) as (a, _):
            a.tokens = [1234567] * 300_000  # more than a record may have
            first: asyncio.Queue[bool] = asyncio.Queue()
            a.recorder.keep("s", a.record, on_first=first.put_nowait)
            assert await asyncio.wait_for(first.get(), 60)
            record = await a.written(0)
            assert record.told == 300_000

            asked = 0

            def huge() -> SessionRecord:
                nonlocal asked
                asked += 1
                return a.record().model_copy(update={"session": "huge", "message": Generate(tokens=(1234567,) * 300_000)})

            a.recorder.keep("huge", huge, on_first=first.put_nowait)
            assert not await asyncio.wait_for(first.get(), 60)
            a.recorder.keep("t", lambda: a.record().model_copy(update={"session": "t", "given": ()}), on_first=first.put_nowait)
            assert await asyncio.wait_for(first.get(), 60)
            assert asked == 1, "it is not tried again and again"
            assert a.recorder.counters["too_large"] == 1

    run(work())


def test_a_stream_is_accepted_when_its_record_is_there_and_nothing_waits_for_that_but_its_client(
    run: Run, server: NatsServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with shards(server.url, model, even_ranges(3, 2)), coordinator(server.url, model) as serving:
            monkeypatch.setattr("mesh.coordinator.effects._FIRST_WRITE_S", 60.0)
            recorder, may_write = serving.continuity.recorder, asyncio.Event()
            update = recorder.bucket.update

            async def update_late(key: str, value: bytes, *, revision: int) -> int | None:
                await may_write.wait()
                return await update(key, value, revision=revision)

            monkeypatch.setattr(recorder.bucket, "update", update_late)
            async with await Bus.connect(BusOptions((server.url,)), name="raw") as bus:
                answers: asyncio.Queue[Received] = asyncio.Queue()
                inbox = bus.new_inbox()
                await bus.subscribe(inbox, answers.put)
                request = Generate.parse(orjson.dumps({**LONG, "stream": True}))
                await bus.send(topics.GENERATE.at("tiny"), request, reply=inbox)
                await until(lambda: serving.core.counts()["tokens"] >= 3, because=COUNTERS)  # it is generated all the same
                await bus.flush()
                assert answers.empty()
                may_write.set()
                first = orjson.loads((await answers.get()).data)
                assert first["request"] and first["recorded"] is True
                entry = await recorder.bucket.get(recorder.key(first["request"]))
                assert entry is not None and entry.value
                indexes = []
                while not (document := orjson.loads((await answers.get()).data))["done"]:
                    indexes.append(document["index"])
                assert indexes == list(range(LONG["max_tokens"]))

    run(work())


def test_a_bucket_that_does_not_answer_delays_one_first_document_and_no_other(
    run: Run, server: NatsServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with coordinator(server.url, model, idle=False) as serving:  # without shards: the requests wait
            recorder, for_ever = serving.continuity.recorder, asyncio.Event()
            update = recorder.bucket.update

            async def never(key: str, value: bytes, *, revision: int) -> int | None:
                await for_ever.wait()
                return await update(key, value, revision=revision)

            monkeypatch.setattr(recorder.bucket, "update", never)
            async with await Bus.connect(BusOptions((server.url,)), name="raw") as bus:
                answers: asyncio.Queue[Received] = asyncio.Queue()
                inbox = bus.new_inbox()
                await bus.subscribe(inbox, answers.put)
                for patience_s in (0.05, 600.0):
                    monkeypatch.setattr("mesh.coordinator.effects._FIRST_WRITE_S", patience_s)
                    await bus.publish(topics.GENERATE.at("tiny").subject, orjson.dumps({**LONG, "stream": True}), reply=inbox)
                    first = orjson.loads((await asyncio.wait_for(answers.get(), 60)).data)
                    assert first["recorded"] is False and not recorder.answering
                    assert "missing" in orjson.loads((await asyncio.wait_for(answers.get(), 60)).data)
                    topic, request = topics.CANCEL.read(first["cancel"]), first["request"]
                    await bus.send(topic, Cancel(request=request))
                    assert "cancelled" in (await asyncio.wait_for(answers.get(), 60)).headers["Nats-Service-Error"]
            for_ever.set()

    run(work())


def test_a_record_is_written_at_most_every_so_often(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with sides(server) as (a, _):
            a.recorder.keep("s", a.record)
            for token in range(200):
                a.tokens.append(token)
                a.recorder.touch("s")
                await asyncio.sleep(0.002)  # the pace of the tokens
            await a.written(200)
            assert a.recorder.counters["written"] < 20

    run(work())


def test_many_records_are_written_less_often_each(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with sides(server) as (a, _):
            names = [f"s{index}" for index in range(48)]

            def named(name: str) -> SessionRecord:
                return a.record().model_copy(update={"session": name})

            began = time.monotonic()
            for name in names:
                a.recorder.keep(name, partial(named, name))
            await until(lambda: a.recorder.counters["written"] >= len(names), because=COUNTERS)
            while time.monotonic() < began + 1.2:  # at one every EVERY_S each, they would have been written twice more
                for name in names:
                    a.recorder.touch(name)
                await asyncio.sleep(0.01)  # the pace of the changes
            most = 1 + (time.monotonic() - began) * RECORDS_PER_S / len(names)
            assert a.recorder.counters["written"] <= len(names) * most

    run(work())


def test_a_record_goes_with_its_session_or_keeps_its_answer(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with sides(server) as (a, b):
            a.recorder.keep("s", a.record)
            await a.written(0)
            a.recorder.end("s", None)

            bucket, key = b.recorder.bucket, b.recorder.key("s")
            await entry(bucket, key, lambda found: found is None)
            a.recorder.keep("s", a.record)
            a.recorder.end("s", a.record().model_copy(update={"answer": "{}"}))
            await entry(bucket, key, lambda found: (record := parsed(found)) is not None and record.answer is not None)
            await until(lambda: "s" not in a.recorder, because="a recorder tells nobody that it has let go of a session")

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


def test_requests_for_the_same_generation_have_the_same_digest() -> None:
    first = Generate(prompt="a", seed=1, session="s")
    assert digest_of(first) == digest_of(first.model_copy(update={"attempt": 3, "given": (1, 2), "stream": True}))
    assert digest_of(first) != digest_of(first.model_copy(update={"seed": 2}))


def test_a_session_that_another_took_is_dropped_without_a_word(run: Run, server: NatsServer, model: Path) -> None:
    """A coordinator that was suspended meets this. No shard runs, so the session waits throughout."""

    async def work() -> None:
        async with coordinator(server.url, model) as serving:
            recorder, inbox = serving.continuity.recorder, serving.bus.new_inbox()
            answers: asyncio.Queue[Received] = asyncio.Queue()
            await serving.bus.subscribe(inbox, answers.put)
            request = Generate(**LONG | {"tokens": (1, 2)}, session="waits", stream=True)
            await serving.bus.publish(topics.GENERATE.at(serving.manifest.name).subject, request.to_bytes(), reply=inbox)
            kept = await entry(recorder.bucket, recorder.key("waits"), lambda found: found)
            first = parsed(kept)
            assert first is not None
            assert serving.core.load(0.0).live == 1
            other = first.model_copy(update={"owner": "another", "epoch": 7})
            revision = await recorder.bucket.update(recorder.key("waits"), other.to_bytes(), revision=kept.revision)
            recorder.touch_all()
            await until(lambda: not serving.core.load(0.0).live, because="a core tells nobody that it dropped a session")
            assert recorder.counters["lost"] == 1
            again = await recorder.read("waits")
            assert again is not None and again[0].owner == "another" and again[1] == revision
            await recorder.bucket.delete(recorder.key("waits"))
            await serving.bus.flush()
            said = [answers.get_nowait() for _ in range(answers.qsize())]
            assert said and all("Nats-Service-Error" not in document.headers for document in said)

    run(work())


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOLD = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": [CALL]}]


@pytest.mark.parametrize(
    "request_of",
    [
        {"messages": [*TOLD[:1], {"role": "assistant", "content": "b"}], "continue_final_message": True},
        {"messages": TOLD[:1], "add_generation_prompt": False, "parse_special": True},
        {"messages": TOLD[:1], "chat_template_kwargs": {"enable_thinking": False}},
        {
            "messages": [*TOLD, {"role": "tool", "tool_call_id": "c1", "content": "1"}],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
        {"prompt": "a", "raw": True},
    ],
)
def test_every_kind_of_request_is_written_down_with_its_prompt_in_tokens(
    run: Run, server: NatsServer, model: Path, request_of: dict[str, object]
) -> None:
    """What says how messages become a prompt means nothing any more, and must not keep the record from being written. No shard runs."""

    async def work() -> None:
        async with coordinator(server.url, model) as serving:
            recorder = serving.continuity.recorder
            name = f"kept-{unique('r')}"
            request = Generate.model_validate_json(orjson.dumps({**request_of, "session": name, "stream": True}))
            await serving.bus.publish(topics.GENERATE.at(serving.manifest.name).subject, request.to_bytes(), reply=serving.bus.new_inbox())
            kept = parsed(await entry(recorder.bucket, recorder.key(name), lambda found: found))
            assert kept is not None and kept.message.tokens and kept.message.messages is None and not recorder.counters["failed"]
            assert kept.digest == digest_of(request)
            await serving.bus.send(topics.CANCEL.at(serving.manifest.name, serving.name), Cancel(request=name))
            await until(lambda: not serving.core.load(0.0).live, because="nobody listens for the answer of this one")

    run(work())


@pytest.mark.parametrize("given", [(99999,), tuple(range(41))])
def test_generated_tokens_that_are_impossible_are_refused(run: Run, server: NatsServer, model: Path, given: tuple[int, ...]) -> None:
    from mesh.coordinator.requests import Requests
    from mesh.errors import BadRequest
    from mesh.model.manifest import Manifest

    with pytest.raises(BadRequest) as caught:
        run(Requests(Manifest.load(model), None, None).prepare(Generate(**{**LONG, "tokens": (1,), "given": given}), "r", ""))
    assert caught.value.field == "given"


def test_coordinators_know_of_each_other_as_soon_as_the_later_one_is_there(run: Run, server: NatsServer, model: Path) -> None:
    """The first heartbeat is answered at once, so a coordinator that dies before its second one is missed without delay."""

    async def work() -> None:
        async with (
            coordinator(server.url, model, health_check_interval_s=60.0) as first,
            coordinator(server.url, model, health_check_interval_s=60.0) as later,
        ):
            await until(lambda: first.continuity.peers.lives(later.continuity.instance), because=PEERS, deadline_s=5)
            await until(lambda: later.continuity.peers.lives(first.continuity.instance), because=PEERS, deadline_s=5)

    run(work())
