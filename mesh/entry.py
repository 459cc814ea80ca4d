"""Where the program `mesh` begins. An interrupt while it is still being imported ends it without a traceback."""

import os
import signal
from types import FrameType

__all__ = ["main"]


def main() -> int:
    """Run the command line; returns the exit code."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # a shell starts background jobs with SIGINT ignored
        from mesh.cli import main as run

        return run()
    signal.signal(signal.SIGINT, _end)
    from mesh.cli import main as run

    return run(loaded=_loaded)


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(130)


def _loaded() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
