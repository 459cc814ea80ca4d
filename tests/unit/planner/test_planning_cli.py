"""`mesh plan` and `mesh shard-model` as a user meets them: what is printed, written, refused, and the exit code."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path

import pytest
import yaml

from mesh.commands.planning import add_plan_parser, add_shard_model_parser, shard_model_command
from mesh.errors import BadLayerRange, ConfigError, DoesNotFit, MeshError, ModelNotFound, PlanError
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.model.manifest import BlockInfo, CacheInfo, HiddenInfo, Manifest, WeightsInfo, block_name
from mesh.model.memory import ModelShape, predict
from mesh.planner.from_config import parse_nodes, parse_range, parse_ranges
from mesh.planner.placement import Placement
from mesh.planner.plan import place
from mesh.planner.request import PlanRequest, same_nodes
from mesh.settings.schema import CoordinatorConfig, ShardConfig, load_config
from mesh.settings.units import GB
from mesh.types import LayerRange, even_ranges

LAYERS = 6
MODEL_YAML = """
model: {name: "GPT-3-175B", format: "onnx", total_parameters: 175000000000, total_layers: 96, vocab_size: 50257}
sharding: {strategy: "layer_wise", shards_count: 8, layers_per_shard: 12, overlap_layers: 1}
memory: {max_shard_memory_gb: 32, enable_quantization: true, quantization_bits: 16}
performance: {batch_size: 1, max_sequence_length: 2048, enable_kv_cache: true}
"""
GUIDE_JSON = {
    "model_path": "models/gpt3-175b.onnx",
    "total_layers": 96,
    "shards_count": 8,
    "max_shard_memory_mb": 32768,
    "replication_factor": 2,
    "load_balancing_strategy": "least_loaded",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mesh")
    subparsers = parser.add_subparsers(required=True)
    add_plan_parser(subparsers)
    add_shard_model_parser(subparsers)
    return parser


def _mesh(*words: object) -> int:
    args = _parser().parse_args([str(word) for word in words])
    code: int = args.run(args)
    return code


def _write_model(directory: Path) -> Manifest:
    def block(name: str, parameters: int) -> BlockInfo:
        return BlockInfo(name=name, files=(), weight_bytes=4 * parameters, parameters=parameters)

    manifest = Manifest(
        name="tiny",
        architecture="any",
        source="onnx",
        layers=LAYERS,
        vocab_size=1000,
        context_length=256,
        hidden=HiddenInfo(size=64, dtype="float32"),
        cache=(CacheInfo(kv_heads=4, key_dim=16, value_dim=16),) * LAYERS,
        cache_dtype="float32",
        weights=WeightsInfo(bits=32),
        blocks=(block("embed", 64_000), *(block(block_name(i), 50_000) for i in range(LAYERS)), block("head", 64_000)),
    )
    directory.mkdir(parents=True, exist_ok=True)
    manifest.save(directory)
    return manifest


@pytest.fixture
def model(tmp_path: Path) -> Path:
    _write_model(tmp_path / "tiny")
    return tmp_path / "tiny"


def _config(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "distributed_config.json"
    content = {**GUIDE_JSON, "model_path": "tiny", "total_layers": LAYERS, "shards_count": 3, "max_shard_memory_mb": 400, **changes}
    path.write_text(json.dumps(content))
    return path


def test_the_guides_model_config_does_not_fit_and_the_table_says_what_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "distributed_config.yaml"
    path.write_text(MODEL_YAML)
    assert _mesh("plan", path) == 2
    printed = capsys.readouterr().out
    for part in ("43.75 GB a shard before any KV cache", "16 shards of 32 GB", "8-bit weights", "embed + 0-13", "83-96 + head", "166 %"):
        assert part in printed
    assert _mesh("plan", path, "--bits", 8) == 0
    assert "Fits." in capsys.readouterr().out
    assert _mesh("plan", path, "--shards", 16) == 0


def test_the_guides_distributed_config_is_estimated_from_the_models_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "distributed_config.json"
    path.write_text(json.dumps(GUIDE_JSON))
    assert _mesh("plan", path) == 2
    printed = capsys.readouterr().out
    assert "43.75 GB a shard" in printed and "175b parameters are read from its name" in printed
    with pytest.raises(ModelNotFound, match=r"gpt3-175b\.onnx does not exist.*43\.75 GB a shard.*8-bit weights"):
        _mesh("shard-model", "--config", path)
    path.write_text(json.dumps({**GUIDE_JSON, "model_path": "models/mystery.onnx"}))
    with pytest.raises(ModelNotFound, match="total_parameters and vocab_size"):
        _mesh("plan", path)


def test_json_is_the_placement_and_nothing_else(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _mesh("plan", model, "--nodes", "400MB,400MB", "--json") == 0
    placement = Placement.model_validate_json(capsys.readouterr().out)
    assert placement.model_hash == Manifest.load(model).model_hash
    assert [str(shard.layers) for shard in placement.shards] == ["0-3", "3-6"]


@pytest.mark.parametrize(
    ("flags", "strategy", "ranges"),
    [
        (["--nodes", "400MB,400MB,400MB"], "even", ["0-2", "2-4", "4-6"]),
        (["--shards", "2", "--memory", "400MB"], "even", ["0-3", "3-6"]),
        (["--memory", "400MB"], "even", ["0-6"]),
        (["--nodes", "400MB,400MB", "--ranges", "0-5,5-6"], "explicit", ["0-5", "5-6"]),
        (["--memory", "400MB", "--layers-per-shard", "4"], "explicit", ["0-4", "4-6"]),
        (["--nodes", "400MB:speed=5,400MB"], "weighted", ["0-1", "1-6"]),
        (["--nodes", "400MB:speed=5,400MB", "--strategy", "even"], "even", ["0-3", "3-6"]),
    ],
)
def test_flags_say_how_to_cut(model: Path, capsys: pytest.CaptureFixture[str], flags: list[str], strategy: str, ranges: list[str]) -> None:
    assert _mesh("plan", model, "--json", "--rows", 1, "--context", 64, *flags) == 0
    placement = Placement.model_validate_json(capsys.readouterr().out)
    assert (placement.strategy, placement.batch_size, placement.max_sequence_length) == (strategy, 1, 64)
    assert [str(placed.shards[0].layers) for placed in placement.ranges] == ranges


def test_memory_alone_finds_the_fewest_shards(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = Manifest.load(model)
    half = max(
        predict(manifest, LayerRange(a, b), embed=a == 0, head=b == LAYERS, rows=2, context=256, chunk=32).total_bytes
        for a, b in ((0, 3), (3, 6))
    )
    for memory, count in ((half, 2), (half - 1, 3)):
        assert _mesh("plan", model, "--memory", memory, "--rows", 2, "--chunk", 32, "--json") == 0
        assert len(Placement.model_validate_json(capsys.readouterr().out).ranges) == count


def test_a_plan_that_does_not_fit_exits_with_2_and_still_prints_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _mesh("plan", model, "--nodes", "1MB,1MB", "--json") == 2
    placement = Placement.model_validate_json(capsys.readouterr().out)
    assert not placement.fits and placement.problem and placement.remedies


@pytest.mark.parametrize(
    ("flags", "error", "says"),
    [
        ([], ConfigError, "--shards N --memory"),
        (["--shards", "2"], ConfigError, "--memory"),
        (["--nodes", "5MB", "--memory", "5MB"], ConfigError, "give one of them"),
        (["--nodes", "5MB,,"], ConfigError, "is not a node"),
        (["--nodes", "5MB:sped=2"], ConfigError, "speed=2"),
        (["--nodes", "5MB:speed=fast"], ConfigError, "not a number"),
        (["--nodes", "5MB:speed=0"], ConfigError, "more than zero"),
        (["--nodes", "a=5MB,a=5MB"], PlanError, "same name"),
        (["--nodes", "5MB", "--ranges", "0-6", "--strategy", "even"], ConfigError, "give one of them"),
        (["--nodes", "5MB", "--ranges", "0to6"], ConfigError, "half-open"),
        (["--nodes", "5MB", "--ranges", "0-4"], BadLayerRange, "add 4-6"),
        (["--shards", "7", "--memory", "5MB"], BadLayerRange, "6 layers"),
        (["--shards", "0", "--memory", "5MB"], PlanError, "at least 1"),
        (["--memory", "0"], ConfigError, "more than zero"),
        (["--memory", "5MB", "--replicas", "0"], PlanError, "at least 1"),
        (["--nodes", "5MB", "--replicas", "2"], PlanError, "2 distinct nodes"),
        (["--nodes", "5MB", "--context", "257"], PlanError, "256 positions"),
        (["--nodes", "5MB", "--context", "257", "--bits", "16"], PlanError, "256 positions"),
    ],
)
def test_flags_that_cannot_be_are_refused_in_one_line(model: Path, flags: list[str], error: type[MeshError], says: str) -> None:
    with pytest.raises(error, match=says) as caught:
        _mesh("plan", model, *flags)
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="mesh import"):
        _mesh("plan", tmp_path, "--memory", "1GB")


def test_shard_model_writes_the_placement_and_a_configuration_that_each_shard_reads(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _mesh("shard-model", "--config", _config(tmp_path, overlap_layers=1, max_sequence_length=128)) == 0
    placement = Placement.load(tmp_path / "placement" / "placement.json")
    assert placement.fits and placement.load_balancing_strategy == "least_loaded" and len(placement.shards) == 6
    for shard in placement.shards:
        config = load_config(tmp_path / "placement" / f"shard_{shard.shard_id}" / "config.yaml", ShardConfig)
        assert (config.shard.shard_id, config.model.layers_start, config.model.layers_end) == (
            shard.shard_id,
            shard.layers_start,
            shard.layers_end,
        )
        assert (config.resources.max_memory_bytes, config.model.overlap_layers) == (400_000_000, 1)
        assert (config.performance.batch_size, config.performance.max_sequence_length) == (8, 128)
        assert config.model.shard_path == "models:tiny", "it works on a machine that does not have this one's folders"
    coordinator = load_config(tmp_path / "placement" / "coordinator" / "config.yaml", CoordinatorConfig)
    assert (coordinator.model.name, coordinator.distributed.shards_count, coordinator.distributed.replication_factor) == ("tiny", 3, 2)
    said = capsys.readouterr().out
    assert "Wrote" in said and f"mesh push {model.resolve()}" in said


def test_as_many_rows_as_fit_are_planned_where_the_file_does_not_say(tmp_path: Path, model: Path) -> None:
    rows = []
    for memory_mb in (400, 352, 342):
        with contextlib.suppress(DoesNotFit):
            assert _mesh("shard-model", "--config", _config(tmp_path, max_shard_memory_mb=memory_mb, max_sequence_length=256)) == 0
            rows.append(Placement.load(tmp_path / "placement" / "placement.json").batch_size)
    assert rows[0] == 8 and rows == sorted(rows, reverse=True)


NETWORK_YAML = """
network: {coordinator_port: 8090, shard_base_port: 8181, health_check_port: 9190, metrics_port: 9191}
communication: {protocol: nats, compression: gzip, timeout_seconds: 20, retry_count: 5}
load_balancing: {strategy: round_robin, health_check_interval: 4s, failover_timeout: 25s}
"""


@pytest.mark.usefixtures("model")
def test_the_network_s_file_goes_into_every_process_s(tmp_path: Path) -> None:
    (tmp_path / "network.yaml").write_text(NETWORK_YAML)
    assert _mesh("shard-model", "--config", _config(tmp_path), "--network", tmp_path / "network.yaml") == 0
    folder = tmp_path / "placement"
    shard = load_config(folder / "shard_3" / "config.yaml", ShardConfig)
    assert (shard.shard.listen_port, shard.health.port, shard.metrics.port) == (8183, 9190, 9191)
    config = load_config(folder / "coordinator" / "config.yaml", CoordinatorConfig)
    http, spread = config.coordinator, config.distributed
    assert (http.listen_port, http.health_check_interval, http.retry_count, config.metrics.port) == (8090, 4.0, 5, 9191)
    assert (spread.failover_timeout, spread.step_timeout, spread.load_balancing_strategy) == (25.0, 20.0, "round_robin")
    assert config.memory.enable_compression


def test_shard_model_again_with_fewer_shards_leaves_no_configuration_behind(tmp_path: Path, model: Path) -> None:
    assert _mesh("shard-model", "--config", _config(tmp_path)) == 0
    kept = tmp_path / "placement" / "shard_5" / "notes.txt"
    kept.write_text("mine")
    foreign = tmp_path / "placement" / "shard_99" / "config.yaml"
    foreign.parent.mkdir()
    foreign.write_text("shard: {shard_id: 99}")
    assert (
        _mesh(
            "shard-model", "--config", _config(tmp_path, replication_factor=1), "--shard-path", "/data/m", "--nats", "nats://n:1,nats://o:1"
        )
        == 0
    )
    left = sorted(path.relative_to(tmp_path / "placement").as_posix() for path in (tmp_path / "placement").rglob("*") if path.is_file())
    assert left == [
        "coordinator/config.yaml",
        "placement.json",
        "shard_1/config.yaml",
        "shard_2/config.yaml",
        "shard_3/config.yaml",
        "shard_5/notes.txt",
        "shard_99/config.yaml",
    ]
    config = load_config(tmp_path / "placement" / "shard_1" / "config.yaml", ShardConfig)
    assert config.model.shard_path == "/data/m" and config.nats.urls == ("nats://n:1", "nats://o:1")


def test_shard_model_json_and_out(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "elsewhere" / "plan.json"
    assert _mesh("shard-model", "--config", _config(tmp_path), "--out", out, "--json") == 0
    assert Placement.model_validate_json(capsys.readouterr().out) == Placement.load(out)
    assert (out.parent / "shard_1" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"max_shard_memory_mb": 1}, DoesNotFit, "does not fit.*What would fit"),
        ({"total_layers": 12}, ConfigError, "total_layers is 12 and tiny has 6"),
        ({"quantization_bits": 8}, ConfigError, "--bits 8, or leave quantization_bits out"),
        ({"max_sequence_length": 300}, PlanError, "256 positions"),
        ({"model_path": "none-7b"}, ModelNotFound, "none-7b does not exist"),
    ],
)
def test_shard_model_refuses_and_writes_nothing(
    tmp_path: Path, model: Path, changes: dict[str, object], error: type[MeshError], says: str
) -> None:
    with pytest.raises(error, match=says) as caught:
        _mesh("shard-model", "--config", _config(tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "placement").exists()


def test_shard_model_imports_a_source_once(tmp_path: Path) -> None:
    source = tmp_path / "tiny.onnx"
    source.write_bytes(b"a source")
    calls: list[tuple[Path, Path, int | None]] = []

    def importer(given: Path, target: Path, bits: int | None) -> None:
        calls.append((given, target, bits))
        _write_model(target)

    path = _config(tmp_path, model_path="tiny.onnx")
    args = _parser().parse_args(["shard-model", "--config", str(path)])
    with pytest.raises(ModelNotFound, match=r"mesh import .*tiny\.onnx .*tiny\.mesh"):
        shard_model_command(args)
    with pytest.raises(ModelNotFound, match="mesh import"):
        _mesh("plan", path)
    assert shard_model_command(args, importer) == shard_model_command(args, importer) == 0
    assert calls == [(source, tmp_path / "tiny.mesh", None)]
    assert _mesh("plan", path) == 0


def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, model: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out"):
        _mesh("shard-model", "--config", _config(tmp_path), "--out", tmp_path / "file" / "placement.json")


def test_the_variables_of_terraform(tmp_path: Path) -> None:
    _write_model(tmp_path)
    out = tmp_path / "placement.auto.tfvars.json"
    assert _mesh("plan", tmp_path, "--nodes", "2x1GB", "--shards", "2", "--replicas", "2", "--terraform", out) == 0
    placement = json.loads(out.read_text())["placement"]
    assert [shard["shard_id"] for shard in placement["shards"]] == [1, 2, 3, 4]
    assert {shard["node"] for shard in placement["shards"]} == {"node-1", "node-2"}
    assert all(shard["memory_bytes"] > shard["weights_bytes"] > 0 for shard in placement["shards"])
    out.unlink()
    with pytest.raises(DoesNotFit):
        _mesh("plan", tmp_path, "--nodes", "2x1KB", "--terraform", out)
    assert not out.exists()  # no machine is made for what does not fit
    with pytest.raises(ConfigError, match="--terraform"):
        _mesh("plan", tmp_path, "--nodes", "1GB", "--terraform", tmp_path / "no" / "folder.json")


def test_nodes_are_read_with_their_names_counts_and_traits() -> None:
    nodes = parse_nodes("2x16GB, gpu=80GB:speed=12:bandwidth=10Gbit/s:latency=0.5ms, 2x8GiB, big=2x1GB")
    assert [node.name for node in nodes] == ["node-1", "node-2", "gpu", "node-4", "node-5", "big-1", "big-2"]
    assert (nodes[2].speed, nodes[2].bandwidth, nodes[2].latency_s, nodes[3].memory_bytes) == (12, 1.25e9, 0.0005, 2**33)
    assert parse_ranges("0-12, 12-24") == (LayerRange(0, 12), LayerRange(12, 24))


def test_one_range_is_one_range_of_the_option_it_was_given_to() -> None:
    assert parse_range("0-12") == LayerRange(0, 12)
    with pytest.raises(ConfigError, match=r"^--layers 0-12,12-24: give one half-open range, such as 0-12$"):
        parse_range("0-12,12-24")
    with pytest.raises(ConfigError, match=r"^--layers: 'all' is not a layer range"):
        parse_range("all")


@pytest.mark.parametrize("shards", range(1, LAYERS + 1))
def test_up_and_plan_cut_a_model_alike(tmp_path: Path, shards: int) -> None:
    manifest = _write_model(tmp_path)
    placement = place(PlanRequest(model=ModelShape.of(manifest), nodes=same_nodes(shards, GB), shards_count=shards))
    planned = [LayerRange(placed.layers_start, placed.layers_end) for placed in placement.ranges]
    assert LocalMesh(LocalOptions(model=tmp_path, shards=shards)).ranges == planned


def test_the_ends_of_an_uneven_cut_are_the_shorter_ranges() -> None:
    """The first range holds the embedding as well, and the last one the head."""
    assert [str(layers) for layers in even_ranges(30, 4)] == ["0-7", "7-15", "15-23", "23-30"]


def test_several_models_are_planned_on_the_same_nodes(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _mesh("plan", model, model, "--nodes", "2x1GB", "--json") == 0
    first, second = [Placement.model_validate(each) for each in json.loads(capsys.readouterr().out)]
    assert sorted(shard.shard_id for placed in (first, second) for shard in placed.shards) == [1, 2, 3, 4]
    assert all(node.memory_bytes < GB for node in second.nodes)
    assert _mesh("plan", model, model, "--nodes", "2x1GB") == 0
    assert "tiny take node-1" in capsys.readouterr().out
    assert _mesh("plan", model, model, model, "--nodes", "1GB", "--shards", 1) == 2
    with pytest.raises(ConfigError, match="say which machines they share"):
        _mesh("plan", model, model, "--memory", "1GB")


def test_shards_of_a_second_model_are_numbered_on(model: Path, tmp_path: Path) -> None:
    path = _config(tmp_path)
    assert _mesh("shard-model", "--config", path, "--first-shard", 4, "--out", tmp_path / "out" / "placement.json") == 0
    folders = sorted(found.parent.name for found in (tmp_path / "out").glob("shard_*/config.yaml"))
    assert folders == [f"shard_{number}" for number in range(4, 10)]
    assert yaml.safe_load((tmp_path / "out" / "shard_4" / "config.yaml").read_text())["shard"]["shard_id"] == 4
