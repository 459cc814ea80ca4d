"""A progress bar on standard error, if that is a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(*, quiet: bool = False, sizes: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A function (what, done, total) that draws one bar, starting anew for each total. `sizes`: they are bytes, and the bar says how fast
    they come and how long the rest will take."""
    if quiet or not sys.stderr.isatty():
        yield lambda what, done, total: None
        return
    counts: tuple[ProgressColumn, ...] = (MofNCompleteColumn(), TimeElapsedColumn())
    if sizes:
        counts = (DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description:<24}"), BarColumn(), *counts, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=None)

        def show(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        yield show
