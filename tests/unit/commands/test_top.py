"""What `mesh top` draws."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest
from rich.console import Console

from mesh import cli
from mesh.commands.top import render

SHARD: dict[str, Any] = {
    "name": "a", "start": 0, "stop": 2, "state": "ready", "rows": 4, "used": 2, "load": 0.5, "step_s": 0.02, "memory_bytes": 5_000_000,
    "out_bytes_per_s": 1500.0, "host": "vm-1",
}  # fmt: skip
MODEL: dict[str, Any] = {
    "name": "m", "state": "degraded", "reason": "b is lost; the other replicas carry on.", "live": 3, "queued": 1, "capacity": 4,
    "point": [1.0, 42.5, None, None, 2.0, 1.0], "latency": {"first_token_s": 0.2}, "reused": 0.62, "sessions": [],
    "step": {"step_s": 0.04, "compute_s": 0.03, "queue_s": 0.0, "codec_s": 0.0, "hops_s": 0.004},
    "shards": [SHARD, SHARD | {"name": "b", "state": "lost", "gone_s": 3.2, "used": 0, "load": 0.0}],
}  # fmt: skip


def drawn(**values: Any) -> str:
    console = Console(file=io.StringIO(), width=160)
    console.print(render({"error": None, "seen_s": 0.0, "models": [MODEL], **values}))
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def test_figures_shards_and_losses_are_drawn() -> None:
    said = drawn()
    for words in (
        "serving, with a loss: b is lost",
        "42.5 tokens/s",
        "62% of prompts reused",
        "2 of 4 sessions",
        "1 waiting",
        "75% computing, 10% on the way",
    ):
        assert words in said
    assert "█████░░░░░ 2 of 4" in said and "lost 3 s ago" in said and "vm-1" in said


def test_sessions_are_drawn_and_not_without_end() -> None:
    session = {"state": "decoding", "tokens": 3, "max_tokens": 9, "total_s": 1.5, "route": ["a", "c"]}
    said = drawn(models=[MODEL | {"sessions": [session | {"request": f"r{number}"} for number in range(15)]}])
    assert "r0" in said and "3 of 9" in said and "a > c" in said and "and 5 more" in said and "r12" not in said


def test_top_says_why_it_shows_nothing_new() -> None:
    assert "gone What is shown was seen" in drawn(error="gone", seen_s=5.0)
    assert "mesh up MODEL_DIR" in drawn(models=[])


def test_without_a_terminal_it_says_what_to_use(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert cli.main(["top", "--nats", "nats://127.0.0.1:1"]) == 2
    assert "mesh status --json" in capsys.readouterr().err
