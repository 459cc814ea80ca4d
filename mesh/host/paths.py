"""Where files are on this machine, and that a name from elsewhere stays in its directory."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

from mesh.errors import CorruptModel

__all__ = ["cache_directory", "inside", "open_inside"]


def cache_directory() -> Path:
    """Where compiled programs, measured kernel variants and fetched models are kept.

    $MESH_CACHE_DIR where it is set, else `stagemesh` in the user's cache directory.
    """
    chosen = os.environ.get("MESH_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stagemesh"


def inside(directory: Path, name: str) -> Path:
    """`directory`/`name`, where that is a place in `directory`, also after symbolic links are followed; else CorruptModel.

    `directory` itself may be a symbolic link. `name` may have folders in it (external data of an ONNX file).
    """
    path = directory / name
    root, target = os.path.realpath(directory), os.path.realpath(path)
    if target == root or os.path.commonpath((root, target)) != root:
        raise CorruptModel(f"{name!r} lies outside the model's directory {directory}: a model is read from its own directory only")
    return path


def open_inside(directory: Path, name: str) -> io.BufferedReader:
    """`directory`/`name`, open for reading. CorruptModel: it lies outside `directory`, also by a symbolic link, or is no regular file (a
    pipe or a device has no end). The errors of `open` otherwise."""
    path = os.path.realpath(inside(directory, name))
    # The resolved path has no links; one that takes its place now is not followed. Without O_NONBLOCK opening a pipe waits for ever.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise CorruptModel(f"{directory / name} is no regular file: fetch or import the model again")
    return os.fdopen(handle, "rb")
