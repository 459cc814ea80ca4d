"""Greedy tokens of one model with kernels, without kernels and by onnxruntime on its blocks, cut into several numbers of shards, alone and
beside other sessions. All must be equal.

    python bench/greedy.py MODEL_DIR [--tokens 256] [--shards 1,3,30] [--rows 4]

Prints a line for each way, and exits with 1 where one differs: then with the first place, and the difference of the two likeliest logits
there by onnxruntime, which says whether rounding decided.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from mesh.importer.verify.oracle import OrtBlock
from mesh.kernels.library import kernels
from mesh.model.manifest import Manifest, block_name
from mesh.runtime.generate import Pipeline
from mesh.runtime.programs import Compiled
from mesh.runtime.sampling import SamplingParams

PROMPT = [1, 9690, 198, 2683, 359, 260, 11173, 418, 287]
GREEDY = SamplingParams(temperature=0)


def alone(model: Path, shards: int, count: int, compiled: Compiled) -> list[int]:
    pipeline = Pipeline.load(model, shards=shards, context=len(PROMPT) + count, compiled=compiled)
    return pipeline.complete(PROMPT, GREEDY, max_tokens=count).ids


def beside_others(model: Path, count: int, rows: int) -> list[int]:
    """The tokens of the last of `rows` sessions that decode together; the others have prompts of their own."""
    pipeline = Pipeline.load(model, rows=rows, context=len(PROMPT) + rows + count)
    prompts = [[*PROMPT, *range(100, 100 + rows - row - 1)] for row in range(rows)]
    tokens = [pipeline.start(row, prompt, GREEDY, max_tokens=count).id for row, prompt in enumerate(prompts)]
    found = [tokens[-1]]
    for step in range(count - 1):
        positions = np.array([len(prompt) + step for prompt in prompts])
        tokens = [token.id for token in pipeline.decode(np.arange(rows), positions, np.array(tokens))]
        found.append(tokens[-1])
    return found


class Oracle:
    """The blocks in onnxruntime."""

    def __init__(self, model: Path, count: int) -> None:
        manifest = Manifest.load(model)
        names = [block_name("embed"), *map(block_name, range(manifest.layers)), block_name("head")]
        caches = [None, *manifest.cache, None]
        self._blocks = [
            OrtBlock(model, name, slots=len(PROMPT) + count, cache=cache, dtype=np.float32)
            for name, cache in zip(names, caches, strict=True)
        ]
        self.margins: list[float] = []

    def tokens(self, count: int) -> list[int]:
        given, start, found = np.array(PROMPT, np.int64), 0, list[int]()
        while len(found) < count:
            x, size = given, len(given)
            for block in self._blocks:
                x = block.run(x, start)
            best = np.sort(x[-1])[-2:]
            self.margins.append(float((best[1] - best[0]) / np.abs(x[-1]).max()))
            found.append(int(x[-1].argmax()))
            start, given = start + size, np.array(found[-1:], np.int64)
        return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--shards", default="1,3,30")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)  # the child without kernels
    args = parser.parse_args()
    if args.only:
        print(json.dumps(alone(args.model, args.only, args.tokens, {})))
        return 0
    oracle = Oracle(args.model, args.tokens)
    expected = timed("onnxruntime", lambda: oracle.tokens(args.tokens))
    compiled: Compiled = {}
    found: dict[str, list[int]] = {}
    for shards in map(int, args.shards.split(",")):
        run = partial(alone, args.model, shards, args.tokens, compiled)
        found[f"{shards} shards, kernels {kernels().name}"] = timed(f"{shards} shards", run)
    found[f"beside {args.rows - 1} others"] = timed("beside others", lambda: beside_others(args.model, args.tokens, args.rows))
    found["without kernels"] = timed("without kernels", lambda: without_kernels(args.model, args.tokens))
    different = 0
    for way, tokens in found.items():
        at = next((place for place, pair in enumerate(zip(tokens, expected, strict=True)) if pair[0] != pair[1]), None)
        different += at is not None
        print(f"{way}: {'equal' if at is None else f'differs at {at}, where the two likeliest differ by {oracle.margins[at]:.1e}'}")
    return 1 if different else 0


def without_kernels(model: Path, count: int) -> list[int]:
    command = [sys.executable, __file__, str(model), "--tokens", str(count), "--only", "1"]
    with tempfile.TemporaryFile() as out:
        subprocess.run(command, stdout=out, env={**os.environ, "MESH_KERNELS": "none"}, check=True)
        out.seek(0)
        tokens: list[int] = json.loads(out.read())
    return tokens


def timed(what: str, run: Callable[[], list[int]]) -> list[int]:
    began = time.perf_counter()
    tokens = run()
    print(f"{what}: {len(tokens)} tokens in {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return tokens


if __name__ == "__main__":
    raise SystemExit(main())
