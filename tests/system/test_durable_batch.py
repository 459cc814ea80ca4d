"""A batch outlives every process: nats-server, coordinators and shards are killed in the middle of it, and started again."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from oracle import Oracle
from running import Run

from mesh.bus import Bus, BusOptions
from mesh.client import AsyncMeshClient
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.local.nats_server import NatsServer
from mesh.protocol.subjects import STREAM_BATCH

COUNT = 60


def command(url: str, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "mesh.cli", *arguments, "--nats", url], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.mark.slow
def test_a_batch_survives_the_death_of_every_process_and_is_answered_once(model: Path, oracle: Oracle, run: Run, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"tokens": [index, 2 * index % 90, 7], "max_tokens": 30, "ignore_eos": True} for index in range(COUNT - 1)
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in [*lines, {"tokens": [1], "max_tokens": 4, "temperature": 500.0}]))
    first = NatsServer.start(directory=tmp_path / "nats")

    async def some_done(url: str, least: int) -> int:
        async with AsyncMeshClient(url) as client, asyncio.timeout(120):
            while (status := await client.batch_status("mine")).done < least:
                pass
        return status.done

    async def queue_empty(url: str) -> None:
        """A coordinator may be killed after it stored a result and before it acknowledged it. The queue then repeats it."""
        async with await Bus.connect(BusOptions((url,)), name="looking") as bus, asyncio.timeout(120):
            while (await bus.client.jetstream().stream_info(STREAM_BATCH)).state.messages:
                await asyncio.sleep(0.05)  # a stream tells nobody that it is empty

    def kill(mesh: LocalMesh, server: NatsServer) -> None:
        for process in mesh.processes.values():
            process.kill()
        server.kill()

    # one shard and two rows: slow enough to be in the middle of it
    options = LocalOptions(model=model, coordinators=2, rows=2, context=64, nats=first.url, logs=tmp_path / "logs")
    with LocalMesh(options) as mesh:
        assert command(mesh.url, "batch", "submit", str(file), "--id", "mine", "--model", "tiny").strip() == "mine"
        done = run(some_done(mesh.url, 3))
        kill(mesh, first)
        assert done < COUNT - 1, "it was over before it was disturbed"
        with NatsServer.start(directory=tmp_path / "nats", port=first.port) as second:
            status = json.loads(command(mesh.url, "batch", "status", "mine", "--json"))
            assert status["total"] == COUNT and done <= status["done"] < COUNT
            assert command(mesh.url, "batch", "submit", str(file), "--id", "mine", "--model", "tiny").strip() == "mine"
            for name in mesh.processes:
                mesh.restart(name)
            answers = [json.loads(line) for line in command(mesh.url, "batch", "result", "mine", "--wait").splitlines()]
            assert [answer["index"] for answer in answers] == list(range(COUNT))
            for line, answer in zip(lines, answers, strict=False):
                assert answer["tokens"] == oracle.greedy(line["tokens"], 30)
            assert answers[-1]["state"] == "failed" and "temperature" in answers[-1]["error"]
            assert f"{COUNT - 1} done, 1 failed, 0 running, 0 waiting" in command(mesh.url, "batch", "status", "mine")
            run(queue_empty(mesh.url))
            assert "no batch" in command(mesh.url, "batch", "status", "another", code=2)
            mesh.stop()
            assert second.running
    first.stop()


def test_a_file_that_is_no_batch_is_refused_in_one_line(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "requests.jsonl"
    for text, why in (("", "give 1 to"), ("7", "line 1"), ('"a"\n{', "line 2"), ('{"colour": 1}', "line 1: colour")):
        file.write_text(text)
        with NatsServer.start() as server:
            said = command(server.url, "batch", "submit", str(file), "--model", "tiny", code=2)
        assert why in said and said.count("\n") == 1, said
