"""A client without the server's packages: it is installed without jax and onnx, and works."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from light_site import base_packages, command, make_site

from mesh.local.mesh import LocalMesh

HEAVY = {
    "jax",
    "jaxlib",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "numpy",
    "ml-dtypes",
    "scipy",
    "tokenizers",
    "cryptography",
    "fastapi",
    "uvicorn",
}

SCRIPT = """
import asyncio, importlib.util, sys
from mesh.client import AsyncMeshClient, MeshClient

assert importlib.util.find_spec("jax") is None and importlib.util.find_spec("onnx") is None and importlib.util.find_spec("numpy") is None
url = sys.argv[1]
with MeshClient(url) as mesh:
    answer = mesh.generate(tokens=[5, 17, 33], max_tokens=8, ignore_eos=True)
    with mesh.stream("Rain?", max_tokens=4, ignore_eos=True) as stream:
        chunks = list(stream)
    status = mesh.submit_batch(["One.", {"prompt": "Two.", "max_tokens": 3}], max_tokens=2)
    batch = mesh.wait_batch(status.id, timeout_s=60)

async def later() -> int:
    async with AsyncMeshClient(url) as mesh:
        return (await mesh.generate("Rain?", max_tokens=4, ignore_eos=True)).usage.completion_tokens

print(answer.usage.completion_tokens, sum(chunk.token is not None for chunk in chunks), batch.done, asyncio.run(later()))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_site(tmp_path_factory.mktemp("light") / "site")


def light(site: Path, *arguments: str, url: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **({"MESH_NATS_URLS": url} if url else {})}
    return subprocess.run(command(site, *arguments), capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(scope="module")
def asked(mesh: LocalMesh, site: Path) -> LocalMesh:
    """The mesh after a request, so that there is a trace of one."""
    assert light(site, "mesh.cli", "generate", "Rain?", "--max-tokens", "1", url=mesh.url).returncode == 0
    return mesh


def test_the_base_has_none_of_the_heavy_packages() -> None:
    assert not base_packages() & HEAVY and {"nats-py", "pydantic", "orjson"} <= base_packages()


def test_the_client_generates_without_them(mesh: LocalMesh, site: Path, tmp_path: Path) -> None:
    (site / "usersscript.py").write_text(SCRIPT)
    done = light(site, "usersscript", mesh.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8", "4", "2", "4"]


@pytest.mark.parametrize(
    "line",
    [
        "generate Rain? --max-tokens 4",
        "status",
        "events --last 3",
        "trace",
        "batch list",
        "bench --requests 2 --max-tokens 2 --no-hop",
        "usage",
    ],
)
def test_the_commands_of_a_client_work_without_them(asked: LocalMesh, site: Path, line: str) -> None:
    done = light(site, "mesh.cli", *line.split(), url=asked.url)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("line", "package"), [("run model Rain?", "server"), ("up model", "server"), ("gateway", "server")])
def test_a_command_of_a_server_says_what_to_install(site: Path, line: str, package: str) -> None:
    done = light(site, "mesh.cli", *line.split())
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.rstrip().endswith(f"which is not installed: pip install 'stagemesh[{package}]'")
