"""The pods of deploy/kubernetes for `podman kube play`, which knows no StatefulSet: one manifest a pod, as the controllers would make it.

What podman lacks is replaced: claims by volumes of podman, services by addresses in /etc/hosts, probes over HTTP by none. Podman 4.3 mounts
Secrets without decoding them, shares volumes of one name between pods, publishes every port
and leaves `$(NAME)` in arguments: so Secrets become ConfigMaps, volumes get the pod's name, ports go, and arguments are filled in.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

__all__ = ["NETWORK", "SUBNET", "Pod", "pods"]

NETWORK, SUBNET = "meshkube", "172.30.241"


@dataclass(frozen=True)
class Pod:
    """`ip`: its address in NETWORK. `text`: the manifests, its Secrets and ConfigMaps included."""

    name: str
    ip: str
    text: str


def pods(
    documents: list[dict[str, Any]], secrets: list[dict[str, Any]], image: str, ports: dict[str, dict[int, int]], ranges: list[str]
) -> Iterator[Pod]:
    """Three nats-servers, one coordinator, one shard of each range. `ports`: of this machine, by pod and port of the pod. `ranges`: the
    layers of each, for the model that is served."""
    wanted = [(each, number) for each in documents if each["kind"] in ("StatefulSet", "Deployment") for number in _replicas(each)]
    wanted.sort(key=lambda item: item[0]["metadata"]["name"] != "mesh-nats")
    addresses = {f"{each['metadata']['name']}-{number}": f"{SUBNET}.{10 + index}" for index, (each, number) in enumerate(wanted)}
    servers = {name: ip for name, ip in addresses.items() if name.startswith("mesh-nats-")}
    aliases = [{"ip": ip, "hostnames": [f"{name}.mesh-nats"]} for name, ip in servers.items()]
    aliases.append({"ip": servers["mesh-nats-0"], "hostnames": ["mesh-nats-client"]})
    shared = [_as_config_map(each) for each in secrets] + [each for each in documents if each["kind"] == "ConfigMap"]
    for each, number in wanted:
        name = f"{each['metadata']['name']}-{number}"
        layers = ranges[int(each["metadata"]["name"].rpartition("-")[2]) - 1] if name.startswith("mesh-shard") else ""
        pod = _pod(each, name, image, aliases, ports.get(name, {}), layers)
        used = [volume.get("configMap", {}).get("name") for volume in pod["spec"]["volumes"]]
        mounted = [one for one in shared if one["metadata"]["name"] in used]
        yield Pod(name, addresses[name], yaml.safe_dump_all([*_without_namespace(mounted), pod], sort_keys=False))


def _replicas(each: dict[str, Any]) -> range:
    return range(3 if each["metadata"]["name"] == "mesh-nats" else 1)


def _as_config_map(secret: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": f"secret-{secret['metadata']['name']}"},
        "data": secret["stringData"],
    }


def _without_namespace(documents: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**one, "metadata": {"name": one["metadata"]["name"]}} for one in documents]


def _pod(of: dict[str, Any], name: str, image: str, aliases: list[dict[str, Any]], ports: dict[int, int], layers: str) -> dict[str, Any]:
    template = copy.deepcopy(of["spec"]["template"])
    spec = template["spec"]
    spec.pop("topologySpreadConstraints")
    spec["hostAliases"] = aliases
    spec["restartPolicy"] = "OnFailure"
    for claim in of["spec"].get("volumeClaimTemplates", ()):
        spec["volumes"].append({"name": claim["metadata"]["name"], "emptyDir": {}})
    for volume in spec["volumes"]:
        volume["name"] = f"{name}-{volume['name']}"
        if "emptyDir" in volume:
            volume["emptyDir"] = {}
        if "secret" in volume:
            volume["configMap"] = {"name": f"secret-{volume.pop('secret')['secretName']}"}
    (container,) = spec["containers"]
    for mount in container["volumeMounts"]:
        mount["name"] = f"{name}-{mount['name']}"
    values = {one["name"]: one.get("value", name) for one in container["env"]} | {"LAYERS": layers}
    container["args"] = [re.sub(r"\$\((\w+)\)", lambda found: values[found[1]], part) for part in container["args"]]
    container["image"], container["imagePullPolicy"] = image, "Never"
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        if "httpGet" in container.get(probe, {}):
            del container[probe]
    container["ports"] = [{"containerPort": port, "hostPort": here, "hostIP": "127.0.0.1"} for port, here in ports.items()]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": template["metadata"]["labels"]}, "spec": spec}
