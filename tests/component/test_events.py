"""Events are stored and can be read again. What a dead shard left behind can be removed; a living shard cannot be forgotten."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from running import Run
from serving import connect, coordinator, shards

from mesh.bus import Bucket, EventLog, announce, keep_events
from mesh.client import AsyncMeshClient
from mesh.errors import BadRequest, Unavailable
from mesh.local.nats_server import NatsServer
from mesh.protocol import subjects, topics
from mesh.shard.forget import forget
from mesh.shard.placing import RangeClaim, RangeClaims
from mesh.types import even_ranges


async def read(log: EventLog, **which: Any) -> list[str]:
    return [event.detail async for event in log.events(**which)]


def test_events_are_kept_and_read_again(run: Run, tmp_path: Path) -> None:
    async def work(server: NatsServer) -> None:
        async with await connect(server) as bus:
            log = EventLog(bus)
            with pytest.raises(Unavailable, match="no events are kept"):
                await read(log)
            await keep_events(EventLog(bus))
            await keep_events(EventLog(bus))
            assert await read(log) == []
            for number in range(5):
                await announce(bus, "joined", f"s{number}", model="m", detail=str(number), layers="0-1")
            await bus.publish(topics.EVENTS.at("left").subject, b"no event")
            await announce(bus, "left", "s", detail="5")
            await bus.flush()
            assert await read(log) == ["0", "1", "2", "3", "4", "5"]
            assert await read(log, last=3) == ["4", "5"], "one of the last three is none"
            assert await read(log, last=100) == ["0", "1", "2", "3", "4", "5"]
            third = [event async for event in log.events()][2]
            assert third.who == "s2" and third.data == {"layers": "0-1"}
            assert await read(log, since_unix_s=third.at_unix_s + 3600) == []
            assert len(await read(log, since_unix_s=third.at_unix_s - 3600)) == 6

    with NatsServer.start(directory=tmp_path) as server:
        run(work(server))


def test_a_follower_misses_no_event_when_the_server_restarts(run: Run, tmp_path: Path) -> None:
    first = NatsServer.start(directory=tmp_path)

    async def work() -> NatsServer:
        async with await connect(first) as bus:
            await keep_events(EventLog(bus))
            await announce(bus, "joined", "s", detail="before")
            seen: asyncio.Queue[str] = asyncio.Queue()

            async def follow() -> None:
                async for event in EventLog(bus).events(follow=True):
                    seen.put_nowait(event.detail)

            following = asyncio.create_task(follow())
            assert await asyncio.wait_for(seen.get(), 60) == "before"
            await announce(bus, "ready", "s", detail="now")
            assert await asyncio.wait_for(seen.get(), 60) == "now"
            back = asyncio.Event()
            bus.on_change(lambda connected: back.set() if connected else None)
            first.kill()
            second = NatsServer.start(directory=tmp_path, port=first.port)
            await asyncio.wait_for(back.wait(), 60)
            async with await connect(second) as other:
                await announce(other, "left", "s", detail="after")
            assert await asyncio.wait_for(seen.get(), 60) == "after"
            following.cancel()
            return second

    run(work()).stop()
    first.stop()


def test_shards_and_coordinators_announce_what_they_do(run: Run, tmp_path: Path, model: Path) -> None:
    async def work(server: NatsServer) -> None:
        async with shards(server.url, model, even_ranges(3, 1)), coordinator(server.url, model), AsyncMeshClient(server.url):
            pass
        async with AsyncMeshClient(server.url) as client:
            kinds = [event.kind async for event in client.events()]
            assert sorted(kinds) == sorted(["joined", "ready", "coordinator_joined", "coordinator_left", "left"])
            assert kinds.index("joined") < kinds.index("ready") < kinds.index("left")

    with NatsServer.start(directory=tmp_path) as server:
        run(work(server))


def test_a_ghost_is_forgotten_and_one_that_lives_is_not(run: Run, server: NatsServer, model: Path) -> None:
    async def work() -> None:
        async with await connect(server) as bus, shards(server.url, model, even_ranges(3, 1)) as running:
            name = running[0].options.name
            leases = Bucket(bus, subjects.KV_SHARDS, ttl_s=subjects.LEASE_TTL_S)
            placement = Bucket(bus, subjects.KV_PLACEMENT, durable=True)
            with pytest.raises(BadRequest, match="lives"):
                await forget(bus, name)
            with pytest.raises(BadRequest, match="nothing is known"):
                await forget(bus, "nobody")
            ghost = running[0].lease(0.0).model_copy(update={"shard": "ghost"})
            await leases.put("ghost", ghost.to_bytes())
            claims = [RangeClaim(shard=shard, layers_start=0, layers_end=1, at_unix_s=1.0) for shard in ("ghost", "other")]
            await placement.put("claims.tiny", RangeClaims(claims=tuple(claims)).to_bytes())
            gone = await forget(bus, "ghost")
            assert gone.lease == ghost and gone.claims == ("tiny",)
            assert await leases.get("ghost") is None and await leases.get(name) is not None
            entry = await placement.get("claims.tiny")
            assert entry is not None and [claim.shard for claim in RangeClaims.parse(entry.value or b"").claims] == ["other"]
            await leases.put("junk", b"of another version")
            assert (await forget(bus, "junk")).lease is None
            silent = await bus.subscribe(topics.STATS.at("mute"), lambda received: asyncio.sleep(0))
            await leases.put("mute", ghost.model_copy(update={"shard": "mute"}).to_bytes())
            with pytest.raises(BadRequest, match="--force"):
                await forget(bus, "mute")
            assert (await forget(bus, "mute", force=True)).lease is not None
            await silent.stop()
            await placement.delete("claims.tiny")

    run(work())
