"""A progress bar on standard error, if that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from mesh.settings.units import format_bytes

__all__ = ["amount", "progress_bar"]


_BYTES_FROM = 100_000
"""A larger total is of bytes. Everything else that is counted (blocks, steps, shards) is fewer."""


class _DoneColumn(ProgressColumn):
    """How much is done, in units that people read."""

    def render(self, task: Task) -> Text:
        return Text(amount(int(task.completed), None if task.total is None else int(task.total)), style="progress.download")


def amount(done: int, total: int | None) -> str:
    """`12 of 30`, or `1.2 GB of 4.8 GB`."""
    if total is None:
        return ""
    return f"{format_bytes(done)} of {format_bytes(total)}" if total >= _BYTES_FROM else f"{done} of {total}"


@contextmanager
def progress_bar(*, quiet: bool = False, sizes: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A function (what, done, total) that draws one bar, starting anew for each total. `sizes`: they are bytes, and the bar says how fast
    they come and how long the rest will take."""
    if quiet or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    pace: tuple[ProgressColumn, ...] = (TransferSpeedColumn(), TimeRemainingColumn()) if sizes else (TimeElapsedColumn(),)
    columns = (TextColumn("{task.description:<24}"), BarColumn(), _DoneColumn(), *pace)
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield show
