"""`mesh up` and the commands that find it: what they print, who dies and is started again, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from oracle import Oracle
from running import Run
from waiting import Talking

from mesh.bus import Bus, BusOptions
from mesh.client import AsyncMeshClient
from mesh.errors import Denied, MeshError
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
        self.metrics = re.findall(r"(http://\S+/metrics) \((\S+)\)", self.wait(r"metrics (http.*)")[1])
        found = self.wait(r"NATS (nats://[^,\s]+), user (\S+), password in (\S+)")
        self.url, self.file = found[1], Path(found[3])
        self.options = BusOptions((self.url,), user=found[2], password=self.file.read_text().strip())
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
        (1, "coordinator-1", "coordinator-1.yaml"),
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
            AsyncMeshClient(options=up.options, model="tiny") as client,
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
    assert set(answer) == {"tokens", "text", "finish_reason", "usage", "timing", "trace"}
    status = json.loads(up.command("status", "--json"))
    assert status["ready"] and [shard["layers_start"] for shard in status["shards"]] == [0, 2]
    assert "ready" in up.command("status")
    said = {shard["shard"]: shard["metrics"] for shard in status["shards"]} | {"coordinator-1": status["coordinators"][0]["metrics"]}
    assert {name: url for url, name in up.metrics} == said
    assert all(httpx.get(url).status_code == 200 for url in said.values())
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


def test_every_command_finds_the_mesh_that_is_up(up: Up, model: Path, tmp_path: Path) -> None:
    """Also those that change it, those that serve, and those that are given its address alone."""
    assert "tiny is in the mesh" in up.command("push", str(model), "--quiet")
    assert "layers 0-2" in up.command("pull", "tiny", str(tmp_path / "copy"), "--layers", "0-2", "--quiet")
    file = tmp_path / "requests.jsonl"
    file.write_text('{"tokens": [5], "max_tokens": 2}\n')
    id = up.command("batch", "submit", str(file), "--wait").strip()
    assert "done" in up.command("batch", "status", id) and "1 done" in up.command("batch", "cancel", id)
    assert json.loads(up.command("batch", "result", id))["state"] == "done"
    assert up.command("batch", "dead") == ""
    assert json.loads(up.command("generate", "--tokens", "5", "--max-tokens", "2", "--json", "--nats", up.url))["tokens"]
    with Talking([*MESH, "gateway", "--http-port", "0"], env=up.environment) as gateway:
        url = gateway.wait(r"HTTP on (http://[^\s\"]+)")[1]
        body = {"tokens": [5], "max_tokens": 2, "model": "tiny"}
        assert httpx.post(f"{url}/api/v1/inference", json=body, timeout=60).status_code == 200
    with Talking([*MESH, "join", "--quiet", "--http-port", "0", "--name", "late"], env=up.environment) as late:
        late.wait("ready: ")
    assert up.command("load", "shard-1", "--layers", "0-3", code=2) == ""
    assert "shard-2 is draining" in up.command("drain", "shard-2", "--force")


def test_the_server_of_mesh_up_is_its_users_alone(up: Up, run: Run) -> None:
    password = up.options.password
    assert password is not None and len(password) > 40
    assert up.file.stat().st_mode & 0o777 == 0o600 and up.file.with_suffix(".json").stat().st_mode & 0o777 == 0o600
    assert password not in up.said

    async def connect(options: BusOptions) -> None:
        async with await Bus.connect(options, name="t", timeout_s=30) as bus:
            await bus.flush()

    run(connect(up.options))
    for wrong in (BusOptions((up.url,)), BusOptions((up.url,), user="mesh", password="mesh")):
        with pytest.raises(Denied):
            run(connect(wrong))
    for pid in (up.process.pid, *up.children()):
        assert password not in Path(f"/proc/{pid}/cmdline").read_text()
    up.process.send_signal(signal.SIGINT)
    assert up.ended(END_S) == 130
    assert not up.file.exists() and not up.file.with_suffix(".json").exists()


COMMANDS = [
    "drain shard-1",
    "load shard-1 --layers 0-1",
    "push MODEL --quiet",
    "pull tiny COPY --quiet",
    "join --quiet --http-port 0",
    "gateway --http-port 0",
    "status",
    "events",
    "batch status x",
    "batch cancel x",
    "batch dead",
    "forget shard-1",
    "bench",
    "generate hello",
    "chat",
]


def test_where_no_server_answers_every_command_says_so_in_one_line(model: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: whoever connects is refused
        taken.bind(("127.0.0.1", 0))
        url = f"nats://127.0.0.1:{taken.getsockname()[1]}"
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "MESH_NATS_URLS": url}
        running = {}
        for line in COMMANDS:
            words = line.replace("MODEL", str(model)).replace("COPY", str(tmp_path / "copy")).split()
            pipe = subprocess.PIPE
            process = subprocess.Popen([*MESH, *words], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=environment)
            running[line] = process
        for line, process in running.items():
            _, said = process.communicate(timeout=READY_S)
            last = [each for each in said.splitlines() if "HTTP on" not in each]
            assert process.returncode == 2, (line, said)
            assert len(last) == 1 and last[0].startswith("mesh: no NATS server answers at"), (line, said)


def test_a_mesh_that_cannot_start_says_why(model: Path, tmp_path: Path) -> None:
    with Up(model, tmp_path, "--memory", "1kB") as up:
        assert up.ended() == 2
        assert "need" in up.said and "are allowed" in up.said


def test_a_secure_mesh_is_found_by_commands_and_each_child_has_its_own_key(model: Path, tmp_path: Path, run: Run) -> None:
    with Up(model, tmp_path, "--shards", "2", "--secure", "--no-http") as up:
        url = up.wait(r"NATS (nats://\S+), TLS, user operator")[1]
        up.wait("Ctrl-C ends it")
        assert "serving" in up.command("status")
        assert up.command("generate", "hello", "--max-tokens", "3").strip()
        doctor = json.loads(up.command("doctor", "--json", "--no-generate"))
        assert [one["level"] for one in doctor["findings"] if one["section"] == "permissions"] == ["ok"]
        keys = set()
        for name in ("shard-1.yaml", "shard-2.yaml", "coordinator-1.yaml"):
            config = Path(re.search(r"--config\0(\S+?)\0", Path(f"/proc/{up.child(name)}/cmdline").read_text())[1])  # type: ignore[index]
            keys |= set(re.findall(r"nkey_seed_file: (\S+)", config.read_text()))
        assert len(keys) == 3 and not any("operator" in key for key in keys)
        assert all(Path(key).stat().st_mode & 0o077 == 0 for key in keys)
        for options in (BusOptions((url,)), BusOptions((url,), user="mesh", password="x")):
            with pytest.raises(MeshError):
                run(Bus.connect(options, name="stranger", timeout_s=5))
