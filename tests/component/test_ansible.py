"""ansible/ without hosts: syntax, lints, options that are all declared, and configurations that the mesh itself reads."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml
from ansible_tools import ANSIBLE, TOOLS
from places import ROOT

from mesh.settings.schema import CoordinatorConfig, ShardConfig, load_config

HERE = ROOT / "ansible"
ROLES = sorted(path.name for path in (HERE / "roles").iterdir())
PLAYBOOKS = sorted(path.stem for path in (HERE / "playbooks").glob("*.yml"))
INVENTORY = """
all:
  children:
    mesh:
      vars: {mesh_model: tiny, mesh_shards_count: 2, mesh_replication_factor: 1, mesh_overlap_layers: 0, mesh_batch_size: 4,
             mesh_max_sequence_length: 512, mesh_enable_kv_cache: true}
      children:
        nats: {hosts: {a: {mesh_address: 127.0.0.1}}}
        coordinators: {hosts: {a: {mesh_address: 127.0.0.1}}}
        shards: {hosts: {b: {mesh_address: 127.0.0.2, mesh_shards: [{id: 1, layers: 0-2, max_memory_gb: 1.5}]}}}
        gateway: {hosts: {}}
        monitoring: {hosts: {}}
"""
needs_ansible = pytest.mark.skipif(ANSIBLE is None, reason="ansible-playbook is not installed: make provision-tools")


@pytest.mark.parametrize("role", ROLES)
def test_every_option_of_a_role_is_declared(role: str) -> None:
    folder = HERE / "roles" / role
    specs = yaml.safe_load((folder / "meta" / "argument_specs.yml").read_text())["argument_specs"]
    declared = set(specs["main"]["options"])
    defaults = folder / "defaults" / "main.yml"
    found = set(yaml.safe_load(defaults.read_text())) if defaults.exists() else set()
    assert found <= declared, f"{role}: not in meta/argument_specs.yml: {found - declared}"
    required = {name for name, option in specs["main"]["options"].items() if option.get("required")}
    assert declared - found <= required, f"{role}: neither required nor in defaults/main.yml: {declared - found - required}"
    for name, option in specs["main"]["options"].items():
        assert name.startswith(f"{role}_") and option["description"], name
    entries = {path.stem for path in (folder / "tasks").glob("*.yml")}
    assert set(specs) <= entries


@needs_ansible
@pytest.mark.slow
def test_the_syntax_of_every_playbook(tmp_path: Path) -> None:
    inventory = tmp_path / "inventory.yml"
    inventory.write_text(INVENTORY)
    done = _run([ANSIBLE, "--syntax-check", "-i", inventory, *(f"playbooks/{name}.yml" for name in PLAYBOOKS)])
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (TOOLS / "ansible-lint").exists(), reason="ansible-lint is not installed: make provision-tools")
def test_the_lints_of_production() -> None:
    done = _run([TOOLS / "ansible-lint", "--offline", "--profile", "production", "--nocolor"])
    assert done.returncode == 0, done.stdout + done.stderr


def _run(command: list[Any]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{TOOLS}:{os.environ['PATH']}", "ANSIBLE_NOCOLOR": "1"}
    return subprocess.run(list(map(str, command)), cwd=HERE, env=environment, capture_output=True, text=True, timeout=300)


def render(role: str, template: str, **values: Any) -> str:
    """A template as Ansible renders it, with the defaults of its role."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True, autoescape=False)
    environment.filters |= {
        "to_json": json.dumps,
        "split": lambda text, by=" ": text.split(by),
        "combine": lambda one, other: {**one, **other},
    }
    return environment.from_string((HERE / "roles" / role / "templates" / template).read_text()).render(**values)


def test_the_mesh_reads_the_configuration_of_a_shard(tmp_path: Path) -> None:
    options = {
        "process": {"id": 3, "layers": "10-20", "max_memory_gb": 1.5},
        "urls": ["tls://10.0.0.1:4222"],
        "model": "tiny",
        "replication_mode": "mirror",
        "overlap_layers": 1,
        "worker_threads": 2,
        "enable_gpu": False,
        "batch_size": 4,
        "max_sequence_length": 512,
        "enable_kv_cache": True,
        "drain_timeout": "30s",
        "log_level": "info",
        "otlp_endpoint": "",
    }
    values = {f"shard_{name}": value for name, value in options.items()}
    ports = {"mesh_shard_http_base": 8100, "mesh_shard_metrics_base": 9200}
    text = render("shard", "config.yaml.j2", mesh_address="10.0.0.2", **ports, **values)
    (tmp_path / "config.yaml").write_text(text)
    config = load_config(tmp_path / "config.yaml", ShardConfig)
    assert (config.shard.shard_id, config.model.layers_start, config.model.layers_end) == (3, 10, 20)
    assert (config.shard.listen_host, config.shard.listen_port, config.metrics.port) == ("127.0.0.1", 8103, 9203)
    assert config.nats.nkey_seed_file == "/etc/mesh/shard-3/shard-3.nk" and config.resources.worker_threads == 2


def test_the_mesh_reads_the_configuration_of_a_coordinator(tmp_path: Path) -> None:
    options = {
        "name": "coordinator-a",
        "urls": ["tls://10.0.0.1:4222"],
        "model": "tiny",
        "shards_count": 3,
        "replication_factor": 2,
        "max_connections": 1000,
        "failover_timeout": "30s",
        "health_check_interval": "5s",
        "load_balancing_strategy": "least_loaded",
        "max_pool_size_gb": 1,
        "enable_compression": False,
        "authentication": {"requests_per_minute": 60},
        "log_level": "info",
        "otlp_endpoint": "http://10.0.0.9:4318",
    }
    values = {f"coordinator_{name}": value for name, value in options.items()}
    text = render("coordinator", "config.yaml.j2", mesh_address="10.0.0.1", mesh_http_port=8080, mesh_metrics_port=9091, **values)
    (tmp_path / "config.yaml").write_text(text)
    config = load_config(tmp_path / "config.yaml", CoordinatorConfig)
    assert config.authentication.enabled and config.authentication.algorithm == "EdDSA" and config.authentication.requests_per_minute == 60
    assert config.tls is not None and config.coordinator.listen_host == "10.0.0.1"
    assert config.tracing.otlp_endpoint == "http://10.0.0.9:4318" and config.nats.inbox_prefix == "_INBOX.coordinator-a"


def test_the_units_have_the_guides_names_and_drain() -> None:
    units = {path.name: path.read_text() for path in (HERE / "roles").rglob("*.service.j2")}
    assert set(units) == {"mesh-coordinator.service.j2", "mesh-shard@.service.j2", "mesh-nats.service.j2"}
    for name, text in units.items():
        assert "hardening.j2" in text and "TimeoutStopSec=" in text and "Restart=" in text, name
        assert not re.search(r"^User=root", text, re.M)
    assert "KillSignal=SIGUSR2" in units["mesh-nats.service.j2"]  # a lame duck
