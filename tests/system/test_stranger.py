"""docs/provisioning/local.md as a stranger reads it: from an empty folder to tokens on five hosts, command by command as the page has them.

Part of `make test-provision`. Prints how long each command took, and how many there are.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import blocks_of, commands_of
from lab import missing
from places import DOCS, ROOT
from unconnected import unconnected

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("MESH_TEST_PROVISION"), reason="takes ten minutes and more: make test-provision"),
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

PAGE = DOCS / "provisioning" / "local.md"
AWAY = "terraform destroy"
COMMAND_S = 1500


class Shell:
    """One bash, which reads the commands of the page one after the other and says when each has ended, and how."""

    def __init__(self, folder: Path) -> None:
        home = folder / "home"
        (home / ".ssh").mkdir(parents=True, mode=0o700)
        environment = {**unconnected(), "HOME": str(home), "CHECKPOINT_DISABLE": "1"}
        environment.pop("TF_CLI_CONFIG_FILE", None)
        self.start = folder / "start"
        self.start.mkdir()
        self._log = folder / "shell.log"
        with self._log.open("w") as log:
            self._bash = subprocess.Popen(
                ["bash"], cwd=self.start, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )

    def run(self, command: str) -> tuple[str, float]:
        """What it said, and the seconds that it took."""
        assert self._bash.stdin is not None and self._bash.stdout is not None
        began = time.monotonic()
        self._bash.stdin.write(f"{{ {command}\n}} < /dev/null\ncode=$?; echo; echo ended $code\n")
        self._bash.stdin.flush()
        said = ""
        while (line := self._bash.stdout.readline()) and not re.fullmatch(r"ended \d+", line.strip()):
            said += line
        assert line.strip() == "ended 0", f"{command}: {said[-3000:]}{self._log.read_text()[-3000:]}"
        return said, time.monotonic() - began

    def close(self) -> None:
        self._bash.kill()
        self._bash.communicate()


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    shell.close()


def test_a_stranger_comes_from_an_empty_folder_to_tokens_on_five_hosts(shell: Shell) -> None:
    commands = [command for block in blocks_of(PAGE) for command in commands_of(block.text)]
    away = [command for command in commands if AWAY in command]
    there = [command for command in commands if AWAY not in command]
    assert len(away) == 1
    _, took = shell.run(f"git clone --quiet {ROOT} repository && cd repository")
    total, answers = took, []
    try:
        for command in there:
            said, took = shell.run(command)
            total += took
            print(f"{took:6.1f} s  {command.splitlines()[0]}", flush=True)
            answers.append(said)
        print(f"{len(there) + 1} commands, {total / 60:.1f} minutes")
        assert '"completion_tokens"' in answers[-2]  # over HTTPS, through nginx
        assert len(answers[-1].split()) > 3  # over NATS
    finally:
        shell.run(f"cd {shell.start}/repository && {away[0]}")
    assert not list(Path("/var/lib/mesh-lab/hosts").glob("*"))
