"""Meshes of real processes: an embedded nats-server, a coordinator and shards of the tiny model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checked_load
import pytest
from edge_tools import edge
from oracle import Oracle

from mesh.local.mesh import LocalMesh, LocalOptions
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams

ROWS, CONTEXT, QUEUE = 4, 64, 16


@pytest.fixture(scope="session", autouse=True)
def compiled_once(compilation_cache: None) -> None:
    """Every test here uses the compilation cache."""


@pytest.fixture(scope="session")
def oracle(model: Path) -> Oracle:
    return Oracle(model, context=CONTEXT)


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> list[list[int]]:
    """The greedy tokens of each prompt of the checked load, by one process."""
    pipeline = Pipeline.load(model, context=checked_load.CONTEXT)
    params = SamplingParams(temperature=0.0)
    return [pipeline.complete(prompt, params, max_tokens=checked_load.TOKENS).ids for prompt in checked_load.PROMPTS]


@pytest.fixture(scope="module", params=[1, 2, 3], ids=lambda count: f"{count}-shards")
def any_mesh(request: pytest.FixtureRequest, model: Path) -> Iterator[LocalMesh]:
    """The same tests through 1, 2 and 3 shards."""
    with LocalMesh(_options(model, shards=request.param)) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def mesh(model: Path) -> Iterator[LocalMesh]:
    """Two ranges."""
    with LocalMesh(_options(model, shards=2)) as running:
        yield running


@pytest.fixture(scope="module")
def url(mesh: LocalMesh) -> Iterator[str]:
    """Of a gateway to the module's mesh."""
    with edge(mesh.url) as running:
        yield running


def _options(model: Path, **values: Any) -> LocalOptions:
    return LocalOptions(model=model, rows=ROWS, context=CONTEXT, coordinator_arguments=("--queue", str(QUEUE)), **values)
