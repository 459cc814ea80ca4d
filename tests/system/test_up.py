"""`mesh up` and the commands that find it: what they print, who dies and is started again, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from oracle import Oracle
from running import Run
from waiting import Talking

from mesh.client import AsyncMeshClient
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children die with their parent by PR_SET_PDEATHSIG, which is Linux's")

READY_S, END_S = 240.0, 30.0
MESH = [sys.executable, "-m", "mesh.cli"]


class Up(Talking):
    """A `mesh up` in a process of its own."""

    def __init__(self, model: Path, folder: Path, *arguments: str) -> None:
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "COLUMNS": "200"}
        self.environment.pop("MESH_NATS_URLS", None)
        super().__init__([*MESH, "up", str(model), "--rows", "2", "--context", "64", *arguments], env=self.environment)

    def wait_ready(self) -> None:
        self.url = self.wait("NATS (nats:.*)")[1]
        self.wait("Ctrl-C ends it")

    def command(self, *arguments: str, code: int = 0, said: str = "") -> str:
        done = subprocess.run([*MESH, *arguments], capture_output=True, input=said, text=True, env=self.environment, timeout=READY_S)
        assert done.returncode == code, done.stderr
        return done.stdout

    def children(self) -> list[int]:
        """Process ids of everything below it."""
        found, waiting = [], [self.process.pid]
        while waiting:
            pid = waiting.pop()
            below = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
            found.extend(below)
            waiting.extend(below)
        return found

    def child(self, name: str) -> int:
        """The process id of the one whose command says so."""
        found = [pid for pid in self.children() if name in Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")]
        assert len(found) == 1
        return found[0]


@pytest.fixture
def up(model: Path, tmp_path: Path) -> Iterator[Up]:
    with Up(model, tmp_path, "--shards", "2") as running:
        running.wait_ready()
        yield running


def end(up: Up, number: signal.Signals) -> None:
    """By this signal; nothing is left."""
    handles = [os.pidfd_open(pid) for pid in up.children()]
    assert len(handles) >= 4  # nats-server, two shards, a coordinator
    up.process.send_signal(number)
    deadline = time.monotonic() + END_S
    try:
        for handle in handles:  # readable when the process has ended
            readable, _, _ = select.select([handle], [], [], max(deadline - time.monotonic(), 0))
            assert readable, "a child outlived mesh up"
    finally:
        for handle in handles:
            os.close(handle)
    assert up.ended(END_S) == (-signal.SIGKILL if number == signal.SIGKILL else 130)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_nothing_is_left_of_mesh_up(up: Up, number: signal.Signals) -> None:
    end(up, number)


@pytest.mark.parametrize(
    ("replicas", "name", "command"),
    [
        (1, "shard-2", "shard-2.yaml"),
        (2, "shard-1", "shard-1.yaml"),
        (1, "coordinator-1", "coordinator.yaml"),
        (1, "nats-server", "embedded.conf"),
    ],
    ids=["a shard", "one of two shards", "the coordinator", "the nats-server"],
)
def test_a_process_that_is_killed_is_started_again_and_streams_go_on(
    model: Path, tmp_path: Path, run: Run, replicas: int, name: str, command: str
) -> None:
    prompt, most = [5, 17, 33], 200
    whole = Pipeline.load(model, context=256).complete(prompt, SamplingParams(temperature=0.0), max_tokens=most).ids

    async def stream_through_a_death(up: Up) -> None:
        seen: list[int] = []
        pid = up.child(command)
        async with (
            AsyncMeshClient(up.url, model="tiny") as client,
            client.stream(tokens=prompt, max_tokens=most, temperature=0.0, ignore_eos=True) as stream,
        ):
            async for chunk in stream:
                if chunk.token is None:
                    continue
                assert chunk.index == len(seen)
                seen.append(chunk.token.id)
                if len(seen) == 10:
                    os.kill(pid, signal.SIGKILL)
        assert seen == whole
        up.wait(f"{name} was ended by SIGKILL; it is started again in 0.5 s")
        again = int(up.wait(f"{name} is started again, process (.*)")[1])
        assert again != pid and again in up.children()

    with Up(model, tmp_path, "--shards", "2", "--replicas", str(replicas), "--context", "256") as up:
        up.wait_ready()
        before = len(up.children())
        run(stream_through_a_death(up))
        assert len(up.children()) == before
        end(up, signal.SIGKILL)


def test_commands_find_the_mesh_that_is_up(up: Up, oracle: Oracle) -> None:
    answer = json.loads(up.command("generate", "--tokens", "5,17,33", "--max-tokens", "8", "--json"))
    assert answer["tokens"] == oracle.greedy([5, 17, 33], 8)
    assert set(answer) == {"tokens", "text", "finish_reason", "usage", "timing"}
    status = json.loads(up.command("status", "--json"))
    assert status["ready"] and [shard["layers_start"] for shard in status["shards"]] == [0, 2]
    assert "ready" in up.command("status")
    report = json.loads(
        up.command("bench", "--requests", "6", "--concurrency", "3", "--prompt-tokens", "2-9", "--max-tokens", "8", "--json")
    )
    assert report["failed"] == 0 and report["tokens"] == 48 and report["stages"] == 2
    assert report["bare_hop_s"] > 0 and report["bare_hop_between_stages_s"] > 0 and report["step"]["hop_s"] > 0
    assert report["first_token_s"]["p50"] <= report["first_token_s"]["p99"]
    assert up.command("generate", "--tokens", "5,1700", code=2) == ""
    kinds = [json.loads(line)["kind"] for line in up.command("events", "--json").splitlines()]
    assert kinds.count("ready") == 2 and "coordinator_joined" in kinds
    assert len(up.command("events", "--last", "2").splitlines()) == 2
    assert up.command("forget", "shard-1", code=2) == "", "it lives"
    first, second, end = up.command("chat", "--max-tokens", "4", said="hi\n/new\nhi\n/quit\n").split("\n")
    assert first == second and len(first) >= 4 and end == ""


def test_a_mesh_that_cannot_start_says_why(model: Path, tmp_path: Path) -> None:
    with Up(model, tmp_path, "--memory", "1kB") as up:
        assert up.ended() == 2
        assert "need" in up.said and "are allowed" in up.said
