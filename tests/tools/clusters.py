"""A cluster of three nats-servers, as nats/cluster-*.conf describe it but for the ports."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from places import NATS

from mesh.bus import Bus
from mesh.local.nats_server import NatsServer

__all__ = ["cluster", "free_ports", "leader_of", "suspended"]


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def cluster(folder: Path) -> Iterator[list[NatsServer]]:
    ports = free_ports(6)
    routes = ",".join(f"nats://127.0.0.1:{port}" for port in ports[3:])
    with ExitStack() as stack:
        servers = []
        for index in range(3):
            name = f"cluster-{index + 1}"
            arguments = ("--cluster_listen", f"nats://127.0.0.1:{ports[3 + index]}", "--routes", routes)
            server = NatsServer.start(config=NATS / f"{name}.conf", directory=folder / name, port=ports[index], arguments=arguments)
            servers.append(stack.enter_context(server))
        yield servers


async def leader_of(bus: Bus, stream: str, servers: list[NatsServer]) -> NatsServer:
    """The server that leads a stream."""
    info = await bus.client.jetstream().stream_info(stream)
    assert info.cluster is not None and info.cluster.leader is not None
    return servers[int(info.cluster.leader.removeprefix("mesh-")) - 1]


@contextmanager
def suspended(server: NatsServer) -> Iterator[None]:
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)
