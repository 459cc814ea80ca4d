"""The keys of a coordinator's file, each compared with a run without it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from running import Run
from serving import LONG, coordinator, shards
from waiting import Heard

from mesh.bus import Bus, BusOptions, Received
from mesh.client import AsyncMeshClient
from mesh.coordinator.core.expectations import ExpectedShards
from mesh.errors import Busy
from mesh.local.nats_server import NatsServer
from mesh.protocol import topics
from mesh.protocol.status import Heartbeat
from mesh.types import even_ranges


def test_requests_over_the_pool_are_answered_busy(server: NatsServer, model: Path, run: Run, expected: list[int]) -> None:
    async def work() -> None:
        room = 256 * (len(LONG["tokens"]) + LONG["max_tokens"])
        async with (
            shards(server.url, model, even_ranges(3, 1)),
            coordinator(server.url, model, pool_bytes=room),
            AsyncMeshClient(server.url, retries=0) as client,
        ):
            assert list((await client.generate(**LONG)).tokens) == expected  # just fits
            with pytest.raises(Busy, match=r"memory\.max_pool_size_gb"):
                await client.generate(**{**LONG, "max_tokens": 41})
            assert list((await client.generate(**LONG)).tokens) == expected

    run(work())


def test_beats_come_as_often_as_health_check_interval_says(server: NatsServer, model: Path, run: Run) -> None:
    async def heartbeats(interval_s: float, wanted: int) -> int:
        """How many there have been, from the start until `wanted` came and a question was answered."""
        count = 0
        enough = asyncio.Event()
        async with await Bus.connect(BusOptions((server.url,)), name="t") as bus, AsyncMeshClient(server.url, model="tiny") as client:

            async def on_heartbeat(received: Received) -> None:
                nonlocal count
                Heartbeat.parse(received.data)
                count += 1
                if count == wanted:
                    enough.set()

            await bus.subscribe(topics.HEARTBEATS.at("tiny"), on_heartbeat)
            await bus.flush()
            async with coordinator(server.url, model, health_check_interval_s=interval_s):
                await asyncio.wait_for(enough.wait(), 60)
                await client.health()
                return count

    async def work() -> None:
        assert await heartbeats(600.0, 1) == 1
        assert await heartbeats(0.02, 5) >= 5

    run(work())


def test_missing_layer_ranges_are_logged_and_in_the_statistics(
    server: NatsServer, model: Path, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mesh.coordinator")

    async def work() -> None:
        wanted: dict[str, Any] = {"expected": ExpectedShards(2, 1), "health_check_interval_s": 0.05}
        with Heard("mesh.coordinator") as log:
            async with coordinator(server.url, model, **wanted) as running:
                await log.wait("2 of 2 layer ranges have no shard")
                assert running.stats().expected == {"shards": 2, "lacking": "2 of 2 layer ranges have no shard"}
                async with shards(server.url, model, even_ranges(3, 2)):
                    await log.wait("all that were expected are there")
                    assert (running.stats().expected or {})["lacking"] == ""

    run(work())
