"""Where things are kept on this machine."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_directory"]


def cache_directory() -> Path:
    """Where compiled programs, measured product forms and fetched models are kept: $MESH_CACHE_DIR, or stagemesh in the user's cache."""
    chosen = os.environ.get("MESH_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stagemesh"
