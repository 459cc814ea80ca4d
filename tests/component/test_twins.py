"""Two processes of one name: the earlier one answers nothing that is meant for the later one, and ends."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from running import Run
from serving import COMPILED, LONG, coordinator, shards, until_ready
from waiting import until

from mesh.bus import Bus, BusOptions
from mesh.client import AsyncMeshClient
from mesh.coordinator.service import Coordinator
from mesh.errors import Replaced
from mesh.local.nats_server import NatsServer
from mesh.protocol import topics
from mesh.protocol.control import Open, Ping
from mesh.shard.service import Shard
from mesh.types import even_ranges

CORE = "a core tells nobody whom it knows"


async def nothing(*arguments: Any) -> None:
    """In the place of a check."""


async def answers(client: AsyncMeshClient, expected: list[int], times: int = 4) -> None:
    for answer in await asyncio.gather(*(client.generate(**LONG, temperature=0.0) for _ in range(times))):
        assert list(answer.tokens) == expected


async def speaks_to(serving: Coordinator, shard: Shard) -> None:
    name = shard.options.name
    await until(
        lambda: any(replica.shard == name and replica.instance == shard.instance for replica in serving.core.replicas()), because=CORE
    )


def test_a_twin_that_has_not_noticed_disturbs_nobody(
    run: Run, server: NatsServer, model: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 2)) as running,
            coordinator(server.url, model) as serving,
            AsyncMeshClient(server.url, model="tiny", retries=0) as client,
            await Bus.connect(BusOptions((server.url,)), name="later") as bus,
        ):
            earlier = running[0]
            await answers(client, expected, 1)
            monkeypatch.setattr(earlier, "_replaced_by", lambda lease: None)
            monkeypatch.setattr(earlier._lease, "_replaced", lambda lease: None)
            later = Shard(bus, earlier.options, compiled=COMPILED)
            monkeypatch.setattr(later, "_require_alone", nothing)
            task = asyncio.create_task(later.run())
            await until_ready(later.ready, task)
            await speaks_to(serving, later)
            restarts = serving.core.counters.restarts
            for _ in range(3):
                await answers(client, expected)
            assert serving.core.counters.restarts == restarts and serving.core.counters.failed == 0
            assert earlier.state.gaps["other_instance"] > 0 and earlier.state.sessions == 0
            later.stop()
            await task

    run(work())


def test_the_earlier_of_two_shards_ends_and_says_why(
    run: Run, server: NatsServer, model: Path, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 1)) as (other,),
            await Bus.connect(BusOptions((server.url,)), name="one") as one,
            await Bus.connect(BusOptions((server.url,)), name="two") as two,
        ):
            name = f"{other.options.name}-twin"
            options = type(other.options)(**{**vars(other.options), "name": name})
            earlier = Shard(one, options, compiled=COMPILED)
            first = asyncio.create_task(earlier.run())
            await until_ready(earlier.ready, first)
            later = Shard(two, options, compiled=COMPILED)  # not in the same millisecond: within one, chance decides which is later
            monkeypatch.setattr(later, "_require_alone", nothing)
            second = asyncio.create_task(later.run())
            with pytest.raises(Replaced, match=later.instance):
                await asyncio.wait_for(first, 10)
            await until_ready(later.ready, second)
            kept = await later._lease.bucket.get(name)
            assert kept is not None and later.instance.encode() in (kept.value or b""), "the earlier one has deleted the lease"
            later.stop()
            await second

    run(work())


@pytest.mark.parametrize("question", ["open", "ping"])
def test_a_question_to_the_later_instance_ends_the_earlier_one_unanswered(run: Run, server: NatsServer, model: Path, question: str) -> None:
    async def work() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 1)) as (shard,),
            await Bus.connect(BusOptions((server.url,)), name="test") as bus,
        ):
            later = "f" * 18
            name = shard.options.name
            if question == "ping":
                await bus.send(topics.PING.at(name), Ping(coordinator="c", instance=later), reply=bus.new_inbox())
            else:
                message = Open(session=1, epoch=1, coordinator="c", model_hash=shard.manifest.model_hash, prompt_length=1, instance=later)
                await bus.send(topics.OPEN.at(name), message, reply=bus.new_inbox())
            await asyncio.wait_for(shard._stop.wait(), 10)
            assert shard.state.sessions == 0
            with pytest.raises(Replaced):
                raise shard._failure or AssertionError

    run(work())


def test_two_coordinators_of_one_name_do_not_meet_at_the_shards(run: Run, server: NatsServer, model: Path, expected: list[int]) -> None:
    """Several heartbeats long: each names the sessions of its own process alone."""

    async def work() -> None:
        settings: dict[str, Any] = {"name": "same", "health_check_interval_s": 0.1}
        async with (
            shards(server.url, model, even_ranges(3, 2)),
            coordinator(server.url, model, **settings) as one,
            coordinator(server.url, model, **settings) as two,
            AsyncMeshClient(server.url, model="tiny", retries=0) as client,
        ):
            for _ in range(6):
                await answers(client, expected)
            assert one.core.counters.finished and two.core.counters.finished, "one of them has done everything"
            assert one.core.counters.restarts == two.core.counters.restarts == 0
            assert one.core.counters.late == two.core.counters.late == 0

    run(work())
