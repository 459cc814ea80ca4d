"""Files of known content on this host."""

from __future__ import annotations

from pathlib import Path

import pytest

from mesh.host.known_files import KnownFiles

DIGEST = "ab" * 32


def test_a_file_is_found_where_it_was_noted_as_long_as_it_is_there(tmp_path: Path) -> None:
    known, path = KnownFiles(tmp_path / "known"), tmp_path / "weights"
    assert known.find(DIGEST) is None
    path.write_bytes(b"x")
    known.note(DIGEST, path)
    assert KnownFiles(tmp_path / "known").find(DIGEST) == path
    other = tmp_path / "other"
    other.write_bytes(b"x")
    known.note(DIGEST, other)
    assert known.find(DIGEST) == other
    other.unlink()
    assert known.find(DIGEST) is None


def test_one_process_claims_a_content_and_others_see_it_grow(tmp_path: Path) -> None:
    known, part = KnownFiles(tmp_path), tmp_path / "part"
    claim = known.claim(DIGEST, part)
    assert claim is not None and known.claim(DIGEST, tmp_path / "elsewhere") is None
    assert known.grown(DIGEST) == 0
    part.write_bytes(b"12345")
    assert known.grown(DIGEST) == 5
    claim.release()
    again = known.claim(DIGEST, part)
    assert again is not None
    again.release()


def test_without_a_folder_nothing_is_known_and_everything_can_be_claimed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    known = KnownFiles(tmp_path / "file" / "folder")
    known.note(DIGEST, tmp_path / "file")
    assert known.find(DIGEST) is None
    claims = [known.claim(DIGEST, tmp_path / "part") for _ in range(2)]
    assert None not in claims


def test_a_lock_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    """As on a disk that is full."""
    (tmp_path / f"{DIGEST}.lock").symlink_to("/dev/full")
    claims = [KnownFiles(tmp_path).claim(DIGEST, tmp_path / "part") for _ in range(2)]
    assert None not in claims


def test_a_lock_that_says_nonsense_has_not_grown(tmp_path: Path) -> None:
    known = KnownFiles(tmp_path)
    (tmp_path / f"{DIGEST}.lock").write_bytes(b"\0\xff")
    assert known.grown(DIGEST) == 0


@pytest.mark.parametrize("number", [1, 2])
def test_a_name_that_is_no_link_is_nothing_known(tmp_path: Path, number: int) -> None:
    if number == 1:
        (tmp_path / DIGEST).mkdir()
    else:
        (tmp_path / DIGEST).write_bytes(b"not a link")
    assert KnownFiles(tmp_path).find(DIGEST) is None
