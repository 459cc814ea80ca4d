"""The log of a command, asked for on its line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from unconnected import unconnected

from mesh.local.nats_server import NatsServer


@pytest.mark.parametrize(
    "line", ["--log-level debug models --json", "models --json --log-level=debug", "models list --log-level debug --json"]
)
def test_a_log_is_asked_for_anywhere_in_the_line(line: str, server: NatsServer, tmp_path: Path) -> None:
    """In a process of its own: the log is the process's."""
    environment = {**unconnected(), "XDG_RUNTIME_DIR": str(tmp_path), "MESH_CACHE_DIR": str(tmp_path), "MESH_NATS_URLS": server.url}
    done = subprocess.run([sys.executable, "-m", "mesh.cli", *line.split()], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0 and " mesh.bus" in done.stderr, done.stderr
