"""A shard's process is suspended, another one is started in its place, and then the first one goes on."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from checked_load import counted, load, options
from running import Run
from waiting import Talking

from mesh.errors import Replaced
from mesh.local.mesh import LocalMesh


@pytest.mark.slow
def test_a_shard_that_was_replaced_while_it_was_suspended_ends(model: Path, undisturbed: list[list[int]], run: Run) -> None:
    async def disturb(mesh: LocalMesh) -> None:
        first = mesh.processes["shard-1"]
        assert mesh._folder is not None
        command = [sys.executable, "-m", "mesh.cli", "shard", "--config", str(mesh._folder.path / "shard-1.yaml"), "--quiet"]
        async with load(mesh, undisturbed) as (running, client):
            os.kill(first.pid, signal.SIGSTOP)
            try:
                await running.more(200)
                with Talking(command) as second:
                    second.wait("takes its place")
                    second.wait("ready: layers")
                    await running.more(200)
                    os.kill(first.pid, signal.SIGCONT)
                    assert first.wait(20) == Replaced.exit_code
                    await running.more(400)
                    assert second.process.poll() is None
            finally:
                first.kill()
            assert await counted(client, "failed") == 0
        log = (mesh._folder.path / "shard-1.log").read_text()
        assert "another process serves as shard shard-1 now" in log

    with LocalMesh(options(model)) as mesh:
        run(disturb(mesh))
