"""podman and podman-compose for tests/system/test_containers.py. Docker would do the same; podman needs no daemon."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from places import ROOT

__all__ = ["IMAGE", "Compose", "build", "containers", "health_checks", "inspected", "podman"]

IMAGE = os.environ.get("MESH_TEST_IMAGE", "localhost/stagemesh:test")
_EVERY_S = 5.0  # as the image says


def podman(*arguments: str, timeout_s: float = 120.0, check: bool = True) -> str:
    done = subprocess.run([str(shutil.which("podman")), *arguments], capture_output=True, text=True, timeout=timeout_s)
    if check and done.returncode:
        raise AssertionError(f"podman {shlex.join(arguments)}: {done.stdout}{done.stderr}")
    return done.stdout


def build() -> int:
    """Build the image. Returns its size in bytes. $MESH_TEST_BUILD_FLAGS: what the network of this machine needs, such as a mounted
    certificate of its proxy. $MESH_TEST_IMAGE is an image that is there already."""
    if "MESH_TEST_IMAGE" in os.environ:
        return _size()
    flags = shlex.split(os.environ.get("MESH_TEST_BUILD_FLAGS", ""))
    dockerfile = str(ROOT / "deploy" / "docker" / "Dockerfile")
    podman("build", "--format", "docker", *flags, "--file", dockerfile, "--tag", IMAGE, str(ROOT), timeout_s=1500)
    return _size()


def _size() -> int:
    return int(podman("image", "inspect", "--format", "{{.Size}}", IMAGE))


def containers(prefix: str) -> list[str]:
    """The names of those that run."""
    return sorted(name for name in podman("ps", "--format", "{{.Names}}").split() if name.startswith(prefix))


def inspected(name: str) -> dict[str, Any]:
    (document,) = json.loads(podman("inspect", name))
    return dict(document)


@contextmanager
def health_checks(prefix: str) -> Iterator[None]:
    """Run the health checks of these containers again and again: podman has systemd's timers do that, and here may be no systemd."""
    ended = threading.Event()

    def run() -> None:
        while not ended.wait(_EVERY_S):
            for name in containers(prefix):
                podman("healthcheck", "run", name, check=False)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


class Compose:
    """deploy/docker/compose.yaml as a project of its own."""

    def __init__(self, project: str, environment: Mapping[str, str]) -> None:
        self.project = project
        self._environment = {**os.environ, **environment, "MESH_IMAGE": IMAGE}

    def __call__(self, *arguments: str, timeout_s: float = 600.0) -> str:
        program = shutil.which("podman-compose", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        command = [str(program), "--file", str(ROOT / "deploy" / "docker" / "compose.yaml"), "--project-name", self.project, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=self._environment)
        assert done.returncode == 0, f"{shlex.join(arguments)}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def down(self) -> None:
        """Remove it all. podman-compose leaves replicas of a scaled service, and with them the network and the volumes."""
        for name in podman("ps", "--all", "--format", "{{.Names}}").split():
            if name.startswith(self.project):
                podman("rm", "--force", name, check=False)
        self("--profile", "commands", "--profile", "grafana", "down", "--volumes", timeout_s=180)

    def names(self, service: str) -> list[str]:
        return [name for name in containers(self.project) if name.rpartition("_")[0].endswith(f"_{service}")]
