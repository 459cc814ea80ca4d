"""All node cases of onnx.backend.test, each both compiled and on known values, except those listed with a reason."""

from __future__ import annotations

import re
from collections.abc import Iterator

import jax
import pytest
from onnx_cases import node_cases, run
from onnx_exclusions import EXCLUDED, reason

NAMES = sorted(node_cases())
INCLUDED = [name for name in NAMES if reason(name) is None]
LEFT_OUT = [name for name in NAMES if reason(name) is not None]


@pytest.fixture(autouse=True)
def quick_compilation() -> Iterator[None]:
    """Thousands of one-node programs: compiling them well would take longer than all they compute."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize("name", INCLUDED)
def test_backend_case(name: str) -> None:
    run(node_cases()[name])


@pytest.mark.parametrize("name", LEFT_OUT)
def test_excluded_case_does_not_pass(name: str) -> None:
    try:
        run(node_cases()[name])
    except Exception:
        return
    pytest.fail(f"{name} passes: take it off the exclusions ({reason(name)})")


def test_every_exclusion_excludes_something() -> None:
    idle = [pattern for pattern in EXCLUDED if not any(re.fullmatch(pattern, name) for name in NAMES)]
    assert not idle


def test_most_cases_pass() -> None:
    assert len(INCLUDED) >= 1700, f"{len(INCLUDED)} of {len(NAMES)} cases"
