"""What shards were planned to take, and what their processes take: at rest, and while every row is in use.

    python bench/memory.py MODEL_DIR... [--shards 3] [--rows 4] [--context 1024]

One line for each shard. Resident is what the system counts for the process, with the files of libraries, which the shards of a host share;
`own` leaves these out.
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from resident import memory

from mesh.client import AsyncMeshClient
from mesh.local.mesh import LocalMesh, LocalOptions

MB = 1e6
TOKENS = 64


def resident(pid: int) -> tuple[float, float]:
    """Megabytes of a process: all that is resident, and what no other process has."""
    everything, own = memory(pid, "VmRSS", "RssAnon")
    return everything / MB, own / MB


async def use_every_row(mesh: LocalMesh, rows: int, context: int) -> None:
    """Prompts and answers that fill each row of each shard to the end."""
    async with AsyncMeshClient(options=mesh.bus) as client:
        vocabulary = 90
        prompts = [[1 + (row + place) % vocabulary for place in range(context - TOKENS)] for row in range(rows)]
        await asyncio.gather(*(client.generate(tokens=prompt, max_tokens=TOKENS, ignore_eos=True) for prompt in prompts))


async def planned(mesh: LocalMesh) -> dict[str, tuple[str, float]]:
    """Layers and planned megabytes of each shard."""
    async with AsyncMeshClient(options=mesh.bus) as client:
        layers = {shard.shard: str(shard.layers) for shard in (await client.status()).shards}
        return {stats.shard: (layers[stats.shard], stats.predicted_bytes / MB) for stats in await client.shard_stats()}


def measure(model: Path, shards: int, rows: int, context: int) -> None:
    with LocalMesh(LocalOptions(model=model, shards=shards, rows=rows, context=context, http=False)) as mesh:
        plans = asyncio.run(planned(mesh))
        pids = {name: mesh.processes[name].pid for name in plans}
        rest = {name: resident(pid) for name, pid in pids.items()}
        asyncio.run(use_every_row(mesh, rows, context))
        for name, (layers, plan) in plans.items():
            used = resident(pids[name])
            print(
                f"| {model.name} | {layers} | {plan:.0f} | {rest[name][0]:.0f} ({rest[name][0] / plan:.2f}) | "
                f"{used[0]:.0f} ({used[0] / plan:.2f}) | {used[1]:.0f} |",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--shards", type=int, default=3)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    given = parser.parse_args()
    print("| model | layers | planned, MB | at rest, MB (of planned) | in use, MB (of planned) | own, MB |\n|---|---|---|---|---|---|")
    for model in given.models:
        measure(model, given.shards, given.rows, given.context)


if __name__ == "__main__":
    main()
