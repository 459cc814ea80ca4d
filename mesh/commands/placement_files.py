"""The files that `mesh shard-model` writes: placement.json, a config.yaml for each shard, and one for the coordinator."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mesh.errors import ConfigError
from mesh.planner.placement import PlacedShard, Placement
from mesh.settings.defaults import DEFAULT_HTTP_PORT
from mesh.settings.schema import DistributedConfig, NetworkConfig
from mesh.settings.units import GB

__all__ = ["Target", "write_files"]

_HEADER = "# Written by `mesh shard-model`; the next run of it writes it anew.\n"


@dataclass(frozen=True)
class Target:
    """The machines that the files are for. `shard_path`: where a shard finds its model there. `nats`: URLs, comma separated. `given`:
    `network` was read from a file."""

    shard_path: str
    nats: str
    network: NetworkConfig
    given: bool

    @property
    def nats_section(self) -> dict[str, Any]:
        return {"urls": [url.strip() for url in self.nats.split(",")]}


def write_files(placement: Placement, config: DistributedConfig, out: Path, target: Target) -> None:
    """Write placement.json at `out` and the configurations beside it. Remove those of an earlier, larger placement. ConfigError: a file
    cannot be written; then all are as they were."""
    files = {out: placement.to_json().decode()}
    documents = {f"shard_{shard.shard_id}": _shard(shard, placement, config, target) for shard in placement.shards}
    documents["coordinator"] = _coordinator(placement, config, target)
    for folder, document in documents.items():
        files[out.parent / folder / "config.yaml"] = _HEADER + yaml.safe_dump(document, sort_keys=False)
    try:
        for path, text in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            _fresh(path).write_text(text, encoding="utf-8")
        for path in files:
            _fresh(path).replace(path)
        _remove_older(out.parent, files)
    except OSError as error:
        for path in files:
            with suppress(OSError):  # it may be the folder that cannot be
                _fresh(path).unlink()
        raise ConfigError(f"{error.filename}: {error.strerror}: give a place that can be written with --out") from None


def _shard(shard: PlacedShard, placement: Placement, config: DistributedConfig, target: Target) -> dict[str, Any]:
    network = target.network.network
    port = network.shard_base_port + shard.shard_id - 1 if target.given else DEFAULT_HTTP_PORT
    document: dict[str, Any] = {
        "shard": {"shard_id": shard.shard_id, "listen_port": port},
        "nats": target.nats_section,
        "model": {
            "shard_path": target.shard_path,
            "layers_start": shard.layers_start,
            "layers_end": shard.layers_end,
            "overlap_layers": placement.overlap_layers,
        },
        "resources": {"max_memory_gb": config.max_shard_memory_bytes / GB},
        "performance": {
            "batch_size": placement.batch_size,
            "max_sequence_length": placement.max_sequence_length,
            "enable_kv_cache": placement.enable_kv_cache,
        },
    }
    if target.given:
        document |= {"health": {"port": network.health_check_port}, "metrics": {"port": network.metrics_port}}
    return document


def _coordinator(placement: Placement, config: DistributedConfig, target: Target) -> dict[str, Any]:
    network, talk, balance = target.network.network, target.network.communication, target.network.load_balancing
    document: dict[str, Any] = {
        "coordinator": {"listen_port": network.coordinator_port},
        "nats": target.nats_section,
        "distributed": {
            "shards_count": config.shards_count,
            "replication_factor": config.replication_factor,
            "load_balancing_strategy": placement.load_balancing_strategy,
        },
    }
    if target.shard_path.startswith("models:"):
        document["model"] = {"name": target.shard_path.removeprefix("models:")}
    else:
        document["model"] = {"path": target.shard_path}
    if target.given:
        document["coordinator"] |= {"health_check_interval": balance.health_check_interval, "retry_count": talk.retry_count}
        document["distributed"] |= {
            "failover_timeout": balance.failover_timeout,
            "step_timeout": talk.timeout_seconds,
            "load_balancing_strategy": balance.strategy,
        }
        document |= {"memory": {"enable_compression": talk.compression != "none"}, "metrics": {"port": network.metrics_port}}
    return document


def _remove_older(folder: Path, files: Collection[Path]) -> None:
    """Remove the configurations of shards that this placement does not have, where an earlier run wrote them."""
    for path in folder.glob("shard_*/config.yaml"):
        if path not in files and re.fullmatch(r"shard_\d+", path.parent.name) and path.read_text(encoding="utf-8").startswith(_HEADER):
            path.unlink()
            if not any(path.parent.iterdir()):
                path.parent.rmdir()


def _fresh(path: Path) -> Path:
    return path.with_name(path.name + ".new")
