"""terraform/environments/aws from nothing to nothing against moto: applied, unchanged by a second plan, scaled, destroyed.

`make test-provision` runs this file. It takes minutes, because Terraform waits for load balancers by the clock.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from terraform_tools import MOTO, TERRAFORM, Environment, moto

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(TERRAFORM is None, reason="terraform is not installed"),
    pytest.mark.skipif(MOTO is None, reason="moto is not installed: make provision-tools"),
    pytest.mark.skipif(not os.environ.get("MESH_TEST_PROVISION"), reason="takes minutes: make test-provision"),
]

REGION = "eu-central-1"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ0ZJ1nQ0m1zq3s8b8x3cW5m8wq7o0Q2m5b3lqJqgJq5 test"
GIB = 1024**3


def shard(number: int, node: str, start: int, end: int) -> dict[str, Any]:
    return {"shard_id": number, "node": node, "layers_start": start, "layers_end": end, "memory_bytes": 9 * GIB, "weights_bytes": 6 * GIB}


PLACEMENT = {
    "model": "a-model",
    "replication_factor": 2,
    "overlap_layers": 0,
    "batch_size": 8,
    "max_sequence_length": 2048,
    "enable_kv_cache": True,
    "shards": [shard(1, "node-1", 0, 10), shard(2, "node-2", 10, 20), shard(3, "node-3", 0, 10), shard(4, "node-4", 10, 20)],
}


def aws(environment: dict[str, str], action: str, **parameters: str) -> str:
    """A request to EC2, as a word to the server in AWS's place."""
    request = {"Action": action, "Version": "2016-11-15", **parameters}
    headers = {"Authorization": f"AWS4-HMAC-SHA256 Credential=test/20260101/{REGION}/ec2/aws4_request, SignedHeaders=host, Signature=0"}
    answer = httpx.post(environment["AWS_ENDPOINT_URL"], data=request, headers=headers, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.text


def without_policy(environment: dict[str, str], bucket: str) -> None:
    """moto refuses every request to a bucket with a policy that denies what is not encrypted, because it reads no conditions."""
    headers = {"Authorization": f"AWS4-HMAC-SHA256 Credential=test/20260101/{REGION}/s3/aws4_request, SignedHeaders=host, Signature=0"}
    httpx.delete(f"{environment['AWS_ENDPOINT_URL']}/{bucket}?policy", headers=headers, timeout=30).raise_for_status()


def test_aws_from_nothing_to_nothing(tmp_path: Path) -> None:
    with moto(tmp_path) as environment:
        state = Environment(tmp_path, "aws-state", environment)
        state.variables(region=REGION, bucket="test-state", destroy_state=True)
        state.init()
        state.run("apply", "-auto-approve", "-input=false")
        without_policy(environment, "test-state")

        site = Environment(tmp_path, "aws", environment)
        values = {
            "region": REGION,
            "ssh_public_key": KEY,
            "models_bucket": "test-models",
            "ami": "ami-12c6146b",
            "destroy_models": True,
            "client_cidrs": ["203.0.113.0/24"],
            "placement": PLACEMENT,
        }
        site.variables(**values)
        backend = {"bucket": "test-state", "key": "mesh/terraform.tfstate", "region": REGION, "encrypt": "true", "use_lockfile": "true"}
        site.init(*(f"-backend-config={key}={value}" for key, value in backend.items()))
        applied = site.run("apply", "-auto-approve", "-input=false")
        print(next(line for line in applied.stdout.splitlines() if line.startswith("Apply complete")))
        outputs = site.outputs()
        assert outputs["instance_types"] == {
            f"node-{number}": "r7i.large" for number in range(1, 5)
        }  # 9 GiB and 1.5 beside them do not fit into 8
        hosts = yaml.safe_load(outputs["inventory"])["all"]["children"]["mesh"]["children"]
        assert {group: len(found["hosts"] or {}) for group, found in hosts.items()} == {
            "nats": 3,
            "coordinators": 2,
            "shards": 4,
            "gateway": 0,
            "monitoring": 1,
        }
        site.run("plan", "-detailed-exitcode", "-input=false")  # 0: nothing to change
        assert "PRIVATE KEY" not in site.run("state", "pull").stdout

        # an API that opens something to all, or leaves a disk readable, would be seen here as it would be in AWS
        volumes = aws(environment, "DescribeVolumes")
        assert volumes.count("<encrypted>true</encrypted>") == 10
        assert "<encrypted>false" not in volumes

        site.variables(**values, extra_shards=[shard(5, "node-5", 0, 10)])
        scaled = site.run("apply", "-auto-approve", "-input=false").stdout
        assert "1 added, 0 changed, 0 destroyed" in scaled
        inventory = yaml.safe_load(site.outputs()["inventory"])["all"]["children"]["mesh"]["children"]
        assert [found["id"] for found in inventory["shards"]["hosts"]["node-5"]["mesh_shards"]] == [5]

        # moto invents attributes of hooks and templates that nobody gave, so a plan of this part is never empty there
        site.variables(**values, spot_replicas=2)
        site.run("apply", "-auto-approve", "-input=false")
        groups = site.run("state", "list").stdout.splitlines()
        assert len([line for line in groups if "aws_autoscaling_lifecycle_hook.drain" in line]) == 2

        # moto lets an instance wait at its hook for ever: nothing in it says that the termination may go on
        site.run("destroy", "-auto-approve", "-input=false", "-target=module.spot[0].aws_autoscaling_lifecycle_hook.drain")

        without_policy(environment, "test-models")
        site.run("destroy", "-auto-approve", "-input=false")
        assert site.run("state", "list").stdout.strip() == ""
        assert "<item><instanceId>" not in _running(environment)
        state.run("destroy", "-auto-approve", "-input=false")


def _running(environment: dict[str, str]) -> str:
    filters = {"Filter.1.Name": "instance-state-name", "Filter.1.Value.1": "running"}
    return aws(environment, "DescribeInstances", **filters)


def test_a_plan_that_no_type_can_hold_says_what_would(tmp_path: Path) -> None:
    with moto(tmp_path) as environment:
        site = Environment(tmp_path, "aws", environment)
        site.variables(
            region=REGION, ssh_public_key=KEY, models_bucket="m", ami="ami-12c6146b", placement=PLACEMENT,
            instance_types=[{"name": "small", "memory_gib": 8}],
        )  # fmt: skip
        (site.path / "override.tf").write_text('terraform {\n  backend "local" {}\n}\n')
        site.init()
        done = site.run("plan", "-input=false", codes=(1,))
        said = " ".join((done.stdout + done.stderr).replace("│", " ").split())
        assert "No type of instance_types has the memory of node-1 (10.0 GiB), node-2 (10.0 GiB)" in said
