"""Copies of mapped files that never hold the file and the copy together."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from mesh.host import pages


def mapped_kib(path: Path) -> int:
    """How much of a mapped file is in this process's memory."""
    found = re.search(rf"{re.escape(str(path))}\n(?:\w+: .*\n)*?Rss: +(\d+) kB", Path("/proc/self/smaps").read_text())
    assert found is not None
    return int(found[1])


@pytest.mark.skipif(sys.platform != "linux", reason="resident pages are read as Linux lists them")
@pytest.mark.parametrize("shape", [(4096, 1024), (2, 2048, 1024), (1024, 4096)])
def test_a_mapped_file_is_copied_piece_by_piece(shape: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "PIECE_BYTES", 1 << 20)
    path = tmp_path / "numbers"
    np.random.default_rng(0).standard_normal(shape, np.float32).tofile(path)
    source = np.memmap(path, np.float32, "r", shape=shape)
    target = pages.aligned(shape[::-1], np.float32).T  # as a weight is turned
    pages.copy_mapped(source, target)
    assert mapped_kib(path) <= 1024
    np.testing.assert_array_equal(target, source)
    assert mapped_kib(path) >= 16 * 1024  # what comparing the whole has read
    assert target.T.__array_interface__["data"][0] % 64 == 0
