"""Durable batches on a real server: they wait in a queue, and each request is answered once even if coordinators die in between."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from running import Run
from serving import CONTEXT, connect, coordinator, shards
from waiting import until

from mesh.bus.batches import BatchQueue, BatchStore, Work
from mesh.client import AsyncMeshClient
from mesh.coordinator.batch import BatchWorker
from mesh.coordinator.core.events import Result
from mesh.errors import BadRequest, Cancelled, DeadlineExceeded
from mesh.local.nats_server import NatsServer
from mesh.protocol import topics
from mesh.protocol.batches import BatchItem, BatchQuery, BatchSubmit
from mesh.protocol.generation import Generate
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams
from mesh.types import even_ranges


def requests(count: int) -> list[Generate]:
    return [Generate(tokens=(index + 1, 2, 3), max_tokens=4 + index % 3, ignore_eos=True) for index in range(count)]


def test_a_batch_waits_in_its_queue_and_each_result_is_stored_once(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            store, queue = BatchStore(bus), BatchQueue(bus)
            status = await store.submit("m", requests(3), id="three")
            assert (status.state, status.total, status.running) == ("queued", 3, 0)
            assert await store.submit("m", requests(3), id="three") == status, "submitted again it is the same"
            with pytest.raises(BadRequest, match="another one"):
                await store.submit("m", requests(2), id="three")
            taken = [work for _ in range(3) if (work := await queue.take("m", wait_s=5)) is not None]
            assert [(work.id, work.index) for work in taken] == [("three", 0), ("three", 1), ("three", 2)]
            assert await queue.take("m", wait_s=0.2) is None
            assert await queue.take("other", wait_s=0.2) is None
            assert await store.begin("three", 0) == 0
            assert (await store.status("three")).state == "running"
            assert await store.begin("three", 0) == 1, "it was begun before"
            assert await store.end("three", BatchItem(index=0, state="done", answer={"a": 1}))
            assert not await store.end("three", BatchItem(index=0, state="done", answer={"a": 2}))
            await store.end("three", BatchItem(index=2, state="failed"))
            status = await store.status("three")
            assert (status.state, status.done, status.failed, status.running) == ("running", 1, 1, 0)
            assert [(item.index, item.answer) for item in await store.results("three")] == [(0, {"a": 1}), (2, None)]
            for work in taken[:1] + taken[2:]:
                await work.done()
            await taken[1].give_back()
            again = await queue.take("m", wait_s=30)
            assert again is not None and again.index == 1
            await store.end("three", BatchItem(index=1, state="done", answer={}))
            await again.done()
            assert (await store.status("three")).state == "done"
            with pytest.raises(BadRequest, match="no batch"):
                await store.status("four")
            await queue.close()

    run(work())


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        ([], "requests"),
        ([Generate(tokens=(1,), session="mine")], "requests.0.session"),
        ([Generate(tokens=(1,), given=(1,))], "requests.0.given"),
    ],
)
def test_an_invalid_batch_is_refused(run: Run, server: NatsServer, bad: list[Generate], field: str) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            with pytest.raises(BadRequest) as caught:
                await BatchStore(bus).submit("m", bad)
            assert caught.value.field == field

    run(work())


def test_of_an_answer_that_no_message_holds_a_part_is_left_out(run: Run, server: NatsServer) -> None:
    async def work() -> None:
        async with await connect(server) as bus:
            store = BatchStore(bus)
            await store.submit("none", requests(1), id="large")
            await store.end("large", BatchItem(index=0, state="done", answer={"text": "x" * 9_000_000}))
            (item,) = await store.results("large")
            assert item.state == "done" and item.answer == {"text": None, "omitted": ["text"]}
            assert (await store.status("large")).state == "done"

    run(work())


def test_coordinators_work_through_batches_and_give_them_back(run: Run, server: NatsServer, model: Path) -> None:
    """The batch is submitted before a coordinator runs, one of its requests is wrong, and the first coordinator stops in the middle."""
    pipeline = Pipeline.load(model, context=CONTEXT)

    def expected(request: Generate) -> list[int]:
        return pipeline.complete(list(request.tokens or ()), SamplingParams(temperature=0.0), max_tokens=request.max_tokens).ids

    async def work() -> None:
        async with AsyncMeshClient(server.url, model="tiny") as client:
            wanted = requests(12)
            bad = {"tokens": [1], "max_tokens": 4, "temperature": 500.0}
            status = await client.submit_batch(
                [{"tokens": list(r.tokens or ()), "max_tokens": r.max_tokens, "ignore_eos": True} for r in wanted] + [bad]
            )
            assert status.state == "queued"
            with pytest.raises(DeadlineExceeded, match="0 of 13"):
                await client.wait_batch(status.id, timeout_s=0.1, poll_s=0.2)
            async with shards(server.url, model, even_ranges(3, 2)):
                async with coordinator(server.url, model, idle=False):
                    async with asyncio.timeout(60):
                        # asked again at once: the tiny model is quick, and the batch must not be over yet
                        while (await client.batch_status(status.id)).done < 2:
                            pass
                async with coordinator(server.url, model) as second:
                    assert (await client.wait_batch(status.id, timeout_s=60)).state == "done"
                    bus = second.bus
                    answer = await bus.request(topics.BATCH_STATUS.at("tiny"), BatchQuery(id=status.id), timeout_s=10)
                    assert (answer.done, answer.failed, answer.running) == (12, 1, 0)
                    query = BatchQuery(id=status.id, limit=5)
                    page = await bus.request(topics.BATCH_RESULT.at("tiny"), query, timeout_s=10)
                    assert [item.index for item in page.items] == [0, 1, 2, 3, 4] and page.next == 5
                    submit = BatchSubmit(requests=tuple(wanted[:2]))
                    mine = await bus.request(topics.BATCH_SUBMIT.at("tiny"), submit, timeout_s=10)
                    assert (await client.wait_batch(mine.id, timeout_s=60)).done == 2
            results = await client.batch_results(status.id)
            assert [result.index for result in results] == list(range(13))
            for request, result in zip(wanted, results, strict=False):
                assert result.completion is not None and list(result.completion.tokens) == expected(request)
            assert isinstance(results[12].error, BadRequest) and results[12].error.field == "temperature"

    run(work())


def test_clients_come_first(run: Run, server: NatsServer, model: Path) -> None:
    """A batch takes no row while a client waits, and leaves a quarter of them free."""

    async def work() -> None:
        async with shards(server.url, model, even_ranges(3, 1)), coordinator(server.url, model) as serving:
            assert serving.batches.has_room(0) and not serving.batches.has_room(serving.core.load(0.0).capacity)
            replicas = serving.core._state.replicas
            (replica,) = list(replicas)
            for key in range(3):
                replicas.take(replica.shard, key)
            assert replicas.free(0.0) == 1 and not serving.batches.has_room(0)
            for key in range(3):
                replicas.give_back(replica.shard, key)

    run(work())


def test_no_message_ends_durable_batches(run: Run, server: NatsServer, model: Path) -> None:
    """Messages that are no requests of a batch are set aside, counted and listed; the batch behind them is answered, and a coordinator that
    starts later finds none of them."""

    async def work() -> None:
        async with AsyncMeshClient(server.url, model="tiny") as client, await connect(server) as bus:
            known = await client.submit_batch([{"tokens": [9], "max_tokens": 2}, {"tokens": [8], "max_tokens": 2}], id="known")
            before = len(await client.dead_messages())
            js = bus.client.jetstream()
            hostile = [
                ("poison.x", b"{}"),
                ("poison.-1", b"{}"),
                ("poison.99999999999999999999", b"{}"),
                ("poison.\u0663", b"{}"),
                ("poison.1.2", b"{}"),
                ("unknown.0", Generate(tokens=(1,), max_tokens=1).to_bytes()),
                ("known.2", Generate(tokens=(1,), max_tokens=1).to_bytes()),
                ("known.0", b'{"no": "request"}'),
                ("known.1", b"\x00\xff not JSON"),
            ]
            async with shards(server.url, model, even_ranges(3, 1)):
                async with coordinator(server.url, model, idle=False) as first:
                    await client.wait_batch(known.id, timeout_s=60)
                    for place, body in hostile:
                        await js.publish(f"mesh.v1.batches.tiny.{place}", body)
                    last = await client.submit_batch([{"tokens": [7], "max_tokens": 2, "ignore_eos": True}])
                    assert (await client.wait_batch(last.id, timeout_s=60)).done == 1
                    # a second result for a request of a batch is not made: those two are acknowledged
                    assert first.stats().batches["dead"] == len(hostile) - 2
                dead = (await client.dead_messages())[before:]
                assert [entry.subject for entry in dead] == [f"mesh.v1.batches.tiny.{place}" for place, _ in hostile[:7]]
                assert "number" in dead[0].reason and dead[0].size_bytes == 2 and dead[0].at_unix_s > 0
                async with coordinator(server.url, model):
                    again = await client.submit_batch([{"tokens": [6], "max_tokens": 2, "ignore_eos": True}])
                    assert (await client.wait_batch(again.id, timeout_s=60)).done == 1
                    assert len(await client.dead_messages()) == before + 7

    run(work())


def test_a_request_that_cannot_be_read_fails_and_is_set_aside(run: Run, server: NatsServer, model: Path) -> None:
    async def work() -> None:
        async with AsyncMeshClient(server.url, model="tiny") as client, await connect(server) as bus:
            queue = BatchQueue(bus)
            await queue.open()
            # the description of the batch is there, and its only request is not what it should be
            store = BatchStore(bus)
            original, queue_body = BatchStore._body, b'{"tokens": "none"}'
            try:
                BatchStore._body = lambda self, index, request: queue_body  # type: ignore[method-assign]
                await store.submit("tiny", requests(1), id="unreadable")
            finally:
                BatchStore._body = original  # type: ignore[method-assign]
            async with shards(server.url, model, even_ranges(3, 1)), coordinator(server.url, model):
                assert (await client.wait_batch("unreadable", timeout_s=60)).state == "failed"
                (item,) = await client.batch_results("unreadable")
                assert item.error is not None and "tokens" in str(item.error)
            assert (await client.dead_messages())[-1].subject == "mesh.v1.batches.tiny.unreadable.0"

    run(work())


def test_a_worker_outlives_an_error_of_its_own(
    run: Run, server: NatsServer, model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error that nobody foresaw is counted, and its request is set aside after some tries; the others are answered."""
    monkeypatch.setattr("mesh.coordinator.batch.STARTS", 1)
    generate = BatchWorker._generate

    async def odd(self: BatchWorker, work: Work) -> Any:
        if Generate.parse(work.data).tokens == (13,):
            raise ValueError("unlucky")
        return await generate(self, work)

    monkeypatch.setattr(BatchWorker, "_generate", odd)

    async def work() -> None:
        async with AsyncMeshClient(server.url, model="tiny") as client:
            status = await client.submit_batch([{"tokens": [token], "max_tokens": 2, "ignore_eos": True} for token in (12, 13, 14)])
            async with shards(server.url, model, even_ranges(3, 1)), coordinator(server.url, model) as serving:
                ended = await client.wait_batch(status.id, timeout_s=60)
                assert (ended.done, ended.failed) == (2, 1)
                assert serving.stats().batches["errors"] == 1
            assert "unlucky" in (await client.dead_messages())[-1].reason

    run(work())


def test_a_batch_is_taken_back(run: Run, server: NatsServer, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has ended keeps its result, what runs is cancelled, what waits is not begun; a later coordinator begins nothing of it."""
    monkeypatch.setattr("mesh.coordinator.batch.IN_PROGRESS_S", 0.1)

    async def work() -> None:
        async with AsyncMeshClient(server.url, model="tiny") as client, await connect(server) as bus:
            began: asyncio.Event = asyncio.Event()
            ended: asyncio.Event = asyncio.Event()
            generate = BatchWorker._generate

            async def slow(self: BatchWorker, work: Work) -> Any:
                """The second request is held back before its answer is taken, so that it runs when the batch is taken back."""
                if work.index != 1:
                    return await generate(self, work)
                began.set()
                try:
                    while True:
                        await work.alive()
                        await self._require_wanted(work)
                        await asyncio.sleep(0.05)  # the period at which a worker looks
                finally:
                    ended.set()

            monkeypatch.setattr(BatchWorker, "_generate", slow)
            monkeypatch.setattr(BatchWorker, "has_room", lambda self, working: working < 1)
            status = await client.submit_batch([{"tokens": [5], "max_tokens": 2, "ignore_eos": True}] * 6)
            async with shards(server.url, model, even_ranges(3, 1)), coordinator(server.url, model) as serving:
                await began.wait()
                taken = await client.cancel_batch(status.id)
                assert (taken.state, taken.done, taken.cancelled, taken.running, taken.total) == ("cancelled", 1, 5, 0, 6)
                await ended.wait()
                results = await client.batch_results(status.id)
                assert [result.error is None for result in results] == [True, *[False] * 5]
                assert all(isinstance(result.error, Cancelled) for result in results[1:])
                assert await client.wait_batch(status.id, timeout_s=10) == taken == await client.cancel_batch(status.id)
                monkeypatch.setattr(BatchWorker, "_generate", generate)
                # one more of it comes into the queue, as of a submission that was interrupted
                late = Generate(tokens=(5,), max_tokens=2).to_bytes()
                await bus.client.jetstream().publish(f"mesh.v1.batches.tiny.{status.id}.3", late)
                after = await client.submit_batch([{"tokens": [5], "max_tokens": 2, "ignore_eos": True}])
                assert (await client.wait_batch(after.id, timeout_s=60)).done == 1
                assert await client.batch_status(status.id) == taken
                assert serving.stats().batches["cancelled"] == 2
                done = await client.cancel_batch(after.id)
                assert (done.state, done.cancelled) == ("done", 0), "all of it had ended"
                with pytest.raises(BadRequest, match="no batch"):
                    await client.cancel_batch("nobody-knows")

    run(work())


def test_a_generation_of_a_batch_that_is_taken_back_ends(
    run: Run, server: NatsServer, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mesh.coordinator.batch.IN_PROGRESS_S", 0.05)

    async def work() -> None:
        async with (
            AsyncMeshClient(server.url, model="tiny") as client,
            shards(server.url, model, even_ranges(3, 1)),
            coordinator(server.url, model, idle=False) as serving,
        ):
            held: asyncio.Event = asyncio.Event()
            # steps come back, and are not heard: the generation lasts until it is cancelled
            monkeypatch.setattr(serving.core, "handle", _but_results(serving.core.handle, held))
            status = await client.submit_batch([{"tokens": [5], "max_tokens": 50, "ignore_eos": True}])
            await held.wait()
            assert (await client.cancel_batch(status.id)).cancelled == 1
            await until(lambda: serving.core.counters.as_dict()["cancelled"] == 1, because="counters are counted without a word")

    run(work())


def _but_results(handle: Any, held: asyncio.Event) -> Any:
    def other(event: Any, now: float) -> Any:
        if isinstance(event, Result):
            held.set()
            return []
        return handle(event, now)

    return other
