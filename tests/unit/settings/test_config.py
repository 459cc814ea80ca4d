"""The files of the guide are read unchanged. A mistake is an error of one line that names the file, the key and what would be right."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from places import DOCS

from mesh.errors import ConfigError
from mesh.settings.files import ConfigFile, _variables
from mesh.settings.schema import CoordinatorConfig, DistributedConfig, ModelConfig, NetworkConfig, ShardConfig, load_config

DISTRIBUTED = """{
  "model_path": "models/gpt3-175b.onnx",
  "total_layers": 96,
  "shards_count": 8,
  "max_shard_memory_mb": 32768,
  "replication_factor": 2,
  "load_balancing_strategy": "least_loaded"
}"""
MODEL = """
model: {name: "GPT-3-175B", format: "onnx", total_parameters: 175000000000, total_layers: 96, vocab_size: 50257}
sharding:
  strategy: "layer_wise"
  shards_count: 8
  layers_per_shard: 12
  overlap_layers: 1  # For smooth transitions
memory: {max_shard_memory_gb: 32, enable_quantization: true, quantization_bits: 16}
performance: {batch_size: 1, max_sequence_length: 2048, enable_kv_cache: true}
"""
COORDINATOR = """
coordinator: {listen_port: 8080, max_connections: 1000, health_check_interval: 5s}
distributed: {shards_count: 8, replication_factor: 2, failover_timeout: 30s}
memory: {max_pool_size_gb: 64, enable_compression: true}
logging: {level: info, file: /var/log/mesh/coordinator.log}
"""
SHARD = """
shard:
  shard_id: 1
  listen_port: 8080
nats:
  urls: [nats://10.0.1.100:4222]
model:
  shard_path: "/data/model"
  layers_start: 0
  layers_end: 12
resources:
  max_memory_gb: 32
  worker_threads: 16
  enable_gpu: true
health:
  check_interval: 10s
  timeout: 30s
"""
NETWORK = """
network: {coordinator_port: 8080, shard_base_port: 8081, health_check_port: 9090, metrics_port: 9091}
communication: {protocol: "nats", compression: "gzip", timeout_seconds: 30, retry_count: 3}
load_balancing: {strategy: "least_loaded", health_check_interval: 5, failover_timeout: 30}
"""


def _load(tmp_path: Path, text: str, model: type[ConfigFile], name: str = "config.yaml") -> ConfigFile:
    path = tmp_path / name
    path.write_text(text)
    return load_config(path, model)


def _refusal(tmp_path: Path, text: str, model: type[ConfigFile], name: str = "config.yaml") -> str:
    with pytest.raises(ConfigError) as caught:
        _load(tmp_path, text, model, name)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(tmp_path / name)) or "environment variable" in message
    return message


def test_distributed_config(tmp_path: Path) -> None:
    config = _load(tmp_path, DISTRIBUTED, DistributedConfig, "distributed_config.json")
    assert isinstance(config, DistributedConfig)
    assert (config.total_layers, config.shards_count, config.replication_factor) == (96, 8, 2)
    assert config.max_shard_memory_bytes == 32_768_000_000


def test_model_config(tmp_path: Path) -> None:
    config = _load(tmp_path, MODEL, ModelConfig)
    assert isinstance(config, ModelConfig)
    assert (config.bits, config.max_shard_memory_bytes, config.sharding.overlap_layers) == (16, 32 * 10**9, 1)
    off = _load(tmp_path, MODEL.replace("enable_quantization: true", "enable_quantization: false"), ModelConfig)
    assert isinstance(off, ModelConfig) and off.bits == 32


def test_coordinator_config(tmp_path: Path) -> None:
    config = _load(tmp_path, COORDINATOR, CoordinatorConfig)
    assert isinstance(config, CoordinatorConfig)
    assert (config.coordinator.health_check_interval, config.distributed.failover_timeout, config.memory.enable_compression) == (
        5.0,
        30.0,
        True,
    )
    assert config.nats.urls == ("nats://127.0.0.1:4222",)


def test_shard_config(tmp_path: Path) -> None:
    config = _load(tmp_path, SHARD, ShardConfig)
    assert isinstance(config, ShardConfig)
    assert (config.model.layers_start, config.model.layers_end, config.resources.max_memory_bytes) == (0, 12, 32 * 10**9)
    assert config.nats.urls == ("nats://10.0.1.100:4222",)


def test_network_config(tmp_path: Path) -> None:
    config = _load(tmp_path, NETWORK, NetworkConfig)
    assert isinstance(config, NetworkConfig)
    assert (config.communication.timeout_seconds, config.load_balancing.failover_timeout) == (30.0, 30.0)


@pytest.mark.parametrize(
    ("text", "model", "old", "new", "says"),
    [
        (SHARD, ShardConfig, "listen_port:", "coordinator_address:", "shard.coordinator_address: .* set nats.urls"),
        (SHARD, ShardConfig, "check_interval", "chek_interval", "health.chek_interval is not a key here: did you mean check_interval"),
        (SHARD, ShardConfig, "worker_threads", "layers_start", "resources.layers_start is not a key here: it belongs under model"),
        (
            SHARD,
            ShardConfig,
            "worker_threads",
            "zzz",
            "resources.zzz is not a key here: there are max_memory_gb, worker_threads, enable_gpu",
        ),
        (SHARD, ShardConfig, "resources:", "resource:", "resource is not a key here: did you mean resources"),
        (SHARD, ShardConfig, "  shard_id: 1\n", "", "shard.shard_id is missing: add it"),
        (SHARD, ShardConfig, ": 16", ": sixteen", "resources.worker_threads = 'sixteen': should be a valid integer"),
        (SHARD, ShardConfig, ": 16", ": true", "resources.worker_threads = True: should be a valid integer"),
        (SHARD, ShardConfig, ": 32", ": .inf", "resources.max_memory_gb = inf: should be a finite number"),
        (SHARD, ShardConfig, "start: 0", "start: 12", "layers_start 12 and model.layers_end 12 hold no layer"),
        (SHARD, ShardConfig, "10s", "10 parsecs", "health.check_interval = '10 parsecs': .* is not a duration: .* 5s"),
        (SHARD, ShardConfig, "10s", "1m", r"health.timeout \(30 s\) must be longer than health.check_interval \(60 s\)"),
        (SHARD, ShardConfig, "[nats://10.0.1.100:4222]", "[10.0.1.100:4222]", "nats.urls: '10.0.1.100:4222' is not a NATS URL"),
        (SHARD, ShardConfig, "listen_port: 8080", "listen_port: 80800", "shard.listen_port = 80800: should be less than or equal to 65535"),
        (SHARD, ShardConfig, "  layers_start: 0", "  layers_start: 0\n  layers_start: 1", "layers_start is there twice"),
        (SHARD, ShardConfig, "nats:\n", "nats: [\n", "line .* write valid YAML"),
        (SHARD, ShardConfig, "/data/model", "${NOWHERE_TO_BE_FOUND}", "environment variable NOWHERE_TO_BE_FOUND is not set"),
        (
            MODEL,
            ModelConfig,
            "shard: 12",
            "shard: 10",
            "layers_per_shard 10 x sharding.shards_count 8 = 80 is not model.total_layers 96; 12 layers_per",
        ),
        (MODEL, ModelConfig, "shards_count: 8", "shards_count: 97", "sharding.shards_count 97 is more than model.total_layers 96"),
        (MODEL, ModelConfig, "bits: 16", "bits: 5", "memory.quantization_bits = 5: should be 16, 8 or 4"),
        (MODEL, ModelConfig, "layer_wise", "tensor_wise", "sharding.strategy = 'tensor_wise': should be 'layer_wise'"),
        (NETWORK, NetworkConfig, '"nats"', '"http"', "communication.protocol = 'http': should be 'nats'"),
        (NETWORK, NetworkConfig, "9091", "9090", "network.health_check_port and network.metrics_port are both 9090"),
        (COORDINATOR, CoordinatorConfig, "30s", "2s", "failover_timeout .2 s. must be longer"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, model: type[ConfigFile], old: str, new: str, says: str) -> None:
    assert old in text
    message = _refusal(tmp_path, text.replace(old, new), model)

    assert re.search(says, message), message


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"total_layers": 96', '"total_layers": "96"', "total_layers = '96': should be a valid integer"),
        ('"total_layers"', '"total_layer"', "total_layer is not a key here: did you mean total_layers"),
        ('"shards_count": 8', '"shards_count": 8, "shards_count": 9', "shards_count is there twice"),
        ('"least_loaded"', '"random"', "'least_loaded', 'round_robin' or 'queue_group'"),
        ("{", "[", "line .* write valid JSON"),
        (
            "8,",
            '8, "layers_per_shard": 11,',
            "layers_per_shard 11 x shards_count 8 = 88 is not total_layers 96; 12 layers_per_shard would be right",
        ),
    ],
)
def test_a_mistake_in_json_is_named(tmp_path: Path, old: str, new: str, says: str) -> None:

    assert re.search(says, message := _refusal(tmp_path, DISTRIBUTED.replace(old, new, 1), DistributedConfig, "distributed_config.json")), (
        message
    )


@pytest.mark.parametrize("text", ["", "just words", "[1, 2]", "1: 2"])
def test_a_wrong_configuration_is_refused(tmp_path: Path, text: str) -> None:
    assert "sections with keys" in _refusal(tmp_path, text, ShardConfig)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml", ShardConfig)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        load_config(tmp_path / "binary.yaml", ShardConfig)


@pytest.mark.parametrize("name", ["MESH_MODEL__LAYERS_END", "MESH_MODEL_LAYERS_END", "MESH_LAYERS_END"])
def test_the_environment_wins_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "24")
    monkeypatch.setenv("MESH_NATS_URLS", "nats://a:4222, tls://b:4222")
    monkeypatch.setenv("MESH_RESOURCES__ENABLE_GPU", "false")
    config = _load(tmp_path, SHARD, ShardConfig)
    assert isinstance(config, ShardConfig)
    assert (config.model.layers_start, config.model.layers_end, config.resources.enable_gpu) == (0, 24, False)
    assert config.nats.urls == ("nats://a:4222", "tls://b:4222")


def test_the_environment_can_complete_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_SHARD_ID", "7")
    config = _load(tmp_path, SHARD.replace("  shard_id: 1\n", ""), ShardConfig)
    assert isinstance(config, ShardConfig) and config.shard.shard_id == 7


def test_a_mistake_in_the_environment_names_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("MESH_LISTEN_PORT", "http")
        assert "(from the environment variable MESH_LISTEN_PORT)" in _refusal(tmp_path, SHARD, ShardConfig)
    monkeypatch.setenv("MESH_SHARD__LISTN_PORT", "1")
    assert "did you mean MESH_SHARD__LISTEN_PORT" in _refusal(tmp_path, SHARD, ShardConfig)


def test_unrelated_variables_and_single_words_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MESH_FILE", "MESH_TIMEOUT", "MESH_URLS", "MESH_ELSEWHERE__KEY", "SHARD_ID"):
        monkeypatch.setenv(name, "nonsense")
    assert _load(tmp_path, SHARD, ShardConfig) == _load(tmp_path, SHARD, ShardConfig)
    config = _load(tmp_path, SHARD, ShardConfig)
    assert isinstance(config, ShardConfig) and config.logging.file is None and config.shard.shard_id == 1


def test_references_are_replaced_and_numbers_in_text_stay_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATA_ROOT", "/mnt/models")
    monkeypatch.setenv("MESH_LOGGING__FILE", "2026")
    config = _load(tmp_path, SHARD.replace("/data/model", "${DATA_ROOT}/a"), ShardConfig)
    assert isinstance(config, ShardConfig)
    assert (config.model.shard_path, config.logging.file) == ("/mnt/models/a", "2026")


def test_a_secret_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = COORDINATOR + "nats: {user: mesh, password: [hunter2]}"
    assert "hunter2" not in _refusal(tmp_path, wrong, CoordinatorConfig)
    monkeypatch.setenv("SECRET", "hunter2")
    config = _load(tmp_path, COORDINATOR + "nats: {user: mesh, password: '${SECRET}'}", CoordinatorConfig)
    assert isinstance(config, CoordinatorConfig) and config.nats.password is not None
    assert config.nats.password.get_secret_value() == "hunter2" and "hunter2" not in repr(config)
    monkeypatch.setenv("MESH_NATS_PASSWORD", "12345")  # a text, whatever YAML would make of it
    config = _load(tmp_path, COORDINATOR + "nats: {user: mesh}", CoordinatorConfig)
    assert isinstance(config, CoordinatorConfig) and config.nats.password is not None
    assert config.nats.password.get_secret_value() == "12345"
    twice = COORDINATOR + "nats: {user: mesh, credentials_file: a.creds}"
    assert "credentials_file and user each say who connects" in _refusal(tmp_path, twice, CoordinatorConfig)


@pytest.mark.parametrize("model", [CoordinatorConfig, ShardConfig, DistributedConfig, ModelConfig])
def test_every_key_is_documented(model: type[ConfigFile]) -> None:
    text = (DOCS / "configuration.md").read_text()
    for path, _, _ in _variables(model):
        section, key = path[0], path[-1]
        assert f"{key}`" in text or (f"`{section}`" in text and section in ("tls", "authentication")), ".".join(path)
