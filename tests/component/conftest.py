"""A real nats-server, once for all tests of a process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import CONTEXT, LONG_TOKENS, PROMPT

from mesh.local.nats_server import NatsServer
from mesh.runtime.generate import Pipeline
from mesh.runtime.sampling import SamplingParams


@pytest.fixture(scope="session", autouse=True)
def compiled_once(compilation_cache: None) -> None:
    """Every test here uses the compilation cache."""


@pytest.fixture(scope="session")
def server() -> Iterator[NatsServer]:
    with NatsServer.start(monitor=True) as running:
        yield running


@pytest.fixture(scope="module")
def expected(model: Path) -> list[int]:
    """The greedy tokens of the request `LONG`, by one process."""
    return Pipeline.load(model, context=CONTEXT).complete(PROMPT, SamplingParams(temperature=0.0), max_tokens=LONG_TOKENS).ids


@pytest.fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on another machine: nothing of this one's cache folder is known, so that models come over the network."""
    monkeypatch.setenv("MESH_CACHE_DIR", str(tmp_path_factory.mktemp("elsewhere")))
