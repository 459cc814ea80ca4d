"""From flags, configuration files and model directories to a PlanRequest."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from mesh.errors import ConfigError, ModelNotFound
from mesh.model.memory import ModelShape
from mesh.planner.placement import Node
from mesh.planner.plan import with_most_rows
from mesh.planner.request import PlanRequest, same_nodes
from mesh.settings.files import read_mapping
from mesh.settings.schema import DistributedConfig, ModelConfig
from mesh.settings.units import parse_bytes, parse_count, parse_rate, parse_seconds
from mesh.types import LayerRange

__all__ = ["config_class", "from_distributed", "from_model_config", "guess_shape", "locate", "parse_nodes", "parse_range", "parse_ranges"]

_SIZE_IN_NAME = re.compile(r"(?:^|[^a-z0-9.])(\d+(?:\.\d+)?[mbt])(?![a-z0-9])", re.IGNORECASE)
_GUESSED_VOCAB = 50_000
_GUESSED_CONTEXT = 2048


def parse_nodes(text: str) -> tuple[Node, ...]:
    """Nodes from `[NAME=][COUNTx]MEMORY[:speed=S][:bandwidth=RATE][:latency=TIME]`, comma separated.

    Such as `32GB,32GB,gpu=80GB:speed=12` or `4x16GB:bandwidth=10Gbit/s`. Nodes without a name are called node-1, node-2, ... by their
    place.
    """
    nodes: list[Node] = []
    for item in text.split(","):
        size, *options = item.strip().split(":")
        match = re.fullmatch(r"(?:([A-Za-z][\w.-]*)=)?(?:(\d+)x)?(.+)", size)
        if match is None:
            raise ConfigError(f"--nodes: {item.strip()!r} is not a node: write a memory size, such as 32GB or 4x32GB:speed=2")
        name, count = match[1], int(match[2] or 1)
        memory = parse_bytes(match[3])
        traits: dict[str, float] = {}
        for option in options:
            key, _, value = option.partition("=")
            if key == "speed":
                try:
                    traits["speed"] = float(value)
                except ValueError:
                    raise ConfigError(f"--nodes: speed={value!r} is not a number: 1 is an ordinary VM, 2 is twice as fast") from None
            elif key == "bandwidth":
                traits["bandwidth"] = parse_rate(value)
            elif key == "latency":
                traits["latency_s"] = parse_seconds(value)
            else:
                raise ConfigError(f"--nodes: {option!r} is not known: there are speed=2, bandwidth=10Gbit/s and latency=0.5ms")
        if memory < 1 or count < 1 or not traits.get("speed", 1) > 0 or not traits.get("bandwidth", 1) > 0:
            raise ConfigError(f"--nodes: {item.strip()!r}: count, memory, speed and bandwidth must be more than zero")
        for i in range(count):
            each = f"node-{len(nodes) + 1}" if name is None else name if count == 1 else f"{name}-{i + 1}"
            nodes.append(Node.model_validate({"name": each, "memory_bytes": memory, **traits}))
    return tuple(nodes)


def parse_ranges(text: str, *, option: str = "--ranges") -> tuple[LayerRange, ...]:
    """Half-open layer ranges from a text such as `0-12,12-24`, given as `option`. ConfigError: it is none."""
    ranges = []
    for item in text.split(","):
        match = re.fullmatch(r"\s*(\d+)-(\d+)\s*", item)
        if match is None:
            raise ConfigError(f"{option}: {item.strip()!r} is not a layer range: write half-open ranges such as 0-12,12-24")
        ranges.append(LayerRange(int(match[1]), int(match[2])))
    return tuple(ranges)


def parse_range(text: str, *, option: str = "--layers") -> LayerRange:
    """The one half-open layer range of a text such as `0-12`, given as `option`. ConfigError: it is none, or several."""
    layers, *more = parse_ranges(text, option=option)
    if more:
        raise ConfigError(f"{option} {text}: give one half-open range, such as 0-12")
    return layers


def config_class(path: Path) -> type[DistributedConfig] | type[ModelConfig]:
    """The class of a configuration file, recognised by its keys."""
    return ModelConfig if "model" in read_mapping(path) else DistributedConfig


def from_model_config(config: ModelConfig) -> PlanRequest:
    """A request for a model that is known only by its configuration, on as many equal nodes as it has shards."""
    model, sharding, performance = config.model, config.sharding, config.performance
    shape = ModelShape.hypothetical(
        name=model.name,
        parameters=model.total_parameters,
        layers=model.total_layers,
        vocab_size=model.vocab_size,
        context_length=performance.max_sequence_length or _GUESSED_CONTEXT,
        bits=config.bits,
        hidden_size=model.hidden_size,
        kv_heads=model.kv_heads,
        head_dim=model.head_dim,
    )
    return PlanRequest(
        model=shape,
        nodes=same_nodes(sharding.shards_count * sharding.replication_factor, config.max_shard_memory_bytes),
        shards_count=sharding.shards_count,
        replication_factor=sharding.replication_factor,
        overlap_layers=sharding.overlap_layers,
        batch_size=performance.batch_size,
        max_sequence_length=performance.max_sequence_length,
        enable_kv_cache=performance.enable_kv_cache,
    )


def from_distributed(config: DistributedConfig, shape: ModelShape, where: Path) -> PlanRequest:
    """A request from `config`, which was read from the file `where`, for the model of `shape`. ConfigError: they disagree."""
    if config.total_layers != shape.layer_count:
        raise ConfigError(
            f"{where}: total_layers is {config.total_layers} and {shape.name} has {shape.layer_count}: set total_layers to that"
        )
    if config.quantization_bits is not None:
        shape = shape.with_bits(config.quantization_bits)
    request = PlanRequest(
        model=shape,
        nodes=same_nodes(config.shards_count * config.replication_factor, config.max_shard_memory_bytes),
        shards_count=config.shards_count,
        replication_factor=config.replication_factor,
        overlap_layers=config.overlap_layers,
        batch_size=config.batch_size or 1,
        max_sequence_length=config.max_sequence_length,
        enable_kv_cache=config.enable_kv_cache,
        load_balancing_strategy=config.load_balancing_strategy,
    )
    return request if config.batch_size is not None else with_most_rows(request)


def locate(config: DistributedConfig, where: Path) -> Path | None:
    """The file or directory that model_path names, relative to the file `where` or to the working directory. None: there is neither."""
    named = Path(config.model_path).expanduser()
    return next((path for path in (where.parent / named, named) if path.exists()), None)


def guess_shape(config: DistributedConfig, where: Path) -> ModelShape:
    """The shape of a model that is not there yet: from total_parameters and vocab_size, or from the size in its name (gpt3-175b)."""
    stem = Path(config.model_path).stem if Path(config.model_path).suffix in (".onnx", ".gguf") else Path(config.model_path).name
    found = _SIZE_IN_NAME.findall(stem)
    if config.total_parameters is None and not found:
        raise ModelNotFound(
            f"{where}: model_path {config.model_path} does not exist and its name tells no size: "
            "give the path of a model, or total_parameters and vocab_size for an estimate"
        )
    shape = ModelShape.hypothetical(
        name=stem,
        parameters=config.total_parameters or parse_count(found[-1]),
        layers=config.total_layers,
        vocab_size=config.vocab_size or _GUESSED_VOCAB,
        context_length=config.max_sequence_length or _GUESSED_CONTEXT,
        bits=config.quantization_bits or 16,
    )
    assumed = [] if config.total_parameters else [f"{config.model_path} does not exist: {found[-1]} parameters are read from its name"]
    assumed += [] if config.vocab_size else [f"a vocabulary of {_GUESSED_VOCAB:,} is assumed (vocab_size)"]
    assumed += [] if config.max_sequence_length else [f"a context of {_GUESSED_CONTEXT:,} is assumed (max_sequence_length)"]
    assumed += [] if config.quantization_bits else ["weights of 16 bits are assumed (quantization_bits)"]
    return replace(shape, notes=(*assumed, *shape.notes))
