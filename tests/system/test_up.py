"""`mesh up` and the commands that find it: what they print, and that nothing is left behind however it ends."""

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

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="children die with their parent by PR_SET_PDEATHSIG, which is Linux's")

READY_S, END_S = 240.0, 30.0
MESH = [sys.executable, "-m", "mesh.cli"]


class Up:
    """A `mesh up` in a process of its own."""

    def __init__(self, model: Path, folder: Path, *arguments: str) -> None:
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder), "COLUMNS": "200"}
        self.environment.pop("MESH_NATS_URLS", None)
        command = [*MESH, "up", str(model), "--rows", "2", "--context", "64", *arguments]
        # unbuffered, so that select tells the truth about what can be read
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, env=self.environment)

    def wait_ready(self) -> None:
        assert self.process.stderr is not None
        said = []
        deadline = time.monotonic() + READY_S
        while True:
            readable, _, _ = select.select([self.process.stderr], [], [], max(deadline - time.monotonic(), 0))
            line = self.process.stderr.readline().decode() if readable else ""
            said.append(line)
            assert line, f"mesh up was not ready: {''.join(said)}"
            if "Ctrl-C ends it" in line:
                return

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


@pytest.fixture
def up(model: Path, tmp_path: Path) -> Iterator[Up]:
    running = Up(model, tmp_path, "--shards", "2")
    try:
        running.wait_ready()
        yield running
    finally:
        running.process.kill()
        running.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_nothing_is_left_of_mesh_up(up, number):
    children = up.children()
    assert len(children) == 4  # nats-server, two shards, a coordinator
    handles = [os.pidfd_open(pid) for pid in children]
    up.process.send_signal(number)
    deadline = time.monotonic() + END_S
    try:
        for handle in handles:  # readable when the process has ended
            readable, _, _ = select.select([handle], [], [], max(deadline - time.monotonic(), 0))
            assert readable, "a child outlived mesh up"
    finally:
        for handle in handles:
            os.close(handle)
    assert up.process.wait(END_S) == (-signal.SIGKILL if number == signal.SIGKILL else 130)


def test_commands_find_the_mesh_that_is_up(up, oracle):
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
    assert report["bare_hop_s"] > 0 and report["step"]["hop_s"] > 0
    assert report["first_token_s"]["p50"] <= report["first_token_s"]["p99"]
    assert up.command("generate", "--tokens", "5,1700", code=2) == ""
    kinds = [json.loads(line)["kind"] for line in up.command("events", "--json").splitlines()]
    assert kinds.count("ready") == 2 and "coordinator_joined" in kinds
    assert len(up.command("events", "--last", "2").splitlines()) == 2
    assert up.command("forget", "shard-1", code=2) == "", "it lives"
    first, second, end = up.command("chat", "--max-tokens", "4", said="hi\n/new\nhi\n/quit\n").split("\n")
    assert first == second and len(first) >= 4 and end == ""


def test_a_mesh_that_cannot_start_says_why(model, tmp_path):
    up = Up(model, tmp_path, "--memory", "1kB")
    _, said = up.process.communicate(timeout=READY_S)
    assert up.process.returncode == 2
    assert b"need" in said and b"are allowed" in said
