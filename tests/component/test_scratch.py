"""A temporary folder is removed by its owner, or by the next owner if the first was killed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mesh.host.scratch import ScratchFolder

PREFIX = "mesh-scratch-test-"
OWNER = f"""
import sys
from mesh.host.scratch import ScratchFolder
folder = ScratchFolder("{PREFIX}")
print(folder.path, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="locks are those of POSIX")
def test_the_folder_of_an_owner_that_was_killed_goes_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdin is not None
    theirs = Path(owner.stdout.readline().strip())
    (theirs / "log").write_text("x")
    made_by_another = tmp_path / f"{PREFIX}unlocked"
    made_by_another.mkdir()
    first = ScratchFolder(PREFIX)
    assert theirs.is_dir() and first.path.parent == tmp_path  # its owner lives
    owner.kill()
    owner.wait()
    owner.stdin.close()
    owner.stdout.close()
    assert theirs.is_dir()
    second = ScratchFolder(PREFIX)
    assert not theirs.exists()
    assert first.path.is_dir() and made_by_another.is_dir()
    for folder in (first, second, second):
        folder.remove()
    assert not first.path.exists() and not second.path.exists()
