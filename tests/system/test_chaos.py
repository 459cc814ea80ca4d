"""A minute of bench/chaos.py: everything is killed, suspended and restarted, and no token is lost, repeated or wrong."""

from __future__ import annotations

import json
from pathlib import Path

import chaos
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["balance", "mirror"])
def test_no_token_is_lost_repeated_or_wrong(model: Path, mode: str) -> None:
    plan = chaos.Plan(kills=6, stops=2, server_restarts=1, longest_s=280)
    report = chaos.run(model, plan, seed=7, mode=mode)
    assert report.clean, json.dumps(report.as_dict(), indent=1)
    assert sum(report.done.values()) == 9
