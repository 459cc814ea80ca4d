"""`mesh import`."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, get_args

from mesh.commands.progress import progress_bar
from mesh.model.manifest import Manifest
from mesh.settings.units import format_bytes, format_count, format_seconds
from mesh.types import DType

__all__ = ["add_parser", "import_command", "import_quietly"]

_DESCRIPTION = """\
Turn an exported ONNX decoder, a Hugging Face directory (config.json + safetensors), a model of the Hugging Face hub (hf:ORG/NAME, or
hf:ORG/NAME@REVISION, where the package huggingface_hub is installed) or a GGUF file into a model directory:
one standard ONNX block for each layer, verified against onnxruntime. If anything goes wrong, nothing is left on disk.
A Hugging Face directory of a family that is not built in is traced with torch and transformers (the extra `trace`), and its tokens
are compared with those of transformers."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("import", help="make a model directory from ONNX, safetensors or GGUF", description=_DESCRIPTION)
    parser.add_argument("source", metavar="SRC", type=Path, help=".onnx or .gguf file, a Hugging Face directory, or hf:ORG/NAME")
    parser.add_argument("out", metavar="OUT", type=Path, help="the model directory to make, such as models/NAME")
    parser.add_argument("--name", help="default: the source's; letters, digits, - and _")
    parser.add_argument(
        "--dtype",
        choices=get_args(DType),
        default="float32",
        help="type of the arithmetic and the KV cache (default float32)",
    )
    parser.add_argument(
        "--bits",
        type=int,
        choices=(32, 16, 8, 4),
        help="stored width of the weights (default: as the source has them); 4 are at most 5.0 bits a weight, all told: the head and other "
        "sensitive weights get 6",
    )
    parser.add_argument("--group-size", type=int, metavar="N", help="number of inputs that share a scale, at 8 and 4 bits")
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="a text (UTF-8; 4,096 tokens of it are read): at --bits 4, round so that what the model computes of it changes least",
    )
    parser.add_argument(
        "--kv-cache",
        choices=("float32", "float16", "int8"),
        help="type of keys and values: float16 halves the memory of each position, and long answers read half; int8 takes a quarter, with "
        "a scale for each key and value of a head (default: that of --dtype)",
    )
    parser.add_argument(
        "--products",
        choices=("float32", "bfloat16"),
        help="type of the inputs of products and of their weights of 16 bits: bfloat16 is up to twice as fast for prompts and many "
        "requests, on processors that multiply it, and less exact; weights of 8 and 4 bits are multiplied as they are (default float32)",
    )
    parser.add_argument("--report", action="store_true", help="also measure the error against 32-bit weights: perplexity of a fixed text")
    parser.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="let code in the model's own directory run, where the model cannot be traced without it: read that code first",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a model directory")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=import_command)


def import_command(args: argparse.Namespace) -> int:
    from mesh.host.process import give_memory_back
    from mesh.importer.options import ImportOptions
    from mesh.importer.run import import_model, refuse_by_name

    refuse_by_name(args.source)
    from mesh.runtime.device import prepare  # loads JAX

    give_memory_back()
    prepare()
    options = ImportOptions(
        dtype=args.dtype,
        bits=args.bits,
        group_size=args.group_size,
        trust_remote_code=args.trust_remote_code,
        kv_cache=args.kv_cache,
        calibrate=args.calibrate,
        products="bfloat16" if args.products == "bfloat16" else None,
    )
    began = time.perf_counter()
    with progress_bar(quiet=args.quiet) as progress:
        manifest = import_model(args.source, args.out, options, name=args.name, report=args.report, force=args.force, progress=progress)
    _describe(manifest, args.out, time.perf_counter() - began)
    if options.products != manifest.weights.inputs:
        print("  note: no weights of 16 bits are here, so products stay float32: give --bits 16 too")
    return 0


def import_quietly(source: Path, out: Path, bits: int | None) -> None:
    """How `mesh shard-model` imports a source: `bits` None means as the source has them."""
    from mesh.host.process import give_memory_back
    from mesh.importer.options import ImportOptions
    from mesh.importer.run import import_model
    from mesh.runtime.device import prepare

    give_memory_back()
    prepare()
    with progress_bar() as progress:
        import_model(source, out, ImportOptions(bits=bits), progress=progress)  # type: ignore[arg-type]


def _describe(manifest: Manifest, out: Path, seconds: float) -> None:
    parameters = sum(block.parameters for block in manifest.blocks)
    stored = sum(block.weight_bytes for block in manifest.blocks)
    weights = manifest.weights
    width = f"{weights.bits}-bit" + (f", groups of {weights.group_size}" if weights.group_size else "") + " weights"
    if weights.kept is not None:
        width = f"weights as the source has them ({weights.kept})"
    elif weights.bits == 32 and stored < 4 * parameters:
        width += ", of 16 where experts have the same numbers so"
    if weights.inputs is not None:
        width += f", products of {weights.inputs}"
    report = manifest.report
    print(f"{manifest.name} ({manifest.architecture}) in {out}, {format_seconds(seconds)}")
    each = f" ({report['bits_per_weight']:.2f} bits a weight, all told)" if "bits_per_weight" in report else ""
    print(f"  {manifest.layers} layers, {format_count(parameters)} parameters, {format_bytes(stored)} of {width}{each}")
    print(f"  context {manifest.context_length:,} tokens, vocabulary {manifest.vocab_size:,}, {manifest.hidden.dtype} arithmetic")
    checked = f"  verified over {report['positions']} positions"
    if report.get("oracle_error") is not None:
        checked += f": blocks equal onnxruntime's to {report['oracle_error']:.1e}"
    if "source_error" in report:
        checked += f", logits {report.get('source_engine', 'the source')}'s to {report['source_error']:.1e}"
        checked += f", {report['source_greedy_equal']:.0%} of greedy tokens equal"
    print(checked)
    for key in ("note", "not_compared"):
        if key in report:
            print(f"  {'note' if key == 'note' else 'not compared with transformers'}: {report[key]}")
    if "perplexity" in report:
        print(
            f"  perplexity {report['perplexity']:.3f} where 32-bit weights have {report['perplexity_float32']:.3f}; "
            f"relative error of the logits {report['logits_error_float32']:.2g} ({report['tokens']} tokens)"
        )
    if "kv_cache_perplexity" in report:
        print(
            f"  keys and values in {manifest.cache_dtype}: perplexity {report['kv_cache_perplexity']:.3f} "
            f"where {manifest.hidden.dtype} has {report['kv_cache_perplexity_exact']:.3f}, "
            f"{report['kv_cache_greedy_equal']:.1%} of likeliest tokens equal "
            f"({report['kv_cache_tokens']} tokens)"
        )
