"""Every command finds the `mesh up` of this machine and its password by itself, and a `mesh up` of a source imports it first."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from clusters import free_ports
from tiny_mesh_model import make_source
from unconnected import unconnected
from waiting import Talking

MESH = [sys.executable, "-m", "mesh.cli"]
COMMAND_S = 120.0
SHARD = """
shard: {shard_id: 9}
model: {shard_path: "models:source", layers_start: 0, layers_end: 2}
resources: {max_memory_gb: 1}
performance: {batch_size: 2, max_sequence_length: 64}
health: {port: PORT}
"""


class Machine:
    """A machine on which `mesh up` runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = unconnected() | {"XDG_RUNTIME_DIR": str(folder), "XDG_CONFIG_HOME": str(folder), "COLUMNS": "200"}

    def run(self, *words: str, code: int = 0) -> str:
        done = subprocess.run([*MESH, *words], capture_output=True, text=True, cwd=self.folder, env=self.environment, timeout=COMMAND_S)
        assert done.returncode == code, f"{words}: {done.stdout}{done.stderr}"
        assert code == 0 or len(done.stderr.splitlines()) == 1, f"an error is one line: {done.stderr}"
        return done.stdout + done.stderr

    @contextmanager
    def going(self, *words: str) -> Iterator[Talking]:
        with Talking([*MESH, *words], cwd=self.folder, env=self.environment) as talking:
            yield talking
            talking.process.terminate()
            talking.ended()


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    machine = Machine(tmp_path_factory.mktemp("machine"))
    make_source(machine.folder / "source")
    with machine.going("up", "source", "--shards", "2", "--rows", "2", "--context", "64") as up:
        up.wait("importing source into source.mesh")
        up.wait("Ctrl-C ends it")
        yield machine


@pytest.mark.slow
def test_every_command_finds_the_mesh(machine: Machine) -> None:
    assert "serving" in machine.run("status")
    assert machine.run("generate", "Rain?", "--max-tokens", "4")
    assert "ready" in machine.run("events")
    assert "is in the mesh" in machine.run("push", "source.mesh", "--quiet")
    listed = machine.run("models")
    assert re.search(r"^source +3 +32 +.* the mesh, 2 shards$", listed, re.MULTILINE), listed
    assert "layers 0-2" in machine.run("pull", "source", "pulled", "--layers", "0-2", "--quiet")
    assert "no batches" in machine.run("batch", "list")
    for words in (("drain", "shard-1"), ("load", "shard-1", "--layers", "0-1")):
        said = machine.run(*words, code=2)
        assert "layers 0-2 would be without a shard" in said and "`mesh join --model source --layers 0-2`" in said and "--force" in said
    assert "2 shards serve source" in machine.run("models", "remove", "source", code=2)
    with machine.going("gateway", "--http-port", "0", "--metrics-port", "0") as gateway:
        gateway.wait("HTTP on http://127.0.0.1:")
    (port,) = free_ports(1)
    (machine.folder / "shard.yaml").write_text(SHARD.replace("PORT", str(port)))
    with machine.going("shard", "--config", "shard.yaml", "--quiet", "--metrics-port", "0") as shard:
        shard.wait("ready: layers 0-2")
        assert httpx.get(f"http://127.0.0.1:{port}/api/v1/health", timeout=30).json()["state"] == "ready", "its port of health"
    with machine.going("join", "--quiet", "--http-port", "0", "--metrics-port", "0", "--name", "joined", "--layers", "0-2") as joined:
        joined.wait("ready: layers 0-2")
        assert "shard-1 is draining" in machine.run("drain", "shard-1"), "another shard serves its layers now"


@pytest.mark.slow
def test_without_a_mesh_a_command_says_so_in_one_line(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    lines = (("status",), ("join", "--quiet"), ("push", str(tmp_path)), ("drain", "shard-1"))
    with ThreadPoolExecutor(len(lines)) as pool:  # each waits for a server
        answers = list(pool.map(lambda words: machine.run(*words, code=2), lines))
    for said in answers:
        assert said.startswith("mesh: ") and "Traceback" not in said
