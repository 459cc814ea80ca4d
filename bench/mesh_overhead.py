"""What the mesh costs: decode speed through N shards against the same N stages called in one process, in one run.

    python bench/mesh_overhead.py MODEL_DIR [--shards 3] [--sessions 1,32] [--rounds 5] [--out results.json]

A whole mesh (nats-server, coordinator, shards) and a process with the stages both run. They take turns, a round each, so that a slow minute
of the machine slows both. The figure of a round is the median time of a step once every session decodes; the ratio is that of the medians
over the rounds. The report also compares the time of a hop beyond computing, as the frames measured it, with bare nats-py hops of the same
size: between two connections that do nothing else, and between processes that read as much memory as a stage before they send.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mesh.bus import BusOptions
from mesh.client import AsyncMeshClient
from mesh.commands.bare_hop import bare_hop_between_stages_s, bare_hop_s
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.model.manifest import Manifest

PROMPT_TOKENS, STEPS, CONTEXT = 16, 64, 256


def prompt(index: int) -> list[int]:
    return np.random.default_rng(index).integers(100, 4000, PROMPT_TOKENS).tolist()


def in_one_process(model: Path, shards: int, rows: int) -> None:
    """Answer each line `sessions` on stdin with the median seconds of a step of that many rows."""
    from mesh.runtime.device import prepare
    from mesh.runtime.generate import Pipeline
    from mesh.runtime.sampling import SamplingParams

    prepare()
    pipeline = Pipeline.load(model, shards=shards, rows=rows, context=CONTEXT)
    pipeline.warm_up()
    print("ready", flush=True)
    for line in sys.stdin:
        count = int(line)
        last = [pipeline.start(row, prompt(row), SamplingParams(temperature=0), max_tokens=STEPS).id for row in range(count)]
        live, seconds = np.arange(count), []
        for step in range(STEPS - 1):
            began = time.perf_counter()
            last = [token.id for token in pipeline.decode(live, np.full(count, PROMPT_TOKENS + step), np.array(last))]
            seconds.append(time.perf_counter() - began)
        print(statistics.median(seconds), flush=True)


async def through_the_mesh(options: BusOptions, model: str, sessions: int) -> tuple[float, dict[str, float]]:
    """(median seconds in which each session gets a token while all of them decode, the means of a step's parts)"""
    async with AsyncMeshClient(options=options, model=model) as client:

        async def one(index: int) -> tuple[list[float], dict[str, float]]:
            async with client.stream(tokens=prompt(index), max_tokens=STEPS, ignore_eos=True, temperature=0) as stream:
                times = [chunk.received_s async for chunk in stream if chunk.token is not None]
            assert stream.completion is not None
            return times, dict(stream.completion.timing.hops)

        results = await asyncio.gather(*(one(index) for index in range(sessions)))
    begin, end = max(times[0] for times, _ in results), min(times[-1] for times, _ in results)
    if begin >= end:
        raise SystemExit("the sessions did not decode at the same time: more rows are needed")
    tokens = sum(sum(begin < at <= end for at in times) for times, _ in results)
    step = statistics.median(b - a for times, _ in results for a, b in pairwise(times) if a >= begin and b <= end)
    return (step if sessions == 1 else (end - begin) * sessions / tokens), results[0][1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--sessions", default="1,32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        in_one_process(args.model, args.shards, args.one)
        return
    counts = [int(part) for part in args.sessions.split(",")]
    rows = max(counts)
    command = [sys.executable, __file__, str(args.model), "--shards", str(args.shards), "--one", str(rows)]
    manifest = Manifest.load(args.model)
    hidden_bytes = manifest.hidden.size * 4
    measured = ("mesh_s", "one_process_s", "step", "bare_s", "between_stages_s")
    results: dict[int, dict[str, Any]] = {count: {name: [] for name in measured} for count in counts}
    stage_bytes = sum(block.weight_bytes for block in manifest.blocks) // args.shards
    with (
        LocalMesh(LocalOptions(model=args.model, shards=args.shards, rows=rows, context=CONTEXT)) as mesh,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as alone,
    ):
        assert alone.stdin is not None and alone.stdout is not None
        assert alone.stdout.readline() == "ready\n"
        for _ in range(args.rounds):
            for count, result in results.items():
                options, size = BusOptions(urls=(mesh.url,)), count * hidden_bytes
                result["bare_s"].append(asyncio.run(bare_hop_s(options, size)))
                result["between_stages_s"].append(asyncio.run(bare_hop_between_stages_s(options, size, stage_bytes)))
                alone.stdin.write(f"{count}\n")
                alone.stdin.flush()
                result["one_process_s"].append(float(alone.stdout.readline()))
                step_s, parts = asyncio.run(through_the_mesh(options, manifest.name, count))
                result["mesh_s"].append(step_s)
                result["step"].append(parts)
        alone.stdin.close()
    print("| sessions | one process, tokens/s | mesh, tokens/s | ratio | hop beyond computing, ms | a bare one | between stages |")
    print("|---|---|---|---|---|---|---|")
    for count, result in results.items():
        ours, alone_s = statistics.median(result["mesh_s"]), statistics.median(result["one_process_s"])
        hop, bare, between = (
            statistics.median(seconds) * 1e3
            for seconds in ([parts["hop_s"] for parts in result["step"]], result["bare_s"], result["between_stages_s"])
        )
        speeds = f"{count / alone_s:.1f} | {count / ours:.1f} | {alone_s / ours:.2f}"
        print(f"| {count} | {speeds} | {hop:.2f} | {bare:.2f} (x {hop / bare:.1f}) | {between:.2f} (x {hop / between:.1f}) |")
        names = [name for name in result["step"][0] if name.endswith("_s")]
        means = {name: statistics.median(step[name] for step in result["step"]) for name in names}
        print(", ".join(f"{name[:-2]} {seconds * 1e3:.2f} ms" for name, seconds in means.items()), file=sys.stderr)
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
