"""`mesh chat` with a real mesh, its input a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

from mesh.local.mesh import LocalMesh

PATIENCE_S = 60.0


class Terminal:
    """A program on a terminal of its own."""

    def __init__(self, *arguments: str, url: str) -> None:
        self._ours, theirs = pty.openpty()
        environment = {**os.environ, "MESH_NATS_URLS": url, "TERM": "dumb", "COLUMNS": "60"}
        command = [sys.executable, "-m", "mesh.cli", *arguments]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, start_new_session=True)
        os.close(theirs)
        self.said = ""

    def until(self, pattern: str) -> str:
        """What it says, up to and with the pattern."""
        while (found := re.search(pattern, self.said, re.DOTALL)) is None:
            self.said += os.read(self._ours, 4096).decode(errors="replace").replace("\r", "")
        before, self.said = self.said[: found.end()], self.said[found.end() :]
        return before

    def type(self, line: str) -> None:
        os.write(self._ours, f"{line}\n".encode())

    def end(self) -> int:
        code = self.process.wait(PATIENCE_S)
        os.close(self._ours)
        return code


def test_a_conversation_names_its_model_and_is_steered(mesh: LocalMesh) -> None:
    chat = Terminal("chat", "--max-tokens", "4", url=mesh.url)
    assert re.search(r"tiny, temperature 0, at most 4 tokens\. /help lists the commands", chat.until("stops an answer.*> "))
    chat.type("/help")
    listed = chat.until("\n> ")
    assert all(name in listed for name in ("/new", "/temperature X", "/max-tokens N", "/system TEXT", "/model", "/quit"))
    chat.type("/temperature 0.7")
    assert "tiny, temperature 0.7" in chat.until("\n> ")
    chat.type("/temperature hot")
    assert "hot is not possible: give 0 to 100" in chat.until("\n> ")
    chat.type("/max-tokens 2")
    assert "at most 2 tokens" in chat.until("\n> ")
    chat.type("/nothing")
    assert "there is no command /nothing" in chat.until("\n> ")
    chat.type("Rain?")
    assert len(chat.until("\n> ")) > len("Rain?")
    chat.type("/quit")
    assert chat.end() == 0
