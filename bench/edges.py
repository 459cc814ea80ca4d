"""Gateways in processes of their own, and nginx in front of them."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import yaml

from mesh.host.process import dying_with_parent
from mesh.local.supervisor import Child

READY_S = 120.0
NGINX = """\
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/nginx-errors.log;
events {{ worker_connections 1024; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  upstream mesh {{
{servers}
  }}
  server {{
    listen 127.0.0.1:{port};
    client_max_body_size 4m;
    location / {{
      proxy_pass http://mesh;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $host;
      proxy_buffering off;
      proxy_connect_timeout 2s;
      proxy_read_timeout 75s;
      proxy_next_upstream error timeout non_idempotent;
    }}
  }}
}}
"""
"""As docs/http.md has it, with what a process without a root's rights needs."""
SERVER = "server {address} max_fails=0;"


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [each.getsockname()[1] for each in sockets]


@contextmanager
def gateways(count: int, nats: str, folder: Path) -> Iterator[dict[str, Child]]:
    """Running gateways by name; each keeps its port when it is started again. `url_of` says where one listens."""
    children: dict[str, Child] = {}
    try:
        for number, port in enumerate(free_ports(count), 1):
            name = f"gateway-{number}"
            config = folder / f"{name}.yaml"
            config.write_text(yaml.safe_dump({"nats": {"urls": nats.split(",")}, "gateway": {"listen_port": port}}))
            command = dying_with_parent([sys.executable, "-m", "mesh.cli", "gateway", "--config", str(config), "--http-port", str(port)])
            children[name] = Child(command, folder / f"{name}.log", dict(os.environ))
        for child in children.values():
            wait_for(child)
        yield children
    finally:
        for child in children.values():
            child.kill()


def url_of(gateway: Child) -> str:
    return f"http://127.0.0.1:{gateway.command[-1]}"


def wait_for(gateway: Child) -> None:
    """Until it answers."""
    _wait(url_of(gateway), gateway)


@contextmanager
def nginx(urls: list[str], folder: Path) -> Iterator[str]:
    """The URL of an nginx in front of these gateways."""
    program = shutil.which("nginx") or "/usr/sbin/nginx"
    (port,) = free_ports(1)
    servers = "\n".join(f"    {SERVER.format(address=url.removeprefix('http://'))}" for url in urls)
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, servers=servers, port=port))
    child = Child(dying_with_parent([program, "-c", str(config)]), folder / "nginx.log", dict(os.environ))
    try:
        _wait(f"http://127.0.0.1:{port}", child)
        yield f"http://127.0.0.1:{port}"
    finally:
        child.kill()


def _wait(url: str, child: Child) -> None:
    deadline = time.monotonic() + READY_S
    while True:
        try:
            if httpx.get(f"{url}/api/v1/health/live").status_code == 200:
                return
        except httpx.TransportError:
            pass
        if child.returncode is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{url} does not answer: {' | '.join(child.log[-5:])}")
        time.sleep(0.1)
