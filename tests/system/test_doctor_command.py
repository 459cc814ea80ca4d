"""`mesh doctor` as a command, before a mesh runs, while one runs, and while a replica of it stands still."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from unconnected import unconnected

from mesh.local.mesh import LocalMesh, LocalOptions

MESH = [sys.executable, "-m", "mesh.cli"]


def doctor(*arguments: str, folder: Path, code: int) -> dict[str, Any]:
    environment = unconnected() | {"XDG_RUNTIME_DIR": str(folder)}
    command = [*MESH, "doctor", "--json", "--timeout", "5", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == code, done.stdout + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def found(answer: dict[str, Any], check: str, level: str) -> list[str]:
    return [one["found"] for one in answer["findings"] if (one["check"], one["level"]) == (check, level)]


@pytest.fixture
def replicated(model: Path) -> Iterator[LocalMesh]:
    with LocalMesh(LocalOptions(model=model, shards=2, replicas=2, rows=2, context=64)) as running:
        yield running


def test_without_a_server_this_machine_is_looked_at_and_the_exit_code_is_2(tmp_path: Path) -> None:
    answer = doctor("--nats", "nats://127.0.0.1:1", folder=tmp_path, code=2)
    assert not answer["well"] and found(answer, "programs", "ok") and found(answer, "memory", "ok")
    (error,) = [one for one in answer["findings"] if one["level"] == "error"]
    assert error["check"] == "NATS" and error["advice"]


@pytest.mark.slow
def test_a_replica_that_stands_still_is_found_and_the_others_give_a_token(replicated: LocalMesh, tmp_path: Path) -> None:
    well = doctor("--nats", replicated.url, folder=tmp_path, code=0)
    assert well["well"] and len(found(well, "replicas", "ok")) == 4 and found(well, "generation", "ok")
    assert len(found(well, "HTTP", "ok")) == 5  # four shards and the coordinator

    stopped = replicated.processes["shard-1"]
    stopped.send_signal(signal.SIGSTOP)
    try:
        ill = doctor("--nats", replicated.url, folder=tmp_path, code=1)
    finally:
        stopped.send_signal(signal.SIGCONT)
    assert not ill["well"] and len(found(ill, "replicas", "ok")) == 3
    (still,) = found(ill, "shards", "error")  # its lease may have ended before it is looked for
    assert "shard-1" in still and "does not answer" in still


@pytest.mark.slow
def test_for_people_there_is_a_line_for_each_finding(replicated: LocalMesh, tmp_path: Path) -> None:
    command = [*MESH, "doctor", "--nats", replicated.url, "--no-generate"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}, timeout=240)
    assert done.returncode == 0, done.stdout
    assert "\x1b" not in done.stdout and "  ok NATS: " in done.stdout and "0 errors" in done.stdout
    assert "replicas" not in done.stdout
