"""`mesh status` on narrow terminals: no line is wrapped, and what a reader needs first stays."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from mesh.commands.drawing import coordinator_table, shard_table
from mesh.commands.progress import amount

SHARD: dict[str, Any] = {
    "start": 10, "stop": 20, "name": "shard-2", "state": "ready", "used": 3, "rows": 8, "load": 0.4, "step_s": 0.0123,
    "memory_bytes": 846_000_000, "out_bytes_per_s": 12_300.0, "host": "node-2.example.org",
}  # fmt: skip
LOST = {**SHARD, "name": "shard-3", "state": "lost", "gone_s": 12.0, "start": 20, "stop": 30}
COORDINATOR = {
    "name": "c-37e41095", "live": 3, "queued": 1, "finished": 1200, "failed": 2, "cancelled": 1, "restarts": 0, "tokens": 99_999,
    "reused_tokens": 1_234,
}  # fmt: skip


def drawn(table: Any, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_tables_fit_a_terminal_without_wrapping(width: int) -> None:
    lines = drawn(shard_table([SHARD, LOST], width=width), width)
    assert len(lines) == 3 and not any("…" in line[:50] for line in lines)
    assert "10-20" in lines[1] and "shard-2" in lines[1] and "ready" in lines[1] and "3 of 8" in lines[1] and "846 MB" in lines[1]
    assert "lost 12 s ago" in lines[2]
    heads = drawn(coordinator_table([COORDINATOR], width=width), width)
    assert len(heads) == 2 and "c-37e41095" in heads[1] and "99,999" in heads[1] and "…" not in heads[1]
    assert ("1,234" in heads[1]) == (width >= 90)
    assert ("█" in lines[1]) == (width >= 110) and ("node-2" in lines[1]) == (width >= 80)


def test_progress_is_in_units_that_people_read() -> None:
    assert [amount(12, 30), amount(1_200_000_000, 4_800_000_000), amount(0, 651_000_000), amount(3, None)] == [
        "12 of 30",
        "1.2 GB of 4.8 GB",
        "0 B of 651 MB",
        "",
    ]
