"""deploy/docker and deploy/kubernetes in containers: `make test-containers`. Wants podman, podman-compose, and images of Debian, nginx and
Prometheus under the names that compose.yaml gives them. Not part of CI: building the image and loading the shards takes minutes."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import make_secrets
import pytest
import yaml
from containers import IMAGE, Compose, build, containers, health_checks, inspected, podman
from kube_pods import NETWORK, SUBNET, pods
from places import DEPLOY
from waiting import until, until_true

from mesh.bus import Bus, BusOptions, ModelStore
from mesh.errors import MeshError
from mesh.http.tokens import Issuer
from mesh.model.manifest import Manifest
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams
from mesh.types import even_ranges

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("MESH_TEST_CONTAINERS" not in os.environ, reason="builds and runs containers: `make test-containers`"),
    pytest.mark.skipif(shutil.which("podman") is None, reason="podman is not installed"),
]

PROMPT, TOKENS, CONTEXT = [5, 17, 33, 60], 32, 64
PROJECT = "meshtest"
PORT, PROMETHEUS_PORT = 18443, 19090
SERVED = ("nats", "coordinator-1", "coordinator-2", "shard-1", "shard-2", "shard-3")


@pytest.fixture(scope="module")
def served(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as every user may read it; or the model directory $MESH_TEST_MODEL."""
    folder = tmp_path_factory.mktemp("served") / "model"
    shutil.copytree(os.environ.get("MESH_TEST_MODEL", model), folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


@pytest.fixture(scope="module")
def expected(served: Path) -> list[int]:
    """The greedy tokens, by one process without a container."""
    return Pipeline.load(served, context=CONTEXT).complete(PROMPT, SamplingParams(temperature=0.0), max_tokens=TOKENS).ids


@pytest.fixture(scope="module")
def image() -> int:
    """The image's size in bytes."""
    return build()


def test_the_image_is_small_and_runs_as_nobody_on_a_read_only_root(image: int) -> None:
    document = json.loads(podman("image", "inspect", IMAGE))[0]
    assert document["Config"]["User"] == "10001:10001" and document["HealthCheck" if "HealthCheck" in document else "Healthcheck"]
    hardened = ("run", "--rm", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges", "--network", "none")
    assert podman(*hardened, IMAGE, "--version").startswith("mesh ")
    assert podman(*hardened, "--entrypoint", "nats-server", IMAGE, "--version").startswith("nats-server")
    assert podman(*hardened, "--entrypoint", "id", IMAGE, "-u").strip() == "10001"
    named = podman(*hardened, "--entrypoint", "python", IMAGE, "-c", "from mesh.kernels.library import kernels; print(kernels())").strip()
    assert named in ("amx", "avx512bf16", "avx512vnni", "avx512", "avx2", "neon", "portable")
    print(f"\nimage: {image / 1e6:.0f} MB, kernels: {named}")
    assert image < 900_000_000


@pytest.fixture(scope="module")
def compose(image: int, served: Path) -> Iterator[Compose]:
    ranges = {f"RANGE_{number}": str(layers) for number, layers in enumerate(even_ranges(Manifest.load(served).layers, 3), 1)}
    sizes = {"ROWS": "4", "CONTEXT": str(CONTEXT), "MESH_PORT": str(PORT), "PROMETHEUS_PORT": str(PROMETHEUS_PORT)}
    project = Compose(PROJECT, {**ranges, **sizes, "MESH_MODEL": str(served)})
    with health_checks(PROJECT):
        try:
            project("up", "--detach", "--no-build")
            project("--profile", "commands", "run", "--rm", "-T", "push")
            yield project
        finally:
            for name in containers(PROJECT):
                print(name, podman("logs", "--tail", "12", name, check=False))
            project.down()


@pytest.fixture(scope="module")
def http(compose: Compose, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A caller with a token, who trusts the authority that `setup` made."""
    authority = tmp_path_factory.mktemp("ca") / "ca.crt"
    authority.write_text(podman("exec", compose.names("nginx")[0], "cat", "/keys/own/ca.crt"))
    token = compose("--profile", "commands", "run", "--rm", "-T", "token").strip().splitlines()[-1]
    context = ssl.create_default_context(cafile=str(authority))
    headers = {"authorization": f"Bearer {token}"}
    with httpx.Client(base_url=f"https://localhost:{PORT}", verify=context, headers=headers, timeout=120) as client:
        yield client


def health(name: str) -> str:
    state = inspected(name)["State"]
    return str(state.get("Health", state.get("Healthcheck", {})).get("Status"))


def test_a_generation_comes_through_nginx_and_three_shards_in_containers(compose: Compose, http: httpx.Client, expected: list[int]) -> None:
    began = time.monotonic()
    until_true(lambda: http.get("/api/v1/health").status_code == 200, because="callers ask for health", deadline_s=600)
    print(f"\nready {time.monotonic() - began:.0f} s after the push")
    answer = http.post("/api/v1/inference", json={"tokens": PROMPT, "max_tokens": TOKENS, "ignore_eos": True})
    assert answer.status_code == 200 and answer.json()["tokens"] == expected, answer.text
    refused = http.post("/api/v1/inference", json={"tokens": PROMPT}, headers={"authorization": "Bearer wrong"})
    assert refused.status_code == 401
    for service in SERVED:
        for name in compose.names(service):
            until_true(lambda name=name: health(name) == "healthy", because="podman keeps the result of a check")  # type: ignore[misc]


def test_a_shard_is_scaled_and_its_first_replica_killed_in_the_middle_of_a_stream(
    compose: Compose, http: httpx.Client, expected: list[int]
) -> None:
    (first,) = compose.names("shard-2")
    compose("up", "--detach", "--no-build", "--no-recreate", "--scale", "shard-2=2", "shard-2")
    (second,) = set(compose.names("shard-2")) - {first}
    until_true(lambda: health(second) == "healthy", because="podman keeps the result of a check", deadline_s=300)
    body = {"tokens": PROMPT, "max_tokens": TOKENS, "ignore_eos": True, "stream": True}
    killed = False
    tokens: list[int] = []
    with http.stream("POST", "/api/v1/inference", json=body) as stream:
        for line in stream.iter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            event: dict[str, Any] = json.loads(line.removeprefix("data:"))
            tokens += [event["token"]] if "token" in event else []
            if len(tokens) >= 5 and not killed:
                killed = True
                podman("kill", "--signal", "KILL", first)
    assert killed and tokens == expected


def test_prometheus_of_the_compose_file_scrapes_every_process(compose: Compose, http: httpx.Client) -> None:
    def up() -> bool:
        answer = httpx.get(f"http://127.0.0.1:{PROMETHEUS_PORT}/api/v1/query", params={"query": 'up{job=~"mesh.*"} == 1'}, timeout=10)
        seen = {one["metric"]["process"] for one in answer.json()["data"]["result"]}
        return seen == {"coordinator-1", "coordinator-2", "shard-1", "shard-2", "shard-3"}

    until_true(up, because="Prometheus scrapes every 15 s", deadline_s=120)


def test_only_nginx_and_prometheus_have_ports_of_this_machine(compose: Compose) -> None:
    published: dict[str, list[tuple[str, str]]] = {}
    for name in containers(PROJECT):
        ports = inspected(name)["HostConfig"]["PortBindings"] or {}
        published |= {name.rpartition("_")[0]: [(one["HostIp"], one["HostPort"]) for one in bindings] for bindings in ports.values()}
    assert published == {
        f"{PROJECT}_nginx": [("127.0.0.1", str(PORT))],
        f"{PROJECT}_prometheus": [("127.0.0.1", str(PROMETHEUS_PORT))],
    }


# -- kubernetes --------------------------------------------------------------------------------------------------------

NATS_PORT, HTTPS_PORT = 14222, 18444


@pytest.fixture(scope="module")
def kube(image: int, served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The pods of the overlay `cpu` run, and the model is in the mesh. The folder of the keys."""
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed")
    folder = tmp_path_factory.mktemp("kube")
    overlay = subprocess.run(
        [kubectl, "kustomize", str(DEPLOY / "kubernetes" / "overlays" / "cpu")], capture_output=True, text=True, check=True
    )
    documents = list(yaml.safe_load_all(overlay.stdout))
    secrets = make_secrets.documents(folder / "keys", ["localhost"])
    ports = {"mesh-nats-0": {4222: NATS_PORT}, "mesh-coordinator-0": {8080: HTTPS_PORT}}
    ranges = [str(layers) for layers in even_ranges(Manifest.load(served).layers, 3)]
    made = list(pods(documents, secrets, IMAGE, ports, ranges))
    podman("network", "create", "--subnet", f"{SUBNET}.0/24", NETWORK)
    try:
        for pod in made:
            (folder / f"{pod.name}.yaml").write_text(pod.text)
            podman("kube", "play", "--network", NETWORK, "--ip", pod.ip, str(folder / f"{pod.name}.yaml"))
        asyncio.run(pushed(folder / "keys", served))
        yield folder / "keys"
    finally:
        for pod in reversed(made):
            print(pod.name, podman("pod", "logs", "--tail", "8", pod.name, check=False))
            podman("kube", "down", str(folder / f"{pod.name}.yaml"), check=False)
        podman("network", "rm", "--force", NETWORK)


async def pushed(keys: Path, model: Path) -> None:
    pki = keys / "pki"
    options = BusOptions(
        (f"tls://127.0.0.1:{NATS_PORT}",),
        nkey_seed=str(keys / "users" / "provisioner.nk"),
        tls_ca=str(pki / "ca.crt"),
        tls_cert=str(pki / "provisioner.crt"),
        tls_key=str(pki / "provisioner.key"),
        inbox_prefix="_INBOX.provisioner",
    )

    async def push() -> bool:
        try:
            async with await Bus.connect(options, name="push") as bus:
                await ModelStore(bus).push(model)
        except MeshError:
            return False
        return True

    await until(push, because="three servers form a cluster first")


def test_a_generation_comes_through_the_pods_of_the_kubernetes_manifests(kube: Path, expected: list[int]) -> None:
    secret = (kube / "token-secret").read_bytes().strip()
    token = Issuer("HS256", secret).issue("caller", ["generate"], now_unix_s=time.time(), expiry_s=3600)
    context = ssl.create_default_context(cafile=str(kube / "pki" / "ca.crt"))
    with httpx.Client(base_url=f"https://localhost:{HTTPS_PORT}", verify=context, timeout=120) as client:

        def ready() -> bool:
            try:
                return client.get("/api/v1/health/ready").status_code == 200
            except httpx.TransportError:
                return False

        until_true(ready, because="the pods load and compile", deadline_s=600)
        body = {"tokens": PROMPT, "max_tokens": TOKENS, "ignore_eos": True}
        answer = client.post("/api/v1/inference", json=body, headers={"authorization": f"Bearer {token}"})
        assert answer.status_code == 200 and answer.json()["tokens"] == expected, answer.text
        assert client.post("/api/v1/inference", json=body).status_code == 401
    for pod in ("mesh-shard-1-0", "mesh-shard-2-0", "mesh-shard-3-0"):
        for question in ("ready", "live"):  # the probes of the manifest
            podman("exec", f"{pod}-shard", "mesh-health", question)
