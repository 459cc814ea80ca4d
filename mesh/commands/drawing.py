"""A mesh in a terminal: what `mesh status` and `mesh top` share. Arguments are parts of a snapshot of mesh.client.read_model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from mesh.settings.units import format_bytes, format_seconds

__all__ = ["coordinator_table", "headline", "session_table", "shard_table"]

_STYLES = {"ready": "green", "degraded": "yellow", "starting": "yellow", "down": "red"}
_WORDS = {"ready": "serving", "degraded": "serving, with a loss", "starting": "getting ready", "down": "not serving"}
_SHARD_STYLES = {"ready": "", "lost": "red", "suspected": "red", "left": "dim"}
_BAR = 10
_PLAIN: dict[str, Any] = {"box": None, "header_style": "dim", "pad_edge": False, "padding": (0, 2, 0, 0)}
_SESSIONS = 10


def headline(model: Mapping[str, Any]) -> Text:
    style = _STYLES[model["state"]]
    line = Text.assemble((model["name"], "bold"), "  ", ("●", style), f" {_WORDS[model['state']]}")
    return line.append(f": {model['reason']}" if model["reason"] else "")


def shard_table(shards: Sequence[Mapping[str, Any]], *, rates: bool = True, width: int = 200) -> Table:
    """`width`: columns of the terminal. What it has no room for is left out, the least needed first: bars, sending, host, step."""
    bars, wide, middle = width >= 110, width >= 90, width >= 70
    table = Table("layers", "shard", "state", "rows", "load", **_PLAIN)
    for title in ("step", "memory") if middle else ("memory",):
        table.add_column(title, justify="right")
    if rates and wide:
        table.add_column("sends", justify="right")
    if middle:
        table.add_column("host")
    for column in table.columns:
        column.no_wrap = True
    for shard in sorted(shards, key=lambda shard: (shard["start"], shard["stop"], shard["name"])):
        gone = shard["state"] in ("lost", "left")
        cells = [
            f"{shard['start']}-{shard['stop']}",
            shard["name"],
            f"{shard['state']} {shard['gone_s']:.0f} s ago" if gone else shard["state"],
        ]
        cells.append("" if gone else f"{_bar(shard['used'] / shard['rows'], bars)}{shard['used']} of {shard['rows']}")
        cells.append("" if gone else f"{_bar(shard['load'], bars)}{shard['load']:4.0%}")
        if middle:
            cells.append(format_seconds(shard["step_s"]) if shard["step_s"] else "")
        cells.append("" if gone else format_bytes(shard["memory_bytes"]))
        if rates and wide:
            cells.append("" if gone else f"{format_bytes(round(shard['out_bytes_per_s']))}/s")
        table.add_row(*cells, *([shard["host"]] if middle else []), style=_SHARD_STYLES.get(shard["state"], "yellow"))
    return table


def session_table(sessions: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("request", "state", "tokens", "for", "way", **_PLAIN)
    for session in sessions[:_SESSIONS]:
        way = " > ".join(str(shard) for shard in session["route"])
        tokens = f"{session['tokens']} of {session['max_tokens']}"
        table.add_row(session["request"], session["state"], tokens, format_seconds(session["total_s"]), way)
    if len(sessions) > _SESSIONS:
        table.add_row(f"and {len(sessions) - _SESSIONS} more")
    return table


def coordinator_table(coordinators: Sequence[Mapping[str, Any]], *, width: int = 200) -> Table:
    """`width`: columns of the terminal; a narrow one shows the most needed counts. `reused`: tokens of prompts that were not computed."""
    table = Table("coordinator", **_PLAIN)
    narrow, all_of_them = (
        ("live", "waiting", "finished", "failed", "tokens"),
        ("live", "waiting", "finished", "failed", "cancelled", "restarts", "tokens"),
    )
    titles: Sequence[str] = narrow if width < 80 else all_of_them if width < 90 else (*all_of_them, "reused")
    for title in titles:
        table.add_column(title, justify="right")
    for column in table.columns:
        column.no_wrap = True
    for coordinator in coordinators:
        values = {
            **coordinator,
            "live": coordinator["live"] - coordinator["queued"],
            "waiting": coordinator["queued"],
            "reused": coordinator["reused_tokens"],
        }
        table.add_row(coordinator["name"], *(f"{values[title]:,}" for title in titles))
    return table


def _bar(share: float, drawn: bool) -> str:
    if not drawn:
        return ""
    full = round(min(max(share, 0.0), 1.0) * _BAR)
    return "█" * full + "░" * (_BAR - full) + " "
