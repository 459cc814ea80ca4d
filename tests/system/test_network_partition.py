"""A shard on a host of its own (a network namespace) is cut off and comes back. No connection is reset, so no process
is told, and no token is lost."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from checked_load import counted, load, options
from namespaces import Host, host_of_its_own
from running import Run
from system_tools import all_rows_free, until_leases

from mesh.host.process import dying_with_parent
from mesh.local.mesh import LocalMesh
from mesh.local.nats_server import NatsServer

HERE, THERE = "10.213.77.1", "10.213.77.2"


@pytest.fixture
def host() -> Iterator[Host]:
    with host_of_its_own(HERE, THERE) as made:
        yield made


async def there(mesh: LocalMesh, shard: str, *, wanted: bool) -> None:
    await until_leases(mesh, lambda found: (shard in found and found[shard].state == "ready") is wanted)


@pytest.mark.slow
def test_a_shard_is_cut_off_and_comes_back(host: Host, model: Path, undisturbed: list[list[int]], run: Run, tmp_path: Path) -> None:
    async def disturb(mesh: LocalMesh) -> None:
        await there(mesh, "shard-9", wanted=True)
        async with load(mesh, undisturbed) as (running, client):
            host.cut()
            await running.more(200)
            await there(mesh, "shard-9", wanted=False)
            await running.more(100)
            host.heal()
            await there(mesh, "shard-9", wanted=True)
            await running.more(200)
            assert await counted(client, "failed") == 0
        await all_rows_free(mesh)

    with NatsServer.start(host=HERE) as server, LocalMesh(options(model, replicas=1, rows=2, nats=server.url)) as mesh:
        config = tmp_path / "shard.yaml"
        config.write_text(
            yaml.safe_dump(
                {
                    "shard": {"shard_id": 9},
                    "nats": {"urls": [server.url]},
                    "model": {"shard_path": str(Path(model).absolute()), "layers_start": 0, "layers_end": mesh.ranges[0].stop},
                    "resources": {"max_memory_gb": 4},
                    "performance": {"batch_size": 8, "max_sequence_length": 256},
                }
            )
        )
        command = [str(shutil.which("ip")), "netns", "exec", host.name, sys.executable, "-m", "mesh.cli", "shard", "--config", str(config)]
        shard = subprocess.Popen(dying_with_parent([*command, "--quiet"]), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            run(disturb(mesh))
        finally:
            shard.kill()
            shard.wait()
