"""`mesh gateway` as a process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import yaml
from waiting import Talking

from mesh.host.process import dying_with_parent

__all__ = ["Gateway"]


class Gateway(Talking):
    def __init__(self, folder: Path, nats: str, content: dict[str, Any], *arguments: str, **environment: str) -> None:
        config = folder / "gateway.yaml"
        config.write_text(yaml.safe_dump({"nats": {"urls": [nats]}, **content}))
        command = dying_with_parent([sys.executable, "-m", "mesh.cli", "gateway", "--config", str(config), *arguments])
        super().__init__(command, env={**os.environ, **environment})

    def url(self) -> str:
        """Where it listens, once it does."""
        return self.wait(r"HTTP on (https?:[^\s\"]+)")[1]
