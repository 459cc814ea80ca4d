"""What becomes of a mesh whose JetStream stands still while its messages flow: nothing that a client notices."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

from clusters import cluster, leader_of, suspended
from running import Run
from serving import LONG, coordinator, shards
from waiting import until

from mesh.bus import Bus, BusOptions
from mesh.client import AsyncMeshClient
from mesh.errors import ServiceError
from mesh.gateway.health import HealthMonitor
from mesh.gateway.known import KnownModels
from mesh.local.nats_server import NatsServer
from mesh.protocol.subjects import LEASE_TTL_S
from mesh.types import even_ranges

LONGER_THAN_A_LEASE_S = LEASE_TTL_S + 4.0
GAP_S = 1.0
"""The longest time between two tokens. A machine that runs other tests beside this one needs some of it."""
ELECTED = "a cluster tells nobody when it has a leader"


async def streams(client: AsyncMeshClient, expected: list[int], seconds: float) -> float:
    """Generate for so long, at least once; every answer is compared. Returns the longest time without a token."""
    until_s, last, longest, once = time.monotonic() + seconds, time.monotonic(), 0.0, False
    while not once or time.monotonic() < until_s:
        once = True
        tokens: list[int] = []
        async with client.stream(**LONG, temperature=0.0) as stream:
            async for chunk in stream:
                if chunk.token is not None:
                    tokens.append(chunk.token.id)
                longest, last = max(longest, time.monotonic() - last), time.monotonic()
        assert tokens == expected
    return longest


async def made(bus: Bus, stream: str) -> bool:
    try:
        info = await bus.client.jetstream().stream_info(stream)
    except Exception:  # no leader yet
        return False
    return info.cluster is not None and info.cluster.leader is not None


def test_tokens_flow_while_the_leader_of_the_leases_stands_still(run: Run, tmp_path: Path, model: Path, expected: list[int]) -> None:
    async def work(servers: list[NatsServer]) -> None:
        url = servers[0].url
        async with (
            await Bus.connect(BusOptions((url,)), name="test") as bus,
            shards(url, model, even_ranges(3, 2)),
            coordinator(url, model) as serving,
            AsyncMeshClient(url, model="tiny") as client,
        ):
            await until(lambda: made(bus, "KV_mesh_shards"), because=ELECTED)
            leader = await leader_of(bus, "KV_mesh_shards", servers)
            if leader is servers[0]:  # everything is connected to it: let another one lead
                await bus.ask("$JS.API.STREAM.LEADER.STEPDOWN.KV_mesh_shards", b"", timeout_s=5)
                leader = await until(lambda: other_leader(bus, servers), because=ELECTED)
            await streams(client, expected, 0.0)
            before = dict(serving.core.counters.as_dict())
            with suspended(leader):
                assert await streams(client, expected, LONGER_THAN_A_LEASE_S) < GAP_S
            after = serving.core.counters.as_dict()
            assert {name: after[name] - before[name] for name in ("failed", "failovers", "suspected")} == dict.fromkeys(
                ("failed", "failovers", "suspected"), 0
            )

    with cluster(tmp_path) as servers:
        run(work(servers))


async def other_leader(bus: Bus, servers: list[NatsServer]) -> NatsServer | None:
    try:
        leader = await leader_of(bus, "KV_mesh_shards", servers)
    except Exception:  # it is being chosen
        return None
    return leader if leader is not servers[0] else None


def test_with_one_server_of_three_the_mesh_serves_and_says_so(run: Run, tmp_path: Path, model: Path, expected: list[int]) -> None:
    """Tokens, new sessions, a coordinator that starts only now, health and status: all without JetStream."""

    async def work(servers: list[NatsServer]) -> None:
        url = servers[0].url
        async with (
            await Bus.connect(BusOptions((url,)), name="test") as bus,
            shards(url, model, even_ranges(3, 2)) as running,
            AsyncMeshClient(url, model="tiny") as client,
        ):
            names = {shard.options.name for shard in running}
            await until(lambda: made(bus, "KV_mesh_shards"), because=ELECTED)
            async with coordinator(url, model):
                await streams(client, expected, 0.0)
                for server in servers[1:]:
                    server.kill()
                assert await streams(client, expected, LONGER_THAN_A_LEASE_S) < GAP_S
                monitor = HealthMonitor(client, KnownModels(client), default="tiny")
                began = time.monotonic()
                assert (await monitor.check()).ready
                assert time.monotonic() - began < 3.0
                status = await client.status()
                assert {lease.shard for lease in status.shards} == names and not status.jetstream
                assert (await client.health()).ready
            began = time.monotonic()
            async with coordinator(url, model) as later:
                assert time.monotonic() - began < 10.0
                assert {replica.shard for replica in later.core.replicas()} == names
                assert await streams(client, expected, 0.0) < GAP_S

    with cluster(tmp_path) as servers:
        run(work(servers))


def test_a_shard_that_says_no_lease_and_answers_stays(run: Run, server: NatsServer, model: Path, expected: list[int]) -> None:
    async def work() -> None:
        async with (
            shards(server.url, model, even_ranges(3, 2)) as running,
            coordinator(server.url, model) as serving,
            AsyncMeshClient(server.url, model="tiny") as client,
        ):
            for task in running[0]._lease._tasks:
                task.cancel()
            before = serving.core.counters.restarts
            assert await streams(client, expected, LONGER_THAN_A_LEASE_S) < GAP_S
            assert serving.core.knows(running[0].options.name) and serving.core.counters.restarts == before
            with_it = asyncio.get_running_loop().time()
            running[0].stop()
            await until(lambda: not serving.core.knows(running[0].options.name), because="a core tells nobody whom it knows")
            assert asyncio.get_running_loop().time() - with_it < LEASE_TTL_S

    try:
        run(work())
    except ServiceError as error:
        raise AssertionError(error) from error
