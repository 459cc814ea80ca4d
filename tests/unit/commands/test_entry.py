"""An interrupt at any moment of the start ends the program quietly."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import os, signal, sys

class AtAnImport:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[0]:
            os.kill(os.getpid(), signal.SIGINT)  # as Ctrl-C does

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.argv[0] = sys.argv.pop(1)
sys.meta_path.insert(0, AtAnImport())
from mesh.entry import main
sys.exit(main())
"""


@pytest.mark.parametrize("module", ["mesh.cli", "argparse", "mesh.commands.status", "mesh.client", "nats", "pydantic", "rich.console"])
def test_an_interrupt_while_modules_are_imported_is_quiet(module: str) -> None:
    command = [sys.executable, "-c", PROGRAM, module, "status", "--nats", "nats://127.0.0.1:9"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr in ("", "mesh: interrupted\n"), done.stderr
