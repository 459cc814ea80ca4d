"""Where files are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """The folder of compiled programs, measured kernel variants and fetched models: $MESH_CACHE_DIR, else `stagemesh` in the user's cache
    folder."""
    chosen = os.environ.get("MESH_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stagemesh"
