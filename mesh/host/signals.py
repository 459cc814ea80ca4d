"""How a process of the mesh runs its event loop and ends: the first SIGTERM or SIGINT drains, the second one ends at once."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from types import FrameType
from typing import Any, NoReturn, TypeVar

__all__ = ["ignore_signals", "interrupt_on_signals", "on_signals", "run_loop"]

_ENDING = (signal.SIGTERM, signal.SIGINT)

Result = TypeVar("Result")


def run_loop(main: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    """Run `main` to its end in a new event loop and return its result. The loop is uvloop's where that is installed: it halves the
    cost of a hop."""
    try:
        import uvloop
    except ImportError:
        return asyncio.run(main())
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def on_signals(first: Callable[[], Any], later: Callable[[], Any] | None = None) -> None:
    """Call `first` at the first SIGTERM or SIGINT, and `later` (default: `first` again) at each further one. The running event loop
    makes the calls. They replace those of an earlier `on_signals`."""
    asked = False

    def end() -> None:
        nonlocal asked
        repeated, asked = asked, True
        (later if repeated and later is not None else first)()

    loop = asyncio.get_running_loop()
    for number in _ENDING:
        loop.add_signal_handler(number, end)


def interrupt_on_signals() -> None:
    """For programs without an event loop: SIGTERM and SIGINT raise KeyboardInterrupt in the main thread. SIGINT is set too, because a
    shell starts background jobs with SIGINT ignored."""

    def interrupted(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    for number in _ENDING:
        signal.signal(number, interrupted)


def ignore_signals() -> None:
    """From here on SIGTERM and SIGINT do nothing: the process is about to end, and nothing should interrupt that."""
    for number in _ENDING:
        signal.signal(number, signal.SIG_IGN)
