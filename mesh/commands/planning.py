"""`mesh plan` and `mesh shard-model`.

Both exit with 0 if the plan fits and with 2 if it does not. With --json only the placement is on standard output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson

from mesh.commands.import_model import import_quietly
from mesh.commands.placement_files import Target, write_files
from mesh.commands.placement_table import print_placement
from mesh.commands.sources import import_target, is_imported
from mesh.errors import ConfigError, ModelNotFound, PlanError
from mesh.model.manifest import Manifest
from mesh.model.memory import DEFAULT_CHUNK, ModelShape
from mesh.planner.from_config import config_class, from_distributed, from_model_config, guess_shape, locate, parse_nodes, parse_ranges
from mesh.planner.placement import Node, Placement, Strategy
from mesh.planner.plan import place, plan, ranges_of
from mesh.planner.request import PlanRequest, same_nodes
from mesh.planner.terraform import terraform_variables
from mesh.planner.together import plan_together
from mesh.settings.defaults import DEFAULT_NATS_URL
from mesh.settings.schema import DistributedConfig, ModelConfig, NetworkConfig, load_config
from mesh.settings.units import parse_bytes

__all__ = ["Importer", "add_plan_parser", "add_shard_model_parser", "plan_command", "shard_model_command"]

Importer = Callable[[Path, Path, int | None], object]
"""importer(source, model directory to make, weight bits or None for its own)"""

_PLAN = """\
Place the layers of a model on nodes: what each shard holds and takes, whether it fits, and what would. Several models are placed one
after the other: what one takes on a node, the next does not have."""
_SHARD_MODEL = """\
From distributed_config.json write placement.json, a config.yaml for each shard and one for the coordinator. Import the model first if need
be. Each config.yaml works on any machine that reaches the NATS servers: the shard fetches its blocks from the mesh."""


def add_plan_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        help="place a model's layers on nodes, and say whether they fit",
        description=_PLAN,
    )
    parser.add_argument(
        "models", metavar="MODEL_DIR|CONFIG", nargs="+", type=Path, help="model directories, or a .json or .yaml configuration"
    )
    parser.add_argument("--nodes", help="memory of each node, such as 32GB,32GB,gpu=80GB:speed=12 or 4x16GB:bandwidth=10Gbit/s:latency=1ms")
    parser.add_argument("--shards", type=int, metavar="N", help="number of layer ranges")
    parser.add_argument("--memory", metavar="SIZE", help="memory of each of several equal nodes; alone: find the fewest shards that fit")
    parser.add_argument("--strategy", choices=("even", "weighted"), help="default: weighted if the nodes differ, otherwise even")
    parser.add_argument("--ranges", metavar="A-B,B-C", help="exactly these layer ranges")
    parser.add_argument("--layers-per-shard", type=int, metavar="N", help="length of each range; the last one may be shorter")
    parser.add_argument("--replicas", type=int, metavar="R", help="shards for each range, on distinct nodes")
    parser.add_argument("--bits", type=int, choices=(32, 16, 8, 4), help="bits of the weights; an estimate if not the model's own")
    parser.add_argument("--rows", type=int, metavar="N", help="sequences held at once")
    parser.add_argument("--context", type=int, metavar="TOKENS", help="positions of each row")
    parser.add_argument("--chunk", type=int, metavar="TOKENS", help=f"tokens of a prefill step (default {DEFAULT_CHUNK})")
    parser.add_argument("--overlap", type=int, metavar="LAYERS", help="layers of each neighbour that a shard holds as well")
    parser.add_argument("--json", action="store_true", help="print the placement as JSON and nothing else")
    parser.add_argument(
        "--terraform", type=Path, metavar="FILE", help="also write the placement for terraform/, such as placement.auto.tfvars.json"
    )
    parser.set_defaults(run=plan_command)
    return parser


def add_shard_model_parser(subparsers: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "shard-model",
        help="write the placement of a model from distributed_config.json",
        description=_SHARD_MODEL,
    )
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="distributed_config.json")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: placement/placement.json beside the configuration")
    parser.add_argument(
        "--shard-path",
        metavar="DIR",
        help="where the model directory lies on the shards' machines; default: models:NAME, which they fetch from the mesh (`mesh push`)",
    )
    parser.add_argument("--nats", metavar="URLS", help="comma separated, for the files; default: nats://127.0.0.1:4222")
    parser.add_argument(
        "--first-shard",
        type=int,
        default=1,
        metavar="ID",
        help="shard_id of the first shard, where the mesh has shards of another model (default 1)",
    )
    parser.add_argument("--network", type=Path, metavar="FILE", help="network config.yaml: ports and times, for all files")
    parser.add_argument("--json", action="store_true", help="print the placement as JSON and nothing else")
    parser.set_defaults(run=lambda args: shard_model_command(args, import_quietly))
    return parser


def plan_command(args: argparse.Namespace) -> int:
    """Print the plan; 0 if it fits, 2 if not. Errors are MeshErrors; DoesNotFit where machines are to be made for what does not fit."""
    if len(args.models) > 1:
        return _plan_several(args)
    placement = plan(_request(args, args.models[0]))
    if args.terraform is not None:
        _write_terraform(placement.require_fit(), args.terraform)
    _show(placement, args.json)
    return 0 if placement.fits else 2


def _plan_several(args: argparse.Namespace) -> int:
    if args.terraform is not None:
        raise ConfigError("--terraform writes the machines of one model: plan each model by itself")
    if not args.nodes:
        raise ConfigError("several models: say which machines they share, with --nodes 32GB,32GB")
    placements = plan_together([_request(args, model) for model in args.models])
    if args.json:
        sys.stdout.buffer.write(orjson.dumps([each.model_dump(mode="json") for each in placements], option=orjson.OPT_INDENT_2) + b"\n")
    else:
        for placement in placements:
            print_placement(placement)
    return 0 if all(placement.fits for placement in placements) else 2


def shard_model_command(args: argparse.Namespace, importer: Importer | None = None) -> int:
    """Write the placement that the configuration asks for. DoesNotFit: it does not fit, and nothing is written.

    A source (ONNX, GGUF, Hugging Face) is imported once by `importer`, into NAME.mesh beside it. Without an importer the error says how
    to import it.
    """
    config = load_config(args.config, DistributedConfig)
    directory = _model_directory(config, args.config, importer)
    shape = _shape(directory)
    if config.quantization_bits not in (None, shape.bits):
        raise ConfigError(
            f"{args.config}: quantization_bits is {config.quantization_bits} and {directory} holds {shape.bits}-bit weights: "
            f"import it again with --bits {config.quantization_bits}, or leave quantization_bits out"
        )
    if args.first_shard < 1:
        raise ConfigError(f"--first-shard is {args.first_shard}: give 1 or more")
    placement = plan(from_distributed(config, shape, args.config)).require_fit().numbered_from(args.first_shard)
    out = args.out or args.config.parent / "placement" / "placement.json"
    network = NetworkConfig() if args.network is None else load_config(args.network, NetworkConfig)
    target = Target(args.shard_path or f"models:{shape.name}", args.nats or DEFAULT_NATS_URL, network, given=args.network is not None)
    write_files(placement, config, out, target)
    _show(placement, args.json)
    if not args.json:
        files = f"{len(placement.shards)} x {out.parent / 'shard_N' / 'config.yaml'} and {out.parent / 'coordinator' / 'config.yaml'}"
        print(f"Wrote {out}, {files}")
        if args.shard_path is None:
            print(f"Then: mesh push {directory}; copy each config.yaml to its machine, and run `mesh shard --config config.yaml` there")
    return 0


def _show(placement: Placement, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(placement.to_json().decode())
    else:
        print_placement(placement)


def _request(args: argparse.Namespace, model: Path) -> PlanRequest:
    base, shape = _base(model)
    if args.context and shape.model_hash is None:  # known only by its size: it has no context of its own
        shape = replace(shape, context_length=max(shape.context_length, args.context))
    if args.bits:
        shape = shape.with_bits(args.bits)
    if args.nodes and args.memory:
        raise ConfigError("--nodes and --memory: --nodes already says the memory of each; give one of them")
    if sum(bool(given) for given in (args.strategy, args.ranges, args.layers_per_shard)) > 1:
        raise ConfigError("--strategy, --ranges and --layers-per-shard each say how to cut: give one of them")
    changes: dict[str, Any] = {
        "replication_factor": args.replicas,
        "batch_size": args.rows,
        "max_sequence_length": args.context,
        "chunk": args.chunk,
        "overlap_layers": args.overlap,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    replicas = changes.get("replication_factor", base.replication_factor if base else 1)
    if replicas < 1:
        raise PlanError(f"--replicas is {replicas}: it must be at least 1")
    ranges = parse_ranges(args.ranges) if args.ranges else None
    if args.layers_per_shard is not None:
        ranges = ranges_of(shape.layer_count, args.layers_per_shard)
    count = len(ranges) if ranges else args.shards
    if count is not None and count < 1:
        raise PlanError(f"--shards is {count}: it must be at least 1")
    memory = parse_bytes(args.memory) if args.memory else base.nodes[0].memory_bytes if base else None
    if memory is not None and memory < 1:
        raise ConfigError(f"--memory is {args.memory}: it must be more than zero")

    if args.nodes:
        nodes = parse_nodes(args.nodes)
    elif memory is None:
        raise ConfigError("plan: say what there is: --nodes 32GB,32GB, or --shards N --memory 32GB")
    else:
        fewest = count is None and base is None
        count = count if count is not None or base is None else base.shards_count
        nodes = same_nodes((shape.layer_count if fewest else count or 1) * replicas, memory)
    strategy: Strategy = args.strategy or ("weighted" if count is None and len({_traits(node) for node in nodes}) > 1 else "even")
    request = PlanRequest(
        **{
            **(_kept(base) if base else {}),
            **changes,
            "model": shape,
            "nodes": nodes,
            "strategy": "explicit" if ranges else strategy,
            "ranges": ranges,
            "shards_count": count,
        }
    )
    if not args.nodes and base is None and count is None and not ranges:
        return _fewest(request)
    return request


def _fewest(request: PlanRequest) -> PlanRequest:
    """`request` with the fewest equal nodes that suffice; with one for every layer if none do."""
    layers = request.model.layer_count
    for count in range(1, layers + 1):
        fewer = replace(request, strategy="even", shards_count=count, nodes=request.nodes[: count * request.replication_factor])
        if place(fewer).fits:
            return fewer if request.strategy == "even" else replace(fewer, strategy=request.strategy)
    return replace(request, shards_count=layers)


def _traits(node: Node) -> tuple[Any, ...]:
    return node.memory_bytes, node.speed, node.bandwidth, node.latency_s


def _kept(base: PlanRequest) -> dict[str, Any]:
    names = ("replication_factor", "overlap_layers", "batch_size", "max_sequence_length", "enable_kv_cache", "load_balancing_strategy")
    return {name: getattr(base, name) for name in names}


def _base(path: Path) -> tuple[PlanRequest | None, ModelShape]:
    """What the argument of `mesh plan` names: a configuration's request, or None and the model of a directory."""
    if path.suffix not in (".json", ".yaml", ".yml"):
        return None, _shape(path)
    if config_class(path) is ModelConfig:
        request = from_model_config(load_config(path, ModelConfig))
        return request, request.model
    config = load_config(path, DistributedConfig)
    located = locate(config, path)
    if located is not None and not is_imported(located):
        located = import_target(located)
        if not is_imported(located):
            raise ModelNotFound(f"{config.model_path} is not imported: run `mesh import {config.model_path} {located}`, then plan again")
    shape = guess_shape(config, path) if located is None else _shape(located)
    request = from_distributed(config, shape, path)
    return request, request.model


def _shape(directory: Path) -> ModelShape:
    return ModelShape.of(Manifest.load(directory))


def _model_directory(config: DistributedConfig, where: Path, importer: Importer | None) -> Path:
    """The model directory that model_path is, or the one that it is imported into."""
    source = locate(config, where)
    if source is None:
        # without a model, say at least whether it would fit
        estimate = plan(from_distributed(config, guess_shape(config, where), where))
        fit = "by its size it would fit" if estimate.fits else f"it would not fit either: {_reason(estimate)}"
        raise ModelNotFound(f"{where}: model_path {config.model_path} does not exist: put the model there; {fit}")
    if is_imported(source):
        return source
    target = import_target(source)
    if not is_imported(target):
        if importer is None:
            raise ModelNotFound(f"{where}: {config.model_path} is not imported: run `mesh import {source} {target}` first")
        importer(source, target, config.quantization_bits)
    return target


def _reason(placement: Placement) -> str:
    ways = "; or ".join(remedy.text for remedy in placement.remedies)
    return f"{placement.problem}. What would fit: {ways}"


def _write_terraform(placement: Placement, out: Path) -> None:
    """Write the variables of terraform/environments: the machines are chosen to have the memory that each node's shards take."""
    try:
        out.write_bytes(terraform_variables(placement))
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror}: give a file that can be written with --terraform") from None
    print(f"Wrote {out}: terraform/environments take it as it is", file=sys.stderr)
