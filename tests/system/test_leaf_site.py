"""A site behind NAT: a leaf node that only connects out, with a password of its own, and behind it the only shard of a layer range."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import yaml
from checked_load import CONTEXT, Load, counted
from namespaces import Host, host_of_its_own
from places import NATS
from running import Run
from serving import coordinator, shards
from waiting import Talking, leases

from mesh.bus import Bus, BusOptions
from mesh.client import AsyncMeshClient
from mesh.host.process import dying_with_parent
from mesh.local.nats_server import NatsServer, find_binary
from mesh.types import LayerRange, even_ranges

PASSWORD = "a-password-of-leaf-nodes"
LAYERS = 3
LOOPBACK = "0100007F"


@dataclass(frozen=True)
class Way:
    """How the site reaches the hub. Each way has a network of its own, because several tests may run at once."""

    scheme: str
    port: int
    network: str

    @property
    def here(self) -> str:
        return f"{self.network}.1"


WAYS = [Way("nats", 7422, "10.213.78"), Way("ws", 7480, "10.213.79")]


@pytest.fixture(params=WAYS, ids=lambda way: way.scheme)
def way(request: pytest.FixtureRequest) -> Way:
    return cast(Way, request.param)


@pytest.fixture
def site(way: Way) -> Iterator[Host]:
    with host_of_its_own(way.here, f"{way.network}.2") as made:
        yield made


def shard_config(folder: Path, model: Path, layers: LayerRange) -> Path:
    path = folder / "shard.yaml"
    content = {
        "shard": {"shard_id": 9},
        "nats": {"urls": ["nats://127.0.0.1:4232"]},
        "model": {"shard_path": str(model.absolute()), "layers_start": layers.start, "layers_end": layers.stop},
        "resources": {"max_memory_gb": 4},
        "performance": {"batch_size": 8, "max_sequence_length": CONTEXT},
    }
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.slow
def test_a_site_that_only_connects_out_takes_part_and_its_loss_is_a_pause(
    site: Host, model: Path, undisturbed: list[list[int]], run: Run, tmp_path: Path, way: Way
) -> None:
    near, far = even_ranges(LAYERS, 2)

    async def work(hub: str) -> None:
        async def there(bus: Bus, *, wanted: bool) -> None:
            await leases(bus, lambda found: ("shard-9" in found and found["shard-9"].state == "ready") is wanted)

        async with await Bus.connect(BusOptions((hub,)), name="watching") as bus:
            await there(bus, wanted=True)
            async with (
                shards(hub, model, [near], context=CONTEXT, rows=8),
                coordinator(hub, model, failover_timeout_s=120.0),
                AsyncMeshClient(hub, model="tiny") as client,
            ):
                running = Load(client, undisturbed)
                try:
                    await running.more(100)
                    await asyncio.to_thread(site.cut)
                    await there(bus, wanted=False)
                    finished = running.finished
                    await asyncio.to_thread(site.heal)
                    await there(bus, wanted=True)
                    await running.more(400)
                    await running.stop()
                    assert site.listening() == {LOOPBACK}  # nobody reaches the site from outside
                finally:
                    for task in running.tasks:
                        task.cancel()
                    await asyncio.gather(*running.tasks, return_exceptions=True)
                assert running.finished > finished and await counted(client, "failed") == 0

    for path in NATS.glob("*.conf"):
        text = path.read_text().replace("listen: 127.0.0.1:7422", f"listen: {way.here}:7422").replace("127.0.0.1:7480", f"{way.here}:7480")
        (tmp_path / path.name).write_text(text)
    hub_url = f"{way.scheme}://leaf:{PASSWORD}@{way.here}:{way.port}"
    environment = {"MESH_LEAF_PASSWORD": PASSWORD}
    (tmp_path / "site").mkdir()
    server = site.command(find_binary(), "--config", str(NATS / "leaf.conf"))
    shard = site.command(sys.executable, "-m", "mesh.cli", "shard", "--config", str(shard_config(tmp_path, model, far)), "--quiet")
    with (
        NatsServer.start(config=tmp_path / "hub.conf", directory=tmp_path / "hub", environment=environment) as hub,
        Talking(dying_with_parent(server), cwd=tmp_path / "site", env={"MESH_HUB": hub_url}) as leaf,
    ):
        leaf.wait("Leafnode connection created")
        assert PASSWORD not in Path(f"/proc/{leaf.process.pid}/cmdline").read_text() and PASSWORD not in leaf.said
        running = subprocess.Popen(dying_with_parent(shard), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            run(work(hub.url))
        finally:
            running.kill()
            running.wait()
