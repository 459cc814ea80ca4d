"""The memory of a container: real control groups, with a process in them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

LIMIT = 600 * 1024 * 1024
PLACES = (("/sys/fs/cgroup/memory", "memory.limit_in_bytes"), ("/sys/fs/cgroup", "memory.max"))

PROGRAM = """
import os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
Path(sys.argv[2]).write_bytes(bytes(200 * 2**20))  # in the cache of files: the system drops it when memory is wanted
held = b"x" * (100 * 2**20)
from mesh.host.machine import machine
here = machine()
print(here.limit_bytes, here.available_bytes, here.memory_bytes)
"""


@pytest.fixture
def group() -> Iterator[Path]:
    """A control group with a limit of memory."""
    for root, limit in PLACES:
        folder = Path(root) / f"mesh-test-{os.getpid()}"
        try:
            folder.mkdir()
        except OSError:
            continue
        try:
            if (folder / limit).exists():
                (folder / limit).write_text(str(LIMIT))
                yield folder
                return
        except OSError:
            continue
        finally:
            folder.rmdir()
    pytest.skip("no control group with a limit of memory can be made here")


def test_the_memory_is_that_of_the_control_group(group: Path, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM, group, tmp_path / "file"], capture_output=True, text=True, check=True)
    limit, available, memory = map(int, done.stdout.split())
    assert limit == LIMIT < memory
    assert 350 * 2**20 < available < 500 * 2**20, "less what the process holds, but not less the cached file"
