"""deploy/docker and deploy/kubernetes as far as no container is needed: each file is read by the program that it is for, or by its schema.
tests/system/test_containers.py runs them."""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import make_secrets
import mesh_health
import pytest
import yaml
from places import DEPLOY, ROOT
from pydantic import BaseModel
from running import Run
from serving import connect, shards
from waiting import until

from mesh import __version__
from mesh.commands.coordinator import add_parser as add_coordinator_parser
from mesh.commands.push import add_push_parser
from mesh.commands.shard import add_join_parser
from mesh.commands.token import add_parser as add_token_parser
from mesh.host.process import dying_with_parent
from mesh.http.listener import Listener, ListenerOptions
from mesh.local.nats_server import NatsServer, find_binary
from mesh.pki.folder import PkiFolder
from mesh.settings.schema import CoordinatorConfig, LoggingSection, MetricsSection, NatsSection, load_config
from mesh.shard.http import ShardHttp
from mesh.telemetry.metrics import METRICS
from mesh.types import LayerRange, even_ranges

DOCKER, KUBERNETES = DEPLOY / "docker", DEPLOY / "kubernetes"
SECTIONS: dict[str, type[BaseModel]] = {"NATS": NatsSection, "METRICS": MetricsSection, "LOGGING": LoggingSection}
KUBECTL = shutil.which("kubectl")
OVERLAYS = ("cpu", "gpu")
POD_FIELDS = {"POD_NAME": "mesh-shard-1-0"}


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    return document


def filled(text: str, values: dict[str, str]) -> str:
    """`${NAME:-default}` of compose, and `$(NAME)` of Kubernetes."""
    text = re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", lambda found: os.environ.get(found[1], found[2] or ""), text)
    return re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], text)


def parsed(command: list[str]) -> argparse.Namespace:
    """The arguments of `mesh` as the program reads them."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    actions = parser.add_subparsers()
    for add in (add_join_parser, add_coordinator_parser, add_push_parser, add_token_parser):
        add(actions)
    return parser.parse_args(command)


def check_environment(values: dict[str, str]) -> None:
    """Every variable is a key of the configuration, or one of the few others."""
    for name in values:
        found = re.fullmatch(r"MESH_([A-Z]+)_(\w+)", name)
        if found is None or name in ("MESH_HEALTH_URL", "MESH_HOSTS"):
            assert name in ("MESH_HEALTH_URL", "MESH_HOSTS", "POD_NAME", "LAYERS", "MEMORY", "ROWS", "CONTEXT"), name
            continue
        assert found[2].lower() in SECTIONS[found[1]].model_fields, name


# -- docker ------------------------------------------------------------------------------------------------------------


def test_hadolint_is_content_with_the_dockerfile() -> None:
    hadolint = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if hadolint is None:
        pytest.skip("hadolint is not installed: pip install -e .[containers]")
    done = subprocess.run([hadolint, str(DOCKER / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_every_service_is_hardened() -> None:
    for name, service in compose()["services"].items():
        assert service["read_only"] and service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service and service.get("network_mode") in (None, "none"), name
        for port in service.get("ports", ()):
            assert filled(port, {}).startswith("127.0.0.1:"), f"{name} publishes {port}"


def test_a_service_mounts_the_keys_of_its_role_alone() -> None:
    for name, service in compose()["services"].items():
        keys = [volume for volume in service.get("volumes", ()) if volume.startswith("keys-")]
        if name != "setup":
            assert len(keys) <= 1 and all(volume.endswith(":/keys/own:ro") for volume in keys), name
            assert "keys-authority" not in " ".join(keys)


def test_the_services_of_compose_are_started_with_arguments_and_keys_that_exist() -> None:
    ranges = []
    for name, service in compose()["services"].items():
        check_environment({key: value for key, value in service.get("environment", {}).items() if not key.startswith("GF_")})
        if service["image"] == "${MESH_IMAGE:-stagemesh}" and "entrypoint" not in service:
            args = parsed([filled(part, {}) for part in service["command"]])
            ranges += [args.layers] if name.startswith("shard-") else []
    assert ranges == [str(layers) for layers in even_ranges(30, 3)]  # those of the demo model


def test_the_coordinators_of_compose_have_a_configuration() -> None:
    config = load_config(DOCKER / "coordinator.yaml", CoordinatorConfig)
    assert config.authentication.enabled and config.distributed.shards_count == 3
    addresses = [service["networks"]["mesh"]["ipv4_address"] for name, service in compose()["services"].items() if "coordinator" in name]
    assert re.findall(r"server ([\d.]+):8080", (DOCKER / "nginx.conf").read_text()) == addresses
    (subnet,) = compose()["networks"]["mesh"]["ipam"]["config"]
    assert all(ip_address(each) in ip_network(subnet["subnet"]) for each in addresses)
    assert not any(ip_address(each) in ip_network(subnet["ip_range"]) for each in addresses)  # or another container may have it first


def test_nginx_takes_the_configuration(tmp_path: Path) -> None:
    nginx = shutil.which("nginx", path=f"/usr/sbin:{os.environ['PATH']}")
    if nginx is None:
        pytest.skip("nginx is not installed")
    pki = PkiFolder(tmp_path / "pki")
    pki.init(name="t")
    pki.issue("edge", kind="server", hosts=["localhost"])
    text = (DOCKER / "nginx.conf").read_text().replace("/tmp/", f"{tmp_path}/")
    text = text.replace("/keys/own/tls.crt", str(pki.certificate("edge"))).replace("/keys/own/tls.key", str(pki.key("edge")))
    (tmp_path / "nginx.conf").write_text(text)
    done = subprocess.run([nginx, "-t", "-q", "-c", str(tmp_path / "nginx.conf")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_promtool_takes_the_configuration(tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian: apt install prometheus)")
    shutil.copy(DOCKER / "prometheus.yml", tmp_path)
    shutil.copy(DEPLOY / "monitoring" / "alerts.yml", tmp_path)
    done = subprocess.run([promtool, "check", "config", str(tmp_path / "prometheus.yml")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_image_copies_what_the_build_needs_and_nothing_else() -> None:
    wanted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    assert {name for names in copied for name in names.split()} == wanted
    assert all((ROOT / name).exists() for name in wanted)


# -- kubernetes --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> dict[str, list[dict[str, Any]]]:
    """What kustomize makes of each overlay."""
    if KUBECTL is None:
        pytest.skip("kubectl is not installed")
    return {overlay: kustomized(KUBERNETES / "overlays" / overlay) for overlay in OVERLAYS}


def kustomized(folder: Path) -> list[dict[str, Any]]:
    done = subprocess.run([str(KUBECTL), "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(documents: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [each for each in documents if each["kind"] == kind]


def pod_templates(documents: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for each in documents:
        if each["kind"] in ("Deployment", "StatefulSet"):
            yield each["metadata"]["name"], each["spec"]["template"]


def check_strictly(document: dict[str, Any]) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="pip install -e .[containers]")
    validator.validate(document, "1.33", strict=True)


@pytest.mark.parametrize(
    "path", sorted(path for path in KUBERNETES.rglob("*.yaml") if path.name != "kustomization.yaml"), ids=lambda path: path.name
)
def test_every_manifest_is_strictly_valid(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        if "." not in document["apiVersion"].partition("/")[0] or document["apiVersion"].startswith("networking.k8s.io/"):
            check_strictly(document)
        else:
            assert document["apiVersion"] in ("monitoring.coreos.com/v1", "keda.sh/v1alpha1"), "a kind without a schema here"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_is_built_and_strictly_valid(built: dict[str, list[dict[str, Any]]], overlay: str) -> None:
    documents = built[overlay]
    for document in documents:
        check_strictly(document)
    assert [each["metadata"]["name"] for each in of_kind(documents, "StatefulSet")] == [
        "mesh-nats",
        *(f"mesh-shard-{n}" for n in (1, 2, 3)),
    ]


@pytest.mark.parametrize("component", ["prometheus", "keda", "hpa"])
def test_components_are_built_on_an_overlay_and_name_what_is_there(tmp_path: Path, component: str) -> None:
    if KUBECTL is None:
        pytest.skip("kubectl is not installed")
    copy = tmp_path / "kubernetes"
    shutil.copytree(KUBERNETES, copy)
    overlay = copy / "overlays" / "cpu" / "kustomization.yaml"
    overlay.write_text(overlay.read_text() + f"components: [../../components/{component}]\n")
    documents = kustomized(overlay.parent)
    names = {each["metadata"]["name"] for each in documents if each["kind"] == "StatefulSet"}
    scaled = [each["spec"]["scaleTargetRef"]["name"] for each in documents if "scaleTargetRef" in each.get("spec", {})]
    assert (set(scaled) == names - {"mesh-nats"}) if component != "prometheus" else not scaled


def test_queries_of_the_scalers_name_metrics_that_exist() -> None:
    known = {metric.name for metric in METRICS}
    text = (KUBERNETES / "components" / "keda" / "scalers.yaml").read_text()
    named = set(re.findall(r"\b(mesh_\w+)", text))
    assert named and named <= known


def test_every_pod_is_restricted_and_probed(built: dict[str, list[dict[str, Any]]]) -> None:
    for name, template in pod_templates(built["cpu"]):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["automountServiceAccountToken"] is False
        assert len(spec["topologySpreadConstraints"]) == 2
        for spread in spec["topologySpreadConstraints"]:
            assert spread["labelSelector"]["matchLabels"].items() <= template["metadata"]["labels"].items(), name
        for container in spec["containers"]:
            context = container["securityContext"]
            assert (
                context["readOnlyRootFilesystem"]
                and not context["allowPrivilegeEscalation"]
                and context["capabilities"] == {"drop": ["ALL"]}
            )
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= container.keys()
            assert container["resources"]["limits"]["memory"] and container["image"] == f"stagemesh:{__version__}"


def test_the_last_replica_of_a_range_is_never_evicted_and_one_of_two_is(built: dict[str, list[dict[str, Any]]]) -> None:
    """As the eviction API counts: a share of the pods is rounded up."""
    budgets = {each["metadata"]["name"]: each["spec"] for each in of_kind(built["cpu"], "PodDisruptionBudget")}
    for name, template in pod_templates(built["cpu"]):
        assert budgets[name]["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
        if name.startswith("mesh-shard"):
            share = int(budgets[name]["minAvailable"].removesuffix("%"))
            may_go = [replicas - -(-replicas * share // 100) for replicas in (1, 2, 3)]
            assert may_go == [0, 1, 1]


def test_ranges_cover_the_model_and_select_their_own_pods(built: dict[str, list[dict[str, Any]]]) -> None:
    seen, layers = set(), []
    for each in of_kind(built["cpu"], "StatefulSet"):
        selector = tuple(sorted(each["spec"]["selector"]["matchLabels"].items()))
        assert selector not in seen
        seen.add(selector)
        assert set(selector) <= set(each["spec"]["template"]["metadata"]["labels"].items())
        if each["metadata"]["name"] != "mesh-nats":
            values = {
                one["name"]: one.get("value", POD_FIELDS.get(one["name"]))
                for one in each["spec"]["template"]["spec"]["containers"][0]["env"]
            }
            layers.append(values["LAYERS"])
    assert layers == [str(one) for one in even_ranges(30, 3)]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_containers_are_started_with_arguments_and_keys_that_exist(built: dict[str, list[dict[str, Any]]], overlay: str) -> None:
    for name, template in pod_templates(built[overlay]):
        (container,) = template["spec"]["containers"]
        values = {one["name"]: one.get("value") or POD_FIELDS[one["name"]] for one in container["env"]}
        check_environment(values)
        if name != "mesh-nats":
            args = parsed([filled(part, values) for part in container["args"]])
            assert getattr(args, "gpu", False) == (overlay == "gpu" and "shard" in name)


def test_the_configuration_of_the_coordinators_is_one(built: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    (config,) = of_kind(built["cpu"], "ConfigMap")
    (tmp_path / "config.yaml").write_text(config["data"]["config.yaml"])
    assert load_config(tmp_path / "config.yaml", CoordinatorConfig).distributed.replication_factor == 2


def test_policies_let_through_what_the_pods_use_and_nothing_else(built: dict[str, list[dict[str, Any]]]) -> None:
    """Each pair of pods, and each port that either listens on, against the policies as Kubernetes reads them."""
    pods = {name: template["metadata"]["labels"] for name, template in pod_templates(built["cpu"])}
    policies = [each["spec"] for each in of_kind(built["cpu"], "NetworkPolicy")]

    def selects(selector: dict[str, Any], labels: dict[str, str]) -> bool:
        return bool(selector.get("matchLabels", {}).items() <= labels.items())

    def allows(direction: str, of: str, to: str, port: int) -> bool:
        side, rules = ("from", "ingress") if direction == "Ingress" else ("to", "egress")
        mine = [policy for policy in policies if direction in policy["policyTypes"] and selects(policy["podSelector"], pods[of])]
        assert mine, f"{of} is free in {direction}"
        for policy in mine:
            for rule in policy.get(rules, ()):
                peers = rule.get(side)
                peer = peers is None or any("podSelector" in one and selects(one["podSelector"], pods[to]) for one in peers)
                if peer and any(one["port"] == port for one in rule["ports"]):
                    return True
        return False

    allowed = {
        (source, target, port)
        for source in pods
        for target in pods
        for port in (4222, 6222, 8222, 8080, 9091)
        if allows("Egress", source, target, port) and allows("Ingress", target, source, port)
    }
    clients = [name for name in pods if name != "mesh-nats"]
    assert allowed == {(name, "mesh-nats", 4222) for name in clients} | {("mesh-nats", "mesh-nats", 6222)}


def test_the_secrets_are_what_the_pods_mount(built: dict[str, list[dict[str, Any]]], tmp_path: Path) -> None:
    documents = make_secrets.documents(tmp_path, ["llm.example.org"])
    for document in documents:
        check_strictly(document)
    assert make_secrets.documents(tmp_path, ["llm.example.org"]) == documents
    made = {each["metadata"]["name"] for each in documents}
    mounted = {
        volume["secret"]["secretName"]
        for _, template in pod_templates(built["cpu"])
        for volume in template["spec"]["volumes"]
        if "secret" in volume
    }
    assert mounted == made
    paths = {
        one["value"]
        for _, t in pod_templates(built["cpu"])
        for one in t["spec"]["containers"][0]["env"]
        if one.get("value", "").startswith("/keys/own/")
    }
    for name in ("mesh-coordinator", "mesh-shard"):
        (data,) = (each["stringData"] for each in documents if each["metadata"]["name"] == name)
        assert {Path(path).name for path in paths} <= data.keys()


def test_nats_server_takes_the_configuration_of_the_secret(tmp_path: Path) -> None:
    (data,) = (
        each["stringData"] for each in make_secrets.documents(tmp_path / "keys", ["localhost"]) if each["metadata"]["name"] == "mesh-nats"
    )
    own = tmp_path / "own"
    own.mkdir()
    for name, text in data.items():
        (own / name).write_text(text.replace("/keys/own", str(own)).replace("/var/lib/mesh", str(tmp_path)))
    command = [find_binary(), "--config", str(own / "nats.conf"), "-t"]
    done = subprocess.run(dying_with_parent(command), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


# -- health ------------------------------------------------------------------------------------------------------------


def test_the_health_of_a_shard_is_told(run: Run, server: NatsServer, model: Path) -> None:
    """Against a real shard: before it has loaded, while it serves, with a compute thread that does not answer, and gone."""

    async def asked(url: str) -> dict[str, bool]:
        status, why = await asyncio.to_thread(mesh_health.asked, url)
        return {question: mesh_health.is_well(question, status, why) for question in ("ready", "live")}

    async def work() -> None:
        http = ShardHttp(Listener.bind(ListenerOptions(port=0, grace_s=0)), check_interval_s=0.05, timeout_s=0.2)
        url = f"{http.listener.url}/api/v1/health"
        answering = asyncio.create_task(http.run())
        try:
            async with await connect(server), shards(server.url, model, [LayerRange(0, 3)]) as (shard,):
                assert await asked(url) == {"ready": False, "live": True}
                http.shard = shard
                assert await asked(url) == {"ready": True, "live": True}
                release = asyncio.Event()
                loop = asyncio.get_running_loop()
                assert shard._compute is not None
                shard._compute.submit(lambda: asyncio.run_coroutine_threadsafe(release.wait(), loop).result(), lambda result, error: None)

                async def is_dead() -> bool:
                    return not (await asked(url))["live"]

                await until(is_dead, because="a probe asks, and the compute thread must be silent for `timeout_s` first")
                release.set()
        finally:
            http.listener.stop(now=True)
            await answering
        assert await asked(url) == {"ready": False, "live": False}

    run(work())


def test_a_question_that_is_none_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["mesh-health", "well"])
    assert mesh_health.main() == 2 and "mesh-health live" in capsys.readouterr().err
