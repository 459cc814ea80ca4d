"""Log lines and a progress bar on one terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

PROGRAM = """
import logging
from mesh.commands.progress import progress_bar
from mesh.settings.schema import LoggingSection
from mesh.telemetry.logs import setup_logging
setup_logging(LoggingSection(), role="shard", name="s")
log = logging.getLogger("mesh.shard")
with progress_bar() as progress:
    for part in range(200):
        progress("layer_000.onnx.data", part * 1_000_000, 200_000_000)
        if part % 20 == 0:
            log.info("line number %d of the log", part)
"""


def test_log_lines_are_whole_beside_a_progress_bar() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], stderr=theirs, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"})
    os.close(theirs)
    said = b""
    while True:
        try:
            read = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        if not read:
            break
        said += read
    os.close(ours)
    assert process.wait(60) == 0
    lines = re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode()))
    logged = [line.strip() for line in lines if "line number" in line]
    assert len(logged) == 10 and all(re.search(r"mesh\.shard: line number \d+ of the log$", line) for line in logged), logged
    assert any("MB of 200 MB" in line for line in lines)
