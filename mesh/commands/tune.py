"""`mesh tune`: measure the fastest variant of each product."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mesh.settings.units import format_seconds

__all__ = ["add_parser", "tune_command"]

_DESCRIPTION = """\
Measure on this machine which variant of each matrix product is fastest, for each number of rows. Stages that are loaded afterwards use
it. This is worth doing once on each machine for 32-bit models on a CPU without kernels; elsewhere there is only one variant."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("tune", help="measure the fastest products on this machine", description=_DESCRIPTION)
    parser.add_argument("model", metavar="MODEL_DIR", type=Path, help="a model whose products are measured")
    parser.add_argument("--rows", type=int, default=32, metavar="N", help="the most sessions a stage will hold (default 32)")
    parser.set_defaults(run=tune_command)


def tune_command(args: argparse.Namespace) -> int:
    from mesh.kernels.library import kernels
    from mesh.lowering.weights import PackedWeight
    from mesh.model.manifest import Manifest, block_name
    from mesh.runtime.buckets import Buckets
    from mesh.runtime.kernel_variants import VariantTable
    from mesh.runtime.loading import load_block

    if kernels().name is not None:
        print(f"nothing to measure: the kernels ({kernels()}) compute every product; MESH_KERNELS=none turns them off")
        return 0
    manifest = Manifest.load(args.model)
    table = VariantTable()
    rows = [count for count in Buckets.plan(rows=args.rows, context=128, chunk=16).rows if count <= args.rows]
    measured = 0
    for name in (block_name(0), block_name("head")):
        manifest.block(name)
        weights = [weight for weight in load_block(args.model, name).weights.values() if isinstance(weight, PackedWeight)]
        for what, count, seconds in table.tune(weights, rows):
            best = min(seconds, key=lambda variant: seconds[variant])
            others = ", ".join(f"{variant} {format_seconds(time)}" for variant, time in sorted(seconds.items(), key=lambda item: item[1]))
            print(f"{what}, {count} rows: {best} ({others})")
            measured += 1
    print(f"{measured} measured, kept in {table.path}" if measured else "nothing to measure: known already, or one variant only")
    return 0
