"""A coordinator on a real server with real shards: damaged messages are counted and change nothing, and ended sessions leave nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from random import Random

import numpy as np
import orjson
import pytest
from running import Run
from serving import LONG, coordinator, shards

from mesh.bus import Bus, BusOptions
from mesh.client import AsyncMeshClient
from mesh.coordinator.core.events import CloseRow
from mesh.local.nats_server import NatsServer
from mesh.protocol import frame_codec, subjects, topics
from mesh.protocol.control import Close
from mesh.protocol.frame_codec import Frame, Hop, Kind
from mesh.protocol.status import CoordinatorStats
from mesh.types import even_ranges


def damaged(whole: bytes, random: Random) -> list[bytes]:
    """A flipped byte anywhere, a cut anywhere, another version, noise, nothing."""
    at, cut = random.randrange(len(whole)), random.randrange(len(whole))
    flipped = bytearray(whole)
    flipped[at] ^= 1 << random.randrange(8)
    other_version = bytearray(whole)
    other_version[4] += 1
    return [bytes(flipped), whole[:cut], bytes(other_version), random.randbytes(200), b""]


@pytest.mark.parametrize("count", [1, 2])
def test_damage_on_the_coordinators_subjects_is_counted_and_changes_nothing(
    server: NatsServer, model: Path, run: Run, expected: list[int], count: int
) -> None:
    async def disturb() -> None:
        random = Random(0)
        ranges = even_ranges(3, count)
        async with shards(server.url, model, ranges), coordinator(server.url, model) as running, AsyncMeshClient(server.url) as client:
            name = running.manifest.name
            answers, cancels = subjects.tokens(name, running.continuity.instance), topics.CANCEL.at(name, running.name).subject
            one = np.ones(1)
            route = tuple(Hop(layers, "s") for layers in ranges)
            stranger = Frame(
                Kind.TOKENS, running.manifest.model_hash, running.name, route, one.astype(np.uint64), one.astype(np.uint32),
                one.astype(np.uint32), np.ones((count, 1), np.uint32), one.astype(np.int32), step=10**9,
            )  # fmt: skip
            whole = frame_codec.encode(stranger)
            sent = 0
            async with client.stream(model=name, **LONG) as stream:
                tokens = []
                async for chunk in stream:
                    if chunk.token is not None:
                        tokens.append(chunk.token.id)
                        for data in damaged(whole, random):
                            await running.bus.publish(answers, data)
                            await running.bus.publish(cancels, data)
                            sent += 1
                        await running.bus.publish(answers, whole)  # well-formed, of no step of ours
            assert tokens == expected
            await running.bus.flush()
            assert sum(running.intake.rejected.values()) >= sent - 5
            assert running.core.counters.late >= 1
            assert running.core.counters.restarts == 0

    run(disturb())


def test_a_shard_that_lost_its_rows_is_asked_again_and_no_token_is_lost(
    server: NatsServer, model: Path, run: Run, expected: list[int]
) -> None:
    async def disturb() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 2)) as running,
            coordinator(server.url, model) as serving,
            AsyncMeshClient(server.url) as client,
        ):
            async with client.stream(model=serving.manifest.name, **LONG) as stream:
                tokens = []
                async for chunk in stream:
                    if chunk.token is not None:
                        tokens.append(chunk.token.id)
                    if chunk.index == 10 and chunk.token is not None:
                        (key,) = serving.core.session_keys()
                        close = Close(coordinator=serving.continuity.instance, sessions=(key,))
                        await serving.bus.send(topics.CLOSE.at(running[1].options.name), close)
            assert tokens == expected
            assert serving.core.counters.restarts >= 1

    run(disturb())


def test_a_client_that_was_wrongly_taken_to_be_gone_goes_on(server: NatsServer, model: Path, run: Run, expected: list[int]) -> None:
    """This happens after a restart of the server, when the coordinator reconnects before the client does."""

    async def work() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 2)),
            coordinator(server.url, model) as serving,
            AsyncMeshClient(server.url, model="tiny") as client,
            await Bus.connect(BusOptions((server.url,)), name="test") as bus,
        ):
            tokens = []
            async with client.stream(**LONG, temperature=0.0) as stream:
                async for chunk in stream:
                    if chunk.token is not None:
                        tokens.append(chunk.token.id)
                    if len(tokens) in (3, 20):
                        await bus.publish(f"{serving.outbox.unheard}.{stream.request}", b"", headers={"Status": "503"})
            assert tokens == expected
            assert serving.core.counters.as_dict()["cancelled"] >= 1

    run(work())


def test_where_the_time_of_a_request_went_can_be_asked_while_it_runs_and_afterwards(server: NatsServer, model: Path, run: Run) -> None:
    async def ask() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 3)) as running,
            coordinator(server.url, model) as serving,
            AsyncMeshClient(server.url) as client,
        ):
            async with client.stream(model=serving.manifest.name, **LONG) as stream:
                async for chunk in stream:
                    if chunk.index == 0 and chunk.token is not None:
                        shown = serving.stats()
                        during = await client.trace(stream.session)
            names = [shard.options.name for shard in running]
            assert CoordinatorStats.parse(orjson.dumps(shown.document())) == shown
            line = next(line for line in shown.sessions + shown.recent if line.request == stream.request)
            assert list(line.route) == names and line.tokens >= 1
            assert during is not None and during["state"] in ("decoding", "length")
            trace = await client.trace(stream.session)
            assert trace is not None and trace["coordinator"] == serving.name and trace["state"] == "length" and trace["tokens"] == 40
            (leg,) = trace["legs"]
            assert [stage["shard"] for stage in leg["stages"]] == names
            assert leg["prefill"]["steps"] == 1 and leg["decode"]["steps"] == 39
            for kind in ("prefill", "decode"):
                inside = sum(sum(stage.values()) for stage in leg[kind]["stages"])
                assert inside > 0 and inside + leg[kind]["hops_s"] == pytest.approx(leg[kind]["wall_s"])
            assert trace["spans"][0]["name"].endswith(serving.manifest.name)
            assert {stats.shard for stats in await client.shard_stats()} >= set(names)
            assert await client.trace("unknown") is None

    run(ask())


async def messages(bus: Bus, shard: str) -> dict[str, int]:
    """How many messages a shard has had, by the name of the endpoint."""
    answers = map(orjson.loads, [answer.data for answer in await bus.gather(f"$SRV.STATS.{subjects.SERVICE_SHARD}")])
    (mine,) = [answer for answer in answers if answer["metadata"]["shard"] == shard]
    return {one["name"]: one["num_requests"] for one in mine["endpoints"]}


def test_rows_that_are_given_back_together_go_in_one_message(server: NatsServer, model: Path, run: Run) -> None:
    async def work() -> None:
        async with shards(server.url, model, even_ranges(3, 1)) as running, coordinator(server.url, model) as serving:
            name = running[0].options.name
            serving.driver.carry_out([CloseRow(key, 1, name) for key in range(1, 30)])
            await serving.outbox.send()
            await serving.bus.flush()
            assert (await messages(serving.bus, name))["close"] == 1

    run(work())


def test_a_crowd_is_opened_by_fewer_messages_than_it_has_sessions(server: NatsServer, model: Path, run: Run, expected: list[int]) -> None:
    """What comes while a shard is asked goes out together, and every session has the tokens of a lone one."""
    count = 24

    async def work() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 2), rows=count) as running,
            coordinator(server.url, model) as serving,
            AsyncMeshClient(server.url) as client,
        ):
            few = {**LONG, "max_tokens": 6}
            answers = await asyncio.gather(*(client.generate(model=serving.manifest.name, **few) for _ in range(count)))
            assert [list(answer.tokens) for answer in answers] == [expected[:6]] * count
            for shard in running:
                sent = await messages(serving.bus, shard.options.name)
                assert sent["open-many"] >= 1
                assert sent["open"] + sent["open-many"] <= count // 2, sent

    run(work())
