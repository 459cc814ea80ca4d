"""A mesh of processes that have nothing but their configuration files, on a server that demands TLS and a password."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from authority import Authority
from waiting import Talking

from mesh.errors import ModelNotFound
from mesh.host.process import dying_with_parent
from mesh.local.nats_server import NatsServer

MESH = [sys.executable, "-m", "mesh.cli"]
READY_S = 240.0
COORDINATOR = {"coordinator": {"listen_port": 0}, "distributed": {"shards_count": 2}}


class Site:
    """A folder with configuration files, and the processes started from it."""

    def __init__(self, folder: Path, server: NatsServer, authority: Authority) -> None:
        self.folder = folder
        self.nats = {"urls": [server.url], "user": "mesh", "tls_ca_file": str(authority.ca)}
        self.environment = {**os.environ, "MESH_CACHE_DIR": str(folder / "cache"), "MESH_NATS_PASSWORD": "right"}
        self.flags = ["--nats", server.url, "--nats-user", "mesh", "--nats-ca", str(authority.ca)]

    def write(self, name: str, content: dict[str, Any]) -> Path:
        path = self.folder / name
        path.write_text(yaml.safe_dump({"nats": self.nats, **content}))
        return path

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*MESH, *arguments], capture_output=True, text=True, env=self.environment, timeout=READY_S)

    @contextmanager
    def start(self, *arguments: str) -> Iterator[Talking]:
        """A process that is asked to end with the block."""
        with Talking(dying_with_parent([*MESH, *arguments]), env=self.environment) as talking:
            yield talking
            talking.process.terminate()
            talking.ended()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    authority = Authority(tmp_path / "tls")
    pair = authority.issue("server")
    conf = tmp_path / "server.conf"
    tls = f'tls {{ cert_file: "{pair.cert}", key_file: "{pair.key}" }}'
    conf.write_text(f'{tls}\nauthorization {{ user: mesh, password: right }}\nmax_payload: 8MB\njetstream {{ store_dir: "./jetstream" }}\n')
    with NatsServer.start(config=conf, directory=tmp_path / "server") as server:
        yield Site(tmp_path, server, authority)


@pytest.mark.slow
def test_coordinator_and_shards_need_nothing_but_their_files(site: Site, model: Path, oracle: Any) -> None:
    coordinator = site.write("coordinator.yaml", {**COORDINATOR, "model": {"total_layers": 3, "vocab_size": 96}})
    shards = [
        site.write(
            f"shard-{number}.yaml",
            {
                "shard": {"shard_id": number},
                "model": {"shard_path": "models:tiny", "layers_start": start, "layers_end": stop},
                "resources": {"max_memory_gb": 1},
                "performance": {"batch_size": 2, "max_sequence_length": 64},
                "logging": {"level": "debug", "file": str(site.folder / "logs" / f"shard-{number}.log")},
            },
        )
        for number, (start, stop) in enumerate(((0, 2), (2, 3)), 1)
    ]
    with site.start("coordinator", "--config", str(coordinator)) as serving:
        serving.wait("the mesh has no model yet")  # it waits
        pushed = site.run("push", str(model), "--quiet", *site.flags)
        assert pushed.returncode == 0, pushed.stderr
        with (
            site.start("shard", "--config", str(shards[0]), "--quiet") as first,
            site.start("shard", "--config", str(shards[1]), "--quiet") as second,
        ):
            serving.wait("ready: ")
            prompt = [5, 17, 33]
            answer = site.run("generate", "--tokens", "5,17,33", "--max-tokens", "12", "--ignore-eos", "--json", *site.flags)
            assert answer.returncode == 0, answer.stderr
            assert json.loads(answer.stdout)["tokens"] == oracle.greedy(prompt, 12)
    kept = list((site.folder / "cache" / "models").iterdir())
    assert len(kept) == 1 and (kept[0] / "layer_002.onnx").exists()
    logs = [(site.folder / "logs" / f"shard-{number}.log").read_text() for number in (1, 2)]
    assert all("ready: layers" in log for log in logs)
    assert "right" not in "".join([serving.said, first.said, second.said, *logs])  # the password


@pytest.mark.parametrize(
    ("section", "says_what"),
    [
        ({"total_layers": 4}, "model.total_layers is 4, and the model's is 3"),
        ({"path": "/nowhere"}, "/nowhere is not a model directory"),
        ({"format": "gguf"}, "model.format is gguf, and the model's is onnx"),
    ],
)
def test_a_coordinator_of_another_model_than_meant_does_not_start(site: Site, model: Path, section: Any, says_what: str) -> None:
    coordinator = site.write("coordinator.yaml", {**COORDINATOR, "model": {"path": str(model), **section}})
    ended = site.run("coordinator", "--config", str(coordinator))
    assert ended.returncode == 2 and says_what in ended.stderr, ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_shard_that_finds_its_blocks_nowhere_reports_it(site: Site) -> None:
    shard = site.write(
        "shard.yaml",
        {
            "shard": {"shard_id": 1},
            "model": {"shard_path": str(site.folder / "nothing"), "layers_start": 0, "layers_end": 2},
            "resources": {"max_memory_gb": 1},
        },
    )
    ended = site.run("shard", "--config", str(shard), "--quiet")
    assert ended.returncode == ModelNotFound.exit_code
    assert "nothing is not a model directory" in ended.stderr and "mesh push" in ended.stderr and "Traceback" not in ended.stderr
