"""A stage with kernels and one without give the same tokens, and a session the same bits alone and among others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model
from mesh.kernels.library import kernels
from mesh.model.manifest import Manifest
from mesh.runtime.generate import Pipeline
from mesh.runtime.loading import load_block
from mesh.runtime.sampling import SamplingParams

pytestmark = pytest.mark.skipif(kernels().name is None, reason=f"kernels: {kernels()}")

PROMPT = [5, 17, 33, 90, 2]
WIDTHS = {
    "32": ImportOptions(),
    "16": ImportOptions(bits=16),
    "8": ImportOptions(bits=8),
    "4": ImportOptions(bits=4),
    "4 and a cache of 16": ImportOptions(bits=4, kv_cache="float16"),
    "a cache of 8": ImportOptions(kv_cache="int8"),
    "products of bfloat16": ImportOptions(products="bfloat16"),
    "heads of 20": ImportOptions(),
    "heads of 20 and products of bfloat16": ImportOptions(products="bfloat16"),
    "heads of 24 and a cache of 16": ImportOptions(kv_cache="float16"),
    "heads of 24 and a cache of 8": ImportOptions(bits=4, kv_cache="int8"),
}
HEADS = {
    "heads of 20": 20,
    "heads of 20 and products of bfloat16": 20,
    "heads of 24 and a cache of 16": 24,
    "heads of 24 and a cache of 8": 24,
}
"""Others have 16 numbers a head: one vector of the kernels."""


@pytest.fixture(scope="module", params=WIDTHS)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, new_llama: Callable[..., Path]) -> Path:
    directory = tmp_path_factory.mktemp("kernels")
    import_model(new_llama(directory / "source", dim=HEADS.get(request.param, 16), hidden=96), directory / "model", WIDTHS[request.param])
    return directory / "model"


def answer(model: Path, rows: int = 1) -> list[int]:
    return (
        Pipeline.load(model, shards=2, rows=rows, context=64, chunk=16).complete(PROMPT, SamplingParams(temperature=0), max_tokens=40).ids
    )


def test_tokens_are_those_without_kernels(imported: Path) -> None:
    code = f"""
import json, pathlib
from mesh.kernels.library import kernels
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams
pipeline = Pipeline.load(pathlib.Path({str(imported)!r}), shards=2, context=64, chunk=16)
tokens = pipeline.complete({PROMPT}, SamplingParams(temperature=0), max_tokens=40).ids
print(json.dumps([kernels().name, str(kernels()), tokens]))
"""
    environment = {**os.environ, "MESH_KERNELS": "none"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    name, text, tokens = json.loads(run.stdout)
    assert (name, text) == (None, "none (MESH_KERNELS is none): narrow weights are multiplied several times slower")
    assert answer(imported) == tokens


def test_a_layer_is_five_calls(imported: Path) -> None:
    graph = load_block(imported, "layer_000").decode.graph
    ours = [node.op.op_type for node in graph.nodes if node.op.domain == "mesh.kernels"]
    assert ours == ["Products", "CachedAttention", "Products", "Products", "Products"]
    assert {node.op.op_type for node in graph.nodes} <= {"Products", "CachedAttention", "Cast", "Unsqueeze", "Mul", "Cos", "Sin"}
    rounds = {node.attributes["rounds"] for node in graph.nodes if node.op.op_type == "Products"}
    assert rounds == {int(Manifest.load(imported).weights.inputs == "bfloat16")}


def test_a_row_has_the_same_bits_alone_and_among_others(imported: Path) -> None:
    """Each row of a decode batch of 1, 2, 3 or 5 rows, on the stage before the head."""
    rng = np.random.default_rng(3)
    rows = 5
    tokens = rng.integers(0, 131, (rows, 12)).astype(np.int32)
    stages = {size: Pipeline.load(imported, shards=2, rows=rows, context=64, chunk=16).stages[0] for size in (1, 2, 3, rows)}
    hidden = {}
    for size, stage in stages.items():
        for row in range(rows):
            stage.open(row, SamplingParams(temperature=0), prompt_length=4)
            stage.prefill(row, 0, tokens[row, :4])
        for at in range(4, 12):
            for start in range(0, rows, size):
                some = np.arange(start, min(start + size, rows))
                result = np.asarray(stage.decode(some, np.full(len(some), at), tokens[some, at]))
                hidden.update({(size, int(row), at): each for row, each in zip(some, result, strict=True)})
    for (size, row, at), state in hidden.items():
        np.testing.assert_array_equal(state, hidden[1, row, at], err_msg=f"row {row} of {size} at {at}")


def test_nothing_of_a_cache_is_copied(imported: Path) -> None:
    """The caches are written where they lie: the temporaries of a step are smaller than one cache."""
    rows = 12 if Manifest.load(imported).cache_dtype == "int8" else 4  # so that a cache is larger than the activations of a step
    stage = Pipeline.load(imported, rows=rows, context=112, chunk=16).stages[0]
    stage.warm_up()
    cache = stage._caches[0].key.nbytes
    steps = [program for key, program in stage.programs._compiled.items() if key[0] == "layers" and not key[1].prefill]
    assert steps
    for program in steps:
        assert program.memory_analysis().temp_size_in_bytes < cache
        assert program.memory_analysis().alias_size_in_bytes >= 2 * cache * len(stage._caches)
