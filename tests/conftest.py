"""Fixtures of component and system tests alike. Heavy packages are imported inside the fixtures, so that a unit test starts at once."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest
from running import Run

T = TypeVar("T")
DEADLINE_S = 300.0

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's threads would wait for cores that the other workers have


_imported = 0


def pytest_collection() -> None:
    gc.disable()  # until all that is collected is there


def pytest_collection_finish() -> None:
    _leave_alone()
    gc.enable()


def pytest_runtest_logfinish() -> None:
    if len(sys.modules) > _imported + 20:
        _leave_alone()


def _leave_alone() -> None:
    """Tests and what they import stay to the end, a million objects; to visit them at each full collection took a quarter of the time."""
    global _imported
    _imported = len(sys.modules)
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def compilation_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Programs that one process compiled serve the others."""
    from mesh.runtime.device import prepare

    if "MESH_CACHE_DIR" not in os.environ:
        os.environ["MESH_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))
    prepare()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the tiny model."""
    from tiny_mesh_model import make_model

    return make_model(tmp_path_factory.mktemp("models"))


@pytest.fixture
def run() -> Run:
    """Run a coroutine to its end, within a deadline."""

    def call(work: Coroutine[Any, Any, T], /) -> T:
        async def bounded() -> T:
            return await asyncio.wait_for(work, DEADLINE_S)

        return asyncio.run(bounded())

    return call
