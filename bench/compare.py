"""Ours beside llama.cpp, onnxruntime and transformers: one model, the same work, turn by turn in one run.

    python bench/compare_llama.py build /tmp/llama
    python bench/compare.py MODEL.gguf --llama /tmp/llama/bin [--widths f32,q8_0,q4_0] [--rows 1,8,32] [--prompts 64,512,1500]
        [--depths 2048] [--shards 3] [--rounds 5] [--work FOLDER] [--out results.json]

The engines take turns, a round each, so that a slow minute of the machine slows all of them; a figure is the median over the rounds.
`ours` is one process, `mesh` a whole mesh of --shards shards on loopback; `llama.cpp` its own benchmarks in one process, `llama.cpp RPC`
the same with as many servers on loopback. Of every width but f32, llama.cpp's own quantization is what both read; our import keeps its
values. transformers and onnxruntime take part at f32. The floor is the bytes of the weights over the memory bandwidth of the same run.
Without --llama, or where an engine fails, it is left out with a note.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from compare_engines import PROMPT, STEPS, Figures, Workload, bandwidth, dequantize_gguf, dequantize_huggingface
from compare_llama import Llama, rpc_servers
from mesh_overhead import through_the_mesh

from mesh.host.machine import machine
from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model
from mesh.local.mesh import LocalMesh, LocalOptions

Engine = Callable[[], Figures]
HERE = Path(__file__).parent
THREADS = os.cpu_count() or 1


# -- sources -----------------------------------------------------------------------------------------------------------------


def source_of(width: str, gguf: Path, work: Path, llama: Llama | None) -> Path:
    """The GGUF file of that width, made once."""
    plain, out = work / "f32.gguf", work / f"{width}.gguf"
    if not plain.exists():
        dequantize_gguf(gguf, plain)
    if not out.exists():
        if llama is None:
            raise SystemExit(f"{width} is made by llama-quantize: give --llama, or put {out} there")
        llama.quantize(plain, out, width.upper())
    return out


def imported(gguf: Path) -> Path:
    directory = gguf.with_suffix("")
    if not directory.exists():
        import_model(gguf, directory, ImportOptions())
    return directory


# -- engines -----------------------------------------------------------------------------------------------------------------


def in_a_process(name: str, source: Path, work: Workload) -> Engine:
    command = [sys.executable, str(HERE / "compare_engines.py"), name, str(source), json.dumps(asdict(work))]

    def run() -> Figures:
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return Figures.of(json.loads(done.stdout.splitlines()[-1]))

    return run


def by_llama(llama: Llama, gguf: Path, work: Workload) -> Engine:
    def run() -> Figures:
        batches, peak = llama.decode(gguf, work.rows, len(PROMPT), STEPS)
        found = Figures(decode={rows: batch["step"] for rows, batch in batches.items()}, peak_bytes=peak)
        if work.prompts:
            found.prefill = llama.prefill(gguf, work.prompts)
        if work.depths:
            found.depth = llama.at_depth(gguf, work.depths, STEPS)
        return found

    return run


@contextmanager
def by_mesh(model: Path, shards: int, work: Workload) -> Iterator[Engine]:
    """A mesh that stays up between its turns. Of prompts, it has none: bench/crowd.py compares first tokens."""
    options = LocalOptions(model=model, shards=shards, rows=max(work.rows), context=256, http=False, prefix_reuse="off")
    with LocalMesh(options) as mesh:

        async def run() -> Figures:
            return Figures(decode={rows: (await through_the_mesh(mesh.bus, mesh.manifest.name, rows))[0] for rows in work.rows})

        asyncio.run(run())  # the first turn is not measured
        yield lambda: asyncio.run(run())


def engines_of(
    width: str, gguf: Path, work: Workload, args: argparse.Namespace, llama: Llama | None, stack: ExitStack
) -> dict[str, Engine]:
    model = imported(gguf)
    engines = {"ours": in_a_process("ours", model, work)}
    if llama is not None:
        engines["llama.cpp"] = by_llama(llama, gguf, work)
    if args.shards:
        few = Workload(rows=work.rows, prompts=(), depths=())
        engines[f"mesh of {args.shards}"] = stack.enter_context(by_mesh(model, args.shards, few))
        if llama is not None:
            servers = stack.enter_context(rpc_servers(llama.bin, args.shards, THREADS))
            engines["llama.cpp RPC"] = by_llama(Llama(llama.bin, THREADS, servers), gguf, few)
    if width == "f32" and args.others:
        engines["onnxruntime"] = in_a_process("onnxruntime", model, work)
        huggingface = args.work / "huggingface"
        try:
            if not huggingface.exists():
                dequantize_huggingface(args.gguf, huggingface)
            engines["transformers"] = in_a_process("transformers", huggingface, work)
        except (ImportError, ValueError) as error:  # transformers reads GGUF files where `accelerate` is installed
            print(f"transformers is left out: {error}", file=sys.stderr, flush=True)
    return engines


# -- rounds ------------------------------------------------------------------------------------------------------------------


def take_turns(engines: dict[str, Engine], rounds: int) -> dict[str, list[Figures]]:
    """Every engine's figures, a round each. One that fails is left out from there on."""
    found: dict[str, list[Figures]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name in list(engines):
            try:
                found[name].append(engines[name]())
            except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
                del engines[name]
                continue
            shown = {f"{kind} {size}": round(1e3 * seconds, 2) for (kind, size), seconds in found[name][-1].cells().items()}
            print(f"{name}: {shown} ms", file=sys.stderr, flush=True)
    return {name: figures for name, figures in found.items() if figures}


def medians(found: dict[str, list[Figures]]) -> dict[str, dict[tuple[str, int], float]]:
    return {
        name: {cell: statistics.median(each.cells()[cell] for each in figures) for cell in figures[0].cells()}
        for name, figures in found.items()
    }


def rate(cell: tuple[str, int], seconds: float) -> float:
    """Tokens a second."""
    kind, size = cell
    return (1 if kind == "depth" else size) / seconds


def table(width: str, found: dict[str, list[Figures]], floor_s: float) -> str:
    by_engine = medians(found)
    cells = sorted({cell for figures in by_engine.values() for cell in figures})
    names = {"decode": "{} rows", "prefill": "prompt of {}", "depth": "at {}"}
    lines = [
        f"{width}, tokens a second | " + " | ".join(names[kind].format(size) for kind, size in cells) + " | peak MB",
        "|".join(["---"] * (len(cells) + 2)),
    ]
    for name, figures in by_engine.items():
        peak = max(each.peak_bytes for each in found[name]) / 1e6
        shown = [f"{rate(cell, figures[cell]):.1f}" if cell in figures else "" for cell in cells]
        lines.append(" | ".join([name, *shown, f"{peak:.0f}" if peak else ""]))
    floors = ["" if kind == "prefill" or (kind, size) == ("depth", 0) else f"{rate((kind, size), floor_s):.1f}" for kind, size in cells]
    lines.append(" | ".join(["floor of the weights", *floors, ""]))
    for ours, theirs in (("ours", "llama.cpp"), *((name, "llama.cpp RPC") for name in by_engine if name.startswith("mesh"))):
        if ours in by_engine and theirs in by_engine:
            a, b = by_engine[ours], by_engine[theirs]
            ratios = [f"{b[cell] / a[cell]:.2f}" if cell in a and cell in b else "" for cell in cells]
            lines.append(" | ".join([f"{ours} / {theirs}", *ratios, ""]))
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: tuple(int(part) for part in text.split(",") if part)  # noqa: E731
    parser.add_argument("gguf", type=Path)
    parser.add_argument("--llama", type=Path, help="the folder of llama.cpp's tools")
    parser.add_argument("--widths", default="f32,q8_0,q4_0")
    parser.add_argument("--rows", type=numbers, default=(1, 8, 32))
    parser.add_argument("--prompts", type=numbers, default=(64, 512, 1500))
    parser.add_argument("--depths", type=numbers, default=())
    parser.add_argument("--shards", type=int, default=3, help="of the mesh and of RPC; 0: neither takes part")
    parser.add_argument("--others", action="store_true", help="onnxruntime and transformers too, at f32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, help="where converted models are kept (default: a temporary folder)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    args.work = args.work or Path(tempfile.mkdtemp(prefix="bench-compare-"))
    args.work.mkdir(parents=True, exist_ok=True)
    llama = Llama(args.llama, THREADS) if args.llama else None
    work = Workload(args.rows, args.prompts, args.depths)
    here = machine()
    results: dict[str, Any] = {
        "model": args.gguf.stem,
        "machine": ", ".join([here.processor, *here.features]),
        "threads": THREADS,
        "widths": {},
    }
    for width in args.widths.split(","):
        gguf = source_of(width, args.gguf, args.work, llama)
        with ExitStack() as stack:
            engines = engines_of(width, gguf, work, args, llama, stack)
            found = take_turns(engines, args.rounds)
        speed = bandwidth()
        floor_s = gguf.stat().st_size / speed
        print(f"\n{gguf.stat().st_size / 1e6:.0f} MB, memory {speed / 1e9:.1f} GB/s\n{table(width, found, floor_s)}", flush=True)
        results["widths"][width] = {"floor_s": floor_s, "engines": {name: [asdict(each) for each in all_] for name, all_ in found.items()}}
        if llama is not None:
            results["widths"][width]["llama.cpp"] = llama.path_taken(gguf)
            print(f"llama.cpp held its weights: {results['widths'][width]['llama.cpp']}", flush=True)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
