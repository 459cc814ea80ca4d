"""The embedded nats-server ends with the process that started it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

from mesh.local.nats_server import NatsServer

_OWNER = """\
import signal
from mesh.local.nats_server import NatsServer
server = NatsServer.start()
print(server.pid, flush=True)
signal.pause()
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="pidfd_open is Linux's")
def test_a_server_does_not_outlive_an_owner_that_is_killed() -> None:
    owner = subprocess.Popen([sys.executable, "-c", _OWNER], stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        server = os.pidfd_open(int(owner.stdout.readline()))
        owner.send_signal(signal.SIGKILL)
        ended, _, _ = select.select([server], [], [], 20)
        os.close(server)
        assert ended
    finally:
        owner.kill()
        owner.wait()
        if owner.stdout is not None:
            owner.stdout.close()


def test_a_stopped_server_leaves_nothing() -> None:
    server = NatsServer.start(monitor=True)
    with server:
        assert server.running and server.url.startswith("nats://127.0.0.1:") and server.monitor_url
        folder = server._folder
        assert folder is not None and folder.path.is_dir()
    stopped = not server.running
    assert stopped and not folder.path.exists()
    server.stop()
