"""A real nats-server and a real model directory, once for all tests of a process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from mesh.importer.options import ImportOptions
from mesh.importer.run import import_model
from mesh.local.nats_server import NatsServer
from mesh.runtime.device import prepare

T = TypeVar("T")
FIXTURES = Path(__file__).parent.parent / "fixtures" / "onnx"
DEADLINE_S = 120.0


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs that one shard compiled serve the others."""
    if "MESH_CACHE_DIR" not in os.environ:
        os.environ["MESH_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    prepare()


@pytest.fixture(scope="session")
def server() -> Iterator[NatsServer]:
    with NatsServer.start(monitor=True) as running:
        yield running


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of 3 layers with random weights."""
    out = tmp_path_factory.mktemp("models") / "tiny"
    import_model(FIXTURES / "llama-dynamo.onnx", out, ImportOptions(), name="tiny")
    return out


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, T]], T]:
    """Run a coroutine to its end, within a deadline."""

    def call(work: Coroutine[Any, Any, T]) -> T:
        async def bounded() -> T:
            return await asyncio.wait_for(work, DEADLINE_S)

        return asyncio.run(bounded())

    return call
