"""What JetStream keeps: the configurations that are shipped write to disk within a second, and a killed server loses nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from clusters import free_ports
from places import NATS
from running import Run

from mesh.bus import Bucket, Bus, BusOptions
from mesh.bus.batches import BatchStore
from mesh.doctor.findings import Finding
from mesh.doctor.server import check_monitor
from mesh.local.nats_server import NatsServer
from mesh.protocol.generation import Generate
from mesh.protocol.subjects import KV_SESSIONS


def sync_of(server: NatsServer) -> Finding:
    return next(finding for finding in check_monitor(server.monitor_url) if finding.check == "sync_interval")


@pytest.mark.parametrize("name", sorted(path.name for path in NATS.glob("*.conf") if "store_dir" in path.read_text()))
def test_what_is_shipped_writes_to_disk_within_a_second(tmp_path: Path, name: str) -> None:
    port, web = free_ports(2)
    arguments = ("--cluster_listen", f"nats://127.0.0.1:{port}") if "cluster" in name else ()
    for path in NATS.glob("*.conf"):
        text = path.read_text().replace("listen: 127.0.0.1:7422", f"listen: 127.0.0.1:{port}")
        (tmp_path / path.name).write_text(text.replace("listen: 127.0.0.1:7480", f"listen: 127.0.0.1:{web}"))
    environment, folder = {"MESH_LEAF_PASSWORD": "secret", "MESH_NATS_PASSWORD": "secret"}, tmp_path / "server"
    with NatsServer.start(config=tmp_path / name, directory=folder, monitor=True, arguments=arguments, environment=environment) as server:
        assert sync_of(server).level == "ok" and "every 1 s" in sync_of(server).found


def test_the_server_of_mesh_up_writes_to_disk_within_a_second() -> None:
    with NatsServer.start(monitor=True) as server:
        assert sync_of(server).level == "ok" and "every 1 s" in sync_of(server).found


def test_a_server_without_the_setting_is_warned_of(tmp_path: Path) -> None:
    (tmp_path / "plain.conf").write_text('jetstream { store_dir: "./jetstream" }\n')
    with NatsServer.start(config=tmp_path / "plain.conf", directory=tmp_path, monitor=True) as server:
        assert sync_of(server).level == "warning"


def test_a_killed_server_has_lost_nothing_that_it_acknowledged(run: Run, tmp_path: Path) -> None:
    requests = [Generate(prompt=f"{number}", max_tokens=2) for number in range(50)]

    async def write(url: str) -> None:
        async with await Bus.connect(BusOptions((url,)), name="t") as bus:
            await BatchStore(bus).submit("m", requests, id="mine")
            bucket = Bucket(bus, KV_SESSIONS, durable=True)
            for number in range(50):
                await bucket.put(f"s{number}", b"%d" % number)

    async def read(url: str) -> None:
        async with await Bus.connect(BusOptions((url,)), name="t") as bus:
            status = await BatchStore(bus).status("mine")
            assert (status.total, status.complete, status.state) == (50, True, "queued")
            assert {entry.value for entry in await Bucket(bus, KV_SESSIONS, durable=True).entries()} == {b"%d" % n for n in range(50)}

    with NatsServer.start(config=NATS / "single.conf", directory=tmp_path / "server") as server:
        run(write(server.url))
        server.kill()
        server.revive()
        run(read(server.url))
