"""terraform/: formatted, valid, its own tests pass, and its variables are those that `mesh plan --terraform` writes. No network, no AWS."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import terraform_docs
from places import ROOT
from terraform_tools import TERRAFORM, Environment

from mesh.model.manifest import Manifest
from mesh.model.memory import ModelShape
from mesh.planner.plan import place
from mesh.planner.request import PlanRequest, same_nodes
from mesh.planner.terraform import terraform_variables

HERE = ROOT / "terraform"
needs_terraform = pytest.mark.skipif(TERRAFORM is None, reason="terraform is not installed")


@needs_terraform
def test_every_file_is_formatted() -> None:
    done = subprocess.run([str(TERRAFORM), "fmt", "-check", "-recursive", "-diff"], cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_terraform
@pytest.mark.parametrize("name", ["local", "aws", "aws-state"])
def test_an_environment_is_valid(name: str, tmp_path: Path) -> None:
    site = Environment(tmp_path, name)
    site.init("-backend=false")
    site.run("validate")


@needs_terraform
@pytest.mark.parametrize("name", ["../modules/inventory", "aws"])
def test_its_own_tests_pass(name: str, tmp_path: Path) -> None:
    site = Environment(tmp_path, name)
    site.init("-backend=false")
    done = site.run("test")
    assert re.search(r"Success! \d+ passed, 0 failed", done.stdout), done.stdout


def test_every_variable_and_output_is_described() -> None:
    for file in HERE.rglob("*.tf"):
        for kind, name, body in re.findall(r'^(variable|output) "(\w+)" \{\n(.*?)^\}', file.read_text(), re.M | re.S):
            assert re.search(r"^  description += ", body, re.M), f"{file.relative_to(ROOT)}: {name} has no description"
            assert kind == "output" or re.search(r"^  type += ", body, re.M), f"{file.relative_to(ROOT)}: {name} has no type"


def test_no_port_of_ssh_is_open_and_nothing_comes_from_everywhere() -> None:
    text = (HERE / "modules" / "network" / "security.tf").read_text()
    ingress = re.findall(r'resource "aws_vpc_security_group_ingress_rule".*?^\}', text, re.M | re.S)
    assert ingress and not any("0.0.0.0/0" in rule for rule in ingress)
    assert not re.search(r"\b22\b", text)


def test_the_variables_are_those_that_mesh_plan_writes(model: Path) -> None:
    shape = ModelShape.of(Manifest.load(model))
    written = json.loads(terraform_variables(place(PlanRequest(model=shape, nodes=same_nodes(2, 10**9), replication_factor=2))))
    placement = written["placement"]
    for environment in ("local", "aws"):
        text = (HERE / "environments" / environment / "variables.tf").read_text()
        (declared,) = re.findall(r'^variable "placement" \{\n(.*?)^\}', text, re.M | re.S)
        top, _, shards = declared.partition("shards")
        assert set(re.findall(r"^    (\w+) += ", top, re.M)) <= set(placement)
        assert set(re.findall(r"^      (\w+) += ", shards, re.M)) <= set(placement["shards"][0])
        assert {"shard_id", "node", "layers_start", "layers_end", "memory_bytes"} <= set(re.findall(r"^      (\w+) += ", shards, re.M))


def test_the_tables_are_those_of_the_variables() -> None:
    readme = (HERE / "README.md").read_text()
    assert readme == terraform_docs.page(readme), "run deploy/provision/terraform_docs.py"
