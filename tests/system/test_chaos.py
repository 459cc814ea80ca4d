"""A minute of bench/chaos.py: everything is killed, suspended and restarted, and no token is lost, repeated or wrong."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parents[2] / "bench" / "chaos.py"


@pytest.fixture(scope="module")
def chaos() -> ModuleType:
    spec = importlib.util.spec_from_file_location("chaos", BENCH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("mode", ["balance", "mirror"])
def test_no_token_is_lost_repeated_or_wrong(chaos, model, mode):
    plan = chaos.Plan(kills=6, stops=2, server_restarts=1, longest_s=280)
    report = chaos.run(model, plan, seed=7, mode=mode)
    assert report.clean, json.dumps(report.as_dict(), indent=1)
    assert sum(report.done.values()) == 9
