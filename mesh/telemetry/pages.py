"""The pages of docs/ that are made from the code: `python -m mesh.telemetry.pages docs`. A test compares them with the code.

Each page has its tables between two marks; what stands around them is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

from mesh.telemetry import conventions, metrics

__all__ = ["TABLES", "updated"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def _spans() -> str:
    rows = [[f"`{span.name}`", span.service, span.within or "none: a root", span.meaning] for span in conventions.SPANS]
    return _table(["span", "process", "parent", "what it is"], rows)


def _attributes() -> str:
    rows = [[f"`{attribute.name}`", attribute.type, attribute.meaning] for attribute in conventions.ATTRIBUTES]
    return _table(["attribute", "type", "meaning"], rows)


def _phases() -> str:
    return _table(["`mesh.phase`", "its time"], [[f"`{name}`", meaning] for name, meaning in conventions.PHASES.items()])


def _metrics(process: str) -> Callable[[], str]:
    def table() -> str:
        rows = [
            [f"`{metric.name}`", metric.kind, ", ".join(f"`{label}`" for label in metric.labels), f"`{metric.otel_name}`", metric.help]
            for metric in metrics.METRICS
            if metric.process == process
        ]
        return _table(["metric", "kind", "labels", "over OTLP", "what it is"], rows)

    return table


TABLES: Final[dict[str, dict[str, Callable[[], str]]]] = {
    "tracing.md": {"spans": _spans, "phases": _phases, "attributes": _attributes},
    "metrics.md": {process: _metrics(process) for process in ("coordinator", "shard", "gateway", "every")},
}
"""Page -> mark -> the table that belongs there."""


def updated(page: str, text: str) -> str:
    """`text`, the page `page` of docs/, with its tables as the code says them. ValueError: a mark is missing."""
    for mark, make in TABLES[page].items():
        pattern = re.compile(rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"{page}: the marks of {mark} are missing")
        table = make().replace("\\", r"\\")
        text = pattern.sub(rf"\g<1>{table}\n\g<2>", text)
    return text


if __name__ == "__main__":
    for name in TABLES:
        path = Path(sys.argv[1]) / name
        path.write_text(updated(name, path.read_text()))
