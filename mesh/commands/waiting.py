"""What `mesh generate` and `mesh chat` say while a request waits for layers that no shard serves."""

from __future__ import annotations

import sys
from typing import Self, TextIO

from mesh.client import Waiting

__all__ = ["WaitingLine"]

_EVERY_S = 5.0
"""Where standard error is no terminal, a line is printed this often."""


class WaitingLine:
    """One line on standard error that counts the wait. Call `show` with each Waiting document, and `clear` before anything else is
    printed. A context manager: the line is cleared at the end."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = sys.stderr if out is None else out
        self._terminal = self._out.isatty()
        self._shown = False
        self._next_s = 0.0

    def show(self, waiting: Waiting) -> None:
        if not waiting.missing:
            self.clear()
            return
        layers = ", ".join(waiting.missing)
        text = f"mesh: no shard serves layers {layers}: waiting, {waiting.waited_s:.0f} of {waiting.patience_s:g} s (`mesh join` adds one)"
        if self._terminal:
            print(f"\r\x1b[2K{text}", end="", file=self._out, flush=True)
        elif not self._shown or waiting.waited_s >= self._next_s:
            self._next_s = waiting.waited_s + _EVERY_S
            print(text, file=self._out, flush=True)
        self._shown = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.clear()

    def clear(self) -> None:
        """The wait is over."""
        if self._shown and self._terminal:
            print("\r\x1b[2K", end="", file=self._out, flush=True)
        self._shown = False
