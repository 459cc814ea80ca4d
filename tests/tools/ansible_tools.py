"""Where Ansible is: it lives in an environment of its own, which `make provision-tools` makes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from places import ROOT

__all__ = ["ANSIBLE", "TOOLS"]


def _tools() -> Path:
    chosen = os.environ.get("MESH_PROVISION_TOOLS")
    if chosen:
        return Path(chosen)
    found = shutil.which("ansible-playbook")
    own = ROOT / ".venv-provision" / "bin"
    return Path(found).parent if found and not own.exists() else own


TOOLS = _tools()
ANSIBLE = TOOLS / "ansible-playbook" if (TOOLS / "ansible-playbook").exists() else None
