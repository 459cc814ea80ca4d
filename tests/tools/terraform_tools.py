"""Terraform without a network, and a moto server in AWS's place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from ansible_tools import TOOLS
from clusters import free_ports
from places import ROOT
from waiting import until_true

__all__ = ["MOTO", "TERRAFORM", "Environment", "moto", "plugins"]

_REGION = "eu-central-1"


def _has_moto(python: Path) -> bool:
    return bool(list(python.parent.parent.glob("lib/python*/site-packages/moto/server.py")))


TERRAFORM = shutil.which("terraform")
MOTO = next((python for python in (TOOLS / "python", Path(sys.executable)) if _has_moto(python)), None)
"""A Python that has moto."""


def plugins() -> Path | None:
    """A folder of unpacked providers with AWS's in it, as `terraform providers mirror` makes it: $TERRAFORM_PLUGINS, or where Linux
    images have one."""
    chosen = os.environ.get("TERRAFORM_PLUGINS")
    if chosen:
        return Path(chosen)
    roots = (Path("/opt"), Path("/usr/local/share/terraform"), Path.home() / ".terraform.d")
    for root in roots:
        for provider in root.glob("*/*/hashicorp/aws"):
            return provider.parents[2]
    return None


class Environment:
    """A copy of terraform/environments/NAME in `folder`, so that no state is left in the repository."""

    def __init__(self, folder: Path, name: str, environment: dict[str, str] | None = None) -> None:
        if not (folder / "terraform").exists():
            ignored = shutil.ignore_patterns(".terraform*", "terraform.tfstate*", "*.tfvars", "*.tfvars.json", "secrets", "inventory.yml")
            shutil.copytree(ROOT / "terraform", folder / "terraform", ignore=ignored)
            (folder / "mesh").mkdir()
            shutil.copy(ROOT / "mesh" / "__init__.py", folder / "mesh")
        self.path = folder / "terraform" / "environments" / name
        kept = {key: value for key, value in os.environ.items() if key != "TF_CLI_CONFIG_FILE"}
        self._environment = {**kept, "CHECKPOINT_DISABLE": "1", "TF_IN_AUTOMATION": "1", **(environment or {})}

    def run(self, *words: str, codes: tuple[int, ...] = (0,), timeout_s: float = 600) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [str(TERRAFORM), *words, *(["-no-color"] if words[0] != "output" else [])],
            cwd=self.path,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode in codes, f"terraform {' '.join(words)}: {done.returncode}\n{done.stdout[-9000:]}\n{done.stderr[-4000:]}"
        return done

    def init(self, *words: str) -> None:
        """Skips the test where the providers are neither here nor to be fetched."""
        found = plugins()
        where = [] if found is None else [f"-plugin-dir={found}"]
        done = self.run("init", "-input=false", *where, *words, codes=(0, 1))
        if done.returncode:
            if found is None:
                pytest.skip("terraform's provider for AWS is not here and cannot be fetched")
            raise AssertionError(done.stdout + done.stderr)

    def variables(self, **values: Any) -> None:
        (self.path / "test.auto.tfvars.json").write_text(json.dumps(values))

    def outputs(self) -> dict[str, Any]:
        found: dict[str, dict[str, Any]] = json.loads(self.run("output", "-json").stdout)
        return {name: output["value"] for name, output in found.items()}


@contextmanager
def moto(folder: Path) -> Iterator[dict[str, str]]:
    """The environment of programs that are to take a moto server for AWS. It runs until the block ends."""
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [str(MOTO), str(ROOT / "tests" / "tools" / "moto_server.py"), str(port)]
    with (folder / "moto.log").open("w") as log:
        environment = {**os.environ, "MOTO_IAM_LOAD_MANAGED_POLICIES": "true"}  # those of AWS itself, such as Session Manager's
        server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            until_true(lambda: _answers(url, server), because="a server of others tells nobody when it listens")
            yield {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_REGION": _REGION,
                "AWS_EC2_METADATA_DISABLED": "true",
                "NO_PROXY": "127.0.0.1",
                "no_proxy": "127.0.0.1",
            }
        finally:
            server.kill()
            server.wait()


def _answers(url: str, server: subprocess.Popen[bytes]) -> bool:
    assert server.poll() is None, f"moto ended with code {server.returncode}"
    try:
        httpx.get(url, timeout=5)
    except httpx.TransportError:
        return False
    return True
