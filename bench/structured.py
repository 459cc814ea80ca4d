"""What forms of answers cost: steps of rows with and without a grammar, taken in turn, so that a busy machine slows both alike.

    python bench/structured.py MODEL [--rows 1,32] [--steps 60]

For each number of rows: the median step of plain greedy rows, of rows that all draw tokens (temperature 1), of rows that all follow a
schema greedily, and of a batch in which every other row follows one. Each kind takes a few steps in turn, of which the first is not
counted: masks are computed in a thread beside the next step, so beside that one run those of the kind before. Beside the median step: the
median and the quartiles of what each step took of the greedy one of the same turn, and the part of the step that waited for drawing:
applying masks and choosing, or the wait for masks alone where the likeliest allowed tokens suffice. Also one mask's time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from mesh.model.grammar import Vocabulary, grammar_of
from mesh.model.manifest import Manifest
from mesh.protocol.structured import StructuredOutputs
from mesh.runtime.device import prepare
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams

SCHEMA: dict[str, Any] = {
    "type": "array",
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 24},
            "mail": {"type": "string", "format": "email"},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 4},
        },
        "required": ["name", "mail", "age", "tags"],
        "additionalProperties": False,
    },
    "minItems": 50,
}
PROMPT = list(range(40, 56))
_TURN = 5
"""Steps of a kind in a row. The first is not counted, nor the first turn."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    prepare()
    grammar = grammar_of(StructuredOutputs(json=SCHEMA))
    for rows in map(int, args.rows.split(",")):
        measure(args.model, rows, args.steps, grammar)
    masks(args.model, grammar)


def measure(model: Path, rows: int, steps: int, grammar: str) -> None:
    kinds = {
        "greedy": [SamplingParams()] * rows,
        "drawn": [SamplingParams(temperature=1.0, seed=1)] * rows,
        "a schema": [SamplingParams(grammar=grammar)] * rows,
        "every other row a schema": [SamplingParams(grammar=grammar if row % 2 == 0 else None) for row in range(rows)],
    }
    pipeline = Pipeline.load(model, rows=rows * len(kinds), context=512)
    runs = {name: Run(pipeline, params, first * rows) for first, (name, params) in enumerate(kinds.items())}
    for turn in range(1 + -(-steps // (_TURN - 1))):
        for run in runs.values():
            for step in range(_TURN):
                run.step(counts=turn > 0 and step > 0)
    plain = runs["greedy"].took
    for name, run in runs.items():
        low, middle, high = statistics.quantiles([own / other for own, other in zip(run.took, plain, strict=True)], n=4)
        took_ms, drawing_ms = (statistics.median(each) * 1e3 for each in (run.took, run.drawing))
        print(
            f"{rows:3} rows, {name}: median step {took_ms:.2f} ms over {len(run.took)} steps, of which drawing {drawing_ms:.2f} ms;",
            end=" ",
        )
        print(f"{middle:.3f} ({low:.3f} to {high:.3f}) of greedy")


class Run:
    """One batch of rows from `first` on."""

    def __init__(self, pipeline: Pipeline, params: list[SamplingParams], first: int) -> None:
        self.pipeline = pipeline
        self.rows = np.arange(first, first + len(params), dtype=np.int32)
        self.tokens = [pipeline.start(int(row), PROMPT, each, max_tokens=300).id for row, each in zip(self.rows, params, strict=True)]
        self.position = len(PROMPT)
        self.took: list[float] = []
        self.drawing: list[float] = []

    def step(self, *, counts: bool) -> None:
        began = time.perf_counter()
        answer = self.pipeline.decode(self.rows, np.full(len(self.rows), self.position), np.array(self.tokens))
        if counts:
            self.took.append(time.perf_counter() - began)
            self.drawing.append(self.pipeline.stages[-1].sampled_s)
        self.tokens = [token.id for token in answer]
        assert min(self.tokens) >= 0
        self.position += 1


def masks(model: Path, grammar: str) -> None:
    """One mask at a time, along one answer that takes the first token that is allowed."""
    began = time.perf_counter()
    vocabulary = Vocabulary.load(model, Manifest.load(model))
    read_s = time.perf_counter() - began
    began = time.perf_counter()
    matcher = vocabulary.matcher(grammar)
    compile_s = time.perf_counter() - began
    took, tokens = [], list[int]()
    for _ in range(300):
        began = time.perf_counter()
        matcher.go_to(tokens)
        mask = matcher.allowed()
        took.append(time.perf_counter() - began)
        assert mask is not None
        tokens.append(int(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0]))
    print(
        f"a mask: median {statistics.median(took) * 1e6:.0f} us, 99th percentile {np.percentile(took, 99) * 1e6:.0f} us; "
        f"compiling {compile_s * 1e3:.1f} ms; reading {vocabulary.size:,} tokens {read_s * 1e3:.0f} ms"
    )


if __name__ == "__main__":
    main()
