"""How long an import takes, and the most memory that its process has.

    python bench/import_memory.py SOURCE OUT [-- OPTIONS OF mesh import]

SOURCE is what `mesh import` takes, such as a directory that bench/random_llama.py writes. The memory is the peak that the system counts as
resident, mapped files included.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

GB = 1e9


def measure(source: Path, out: Path, options: list[str]) -> tuple[float, int]:
    """Seconds, and the most bytes."""
    command = [sys.executable, "-m", "mesh.cli", "import", str(source), str(out), "--force", *options]
    began = time.monotonic()
    _, status, used = os.wait4(os.posix_spawn(sys.executable, command, os.environ), 0)
    if status:
        raise SystemExit(f"mesh import ended with {os.waitstatus_to_exitcode(status)}")
    return time.monotonic() - began, used.ru_maxrss << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("options", nargs="*")
    given = parser.parse_args()
    seconds, most = measure(given.source, given.out, given.options)
    print(f"{given.source.name}: {seconds:.0f} s, at most {most / GB:.2f} GB")


if __name__ == "__main__":
    main()
