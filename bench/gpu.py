"""The mesh on a GPU: its tokens beside those of the CPU, its speed, its memory, and what its metrics say.

    python bench/gpu.py MODEL_DIR [--shards 1,3] [--sessions 1,8,32] [--rounds 3] [--out FOLDER]

The shards of a mesh share the GPU of this machine. Greedy tokens are compared with those of one process on the CPU. FOLDER gets the
figures and the text that each shard's metrics had before and after the load.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from mesh_overhead import CONTEXT, STEPS, prompt, through_the_mesh

from mesh.bus import BusOptions
from mesh.client import AsyncMeshClient
from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.model.manifest import Manifest

# All shards are on one GPU here: none may take most of its memory when it starts.
SHARED = {"MESH_RESOURCES_ENABLE_GPU": "true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}


def on_the_cpu(model: Path, count: int) -> None:
    """Print the greedy tokens of `count` prompts, each on a line."""
    from mesh.runtime.device import prepare
    from mesh.runtime.generate import Pipeline
    from mesh.runtime.sampling import SamplingParams

    prepare()
    pipeline = Pipeline.load(model, shards=1, rows=1, context=CONTEXT)
    for index in range(count):
        tokens = [token.id for token in pipeline.generate(prompt(index), SamplingParams(temperature=0), max_tokens=STEPS)]
        print(json.dumps(tokens), flush=True)


async def tokens_of(url: str, model: str, count: int) -> list[list[int]]:
    async with AsyncMeshClient(options=BusOptions(urls=(url,)), model=model) as client:

        async def one(index: int) -> list[int]:
            answer = await client.generate(tokens=prompt(index), max_tokens=STEPS, ignore_eos=True, temperature=0)
            return list(answer.tokens)

        return await asyncio.gather(*(one(index) for index in range(count)))


def shard_metrics(mesh: LocalMesh) -> dict[str, str]:
    return {name: httpx.get(url).text for name, url in mesh.metrics_urls.items() if name.startswith("shard")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--shards", default="1,3")
    parser.add_argument("--sessions", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--on-the-cpu", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.on_the_cpu:
        on_the_cpu(args.model, args.prompts)
        return
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    counts, name = [int(part) for part in args.sessions.split(",")], Manifest.load(args.model).name
    command = [sys.executable, __file__, str(args.model), "--on-the-cpu", "--prompts", str(args.prompts)]
    alone = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, text=True, check=True)
    expected = [json.loads(line) for line in alone.stdout.splitlines()]
    os.environ.update(SHARED)
    results: list[dict[str, Any]] = []
    for shards in (int(part) for part in args.shards.split(",")):
        began = time.monotonic()
        with LocalMesh(LocalOptions(model=args.model, shards=shards, rows=max(counts), context=CONTEXT, http=False)) as mesh:
            ready_s, before = time.monotonic() - began, shard_metrics(mesh)
            print(f"{shards} shards were ready after {ready_s:.1f} s", flush=True)
            tokens = asyncio.run(tokens_of(mesh.url, name, args.prompts))
            same = sum(ours == theirs for ours, theirs in zip(tokens, expected, strict=True))
            for count in counts:
                steps = [asyncio.run(through_the_mesh(BusOptions(urls=(mesh.url,)), name, count))[0] for _ in range(args.rounds)]
                speed = count / statistics.median(steps)
                results.append({"shards": shards, "sessions": count, "tokens_per_s": speed, "ready_s": ready_s, "same": same})
                print(f"{shards} shards, {count} sessions: {speed:.1f} tokens/s; {same} of {args.prompts} are the CPU's", flush=True)
            after = shard_metrics(mesh)
        if args.out:
            for which, texts in (("before", before), ("after", after)):
                for shard, text in texts.items():
                    (args.out / f"{shards}-{shard}-{which}.txt").write_text(text)
    if args.out:
        (args.out / "gpu.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
