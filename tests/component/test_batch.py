"""Durable batches on a real server: they wait in a queue, and each request is answered once even if coordinators die in between."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from running import Run
from serving import CONTEXT, connect, coordinator, shards

from mesh.bus.batches import BatchQueue, BatchStore
from mesh.client import AsyncMeshClient
from mesh.errors import BadRequest, DeadlineExceeded
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
