"""Where the files of a source may lie: a source comes from elsewhere, and what it names must not be a file of its reader."""

from __future__ import annotations

import os
from pathlib import Path

from mesh.errors import CorruptModel, short
from mesh.host.paths import inside

__all__ = ["inside_source", "refuse_pointer"]

_POINTER = b"version https://git-lfs"


def inside_source(directory: Path, name: str) -> Path:
    """`directory`/`name`, or CorruptModel where that lies elsewhere, also by a symbolic link.

    A directory of the Hugging Face cache, MODEL/snapshots/REVISION or a folder in it, consists of links to the files in MODEL/blobs: these
    are allowed.
    """
    path, real = directory / name, Path(os.path.realpath(directory))
    blobs = next((parent.parent / "blobs" for parent in real.parents if parent.name == "snapshots"), None)
    if blobs is not None and ".." not in Path(name).parts and Path(os.path.realpath(path)).parent == blobs:
        return path
    try:
        return inside(directory, name)
    except ValueError as error:  # a zero byte in the name
        raise CorruptModel(f"{short(repr(name))} is no name of a file ({error})") from None


def refuse_pointer(path: Path) -> None:
    """CorruptModel where git-lfs has left a note in place of the file."""
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CorruptModel(f"{path} is a git-lfs pointer, not the file itself: run `git lfs pull` in its repository")
