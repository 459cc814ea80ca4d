"""A shard whose clock is wrong: its part of a trace is where it was, and the clock is shown."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from waiting import until

from mesh.client import AsyncMeshClient
from mesh.local.mesh import LocalMesh, LocalOptions

FAKETIME = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
AHEAD_S = 2.0
BACK = "a shard that was started again is ready when a coordinator uses it"


@pytest.mark.skipif(FAKETIME is None, reason="no libfaketime here: apt-get install libfaketime")
def test_a_shard_that_is_two_seconds_ahead_stays_inside_its_steps(model: Path) -> None:
    async def ask(running: LocalMesh) -> None:
        async with AsyncMeshClient(options=running.bus) as client:

            async def ready() -> bool:
                pids = {name: process.pid for name, process in running.processes.items()}
                shards = (await client.status()).shards
                return {shard.pid for shard in shards if shard.state == "ready"} == {pids["shard-1"], pids["shard-2"]}

            await until(ready, because=BACK)
            answer = await client.generate(tokens=[5, 17, 33], max_tokens=20, temperature=0)
            trace = await client.trace(answer.session)
            assert trace is not None
            spans = {span["span"]: span for span in trace["spans"]}
            for span in spans.values():
                parent = spans.get(span.get("parent"))
                if parent is not None:
                    assert parent["start_ns"] <= span["start_ns"] <= span["end_ns"] <= parent["end_ns"]
            clocks = {span["instance"]: span["attributes"] for span in spans.values() if span["name"] == "stage"}
            for shard, ahead_s in (("shard-1", 0.0), ("shard-2", AHEAD_S)):
                assert clocks[shard]["mesh.clock_offset_s"] == pytest.approx(ahead_s, abs=clocks[shard]["mesh.clock_error_s"] + 0.001)

    with LocalMesh(LocalOptions(model, shards=2, rows=4, context=64, http=False)) as running:
        child = running._children["shard-2"]
        child.environment.update({"LD_PRELOAD": str(FAKETIME), "FAKETIME": f"+{AHEAD_S}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"})
        running.restart("shard-2")
        asyncio.run(ask(running))
