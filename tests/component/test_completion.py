"""The scripts of `mesh completion`, run by the shells they are for."""

from __future__ import annotations

import contextlib
import io
import shutil
import subprocess
from pathlib import Path

import pytest

from mesh import cli


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, made = tmp_path_factory.mktemp("completion"), {}
    for shell in ("bash", "zsh", "fish"):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert cli.main(["completion", shell]) == 0
        made[shell] = folder / f"mesh.{shell}"
        made[shell].write_text(said.getvalue())
    return made


def shell(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name} here")
    return found


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("dr", {"drain"}),
        ("batch ", {"submit", "status", "result", "cancel", "dead", "list"}),
        ("batch submit --ma", {"--max-tokens"}),
        ("up model --strategy ", {"least_loaded", "round_robin", "queue_group"}),
        ("status --log-level w", {"warning"}),
        ("status --nats-cont", {"--nats-context"}),
    ],
)
def test_bash_completes(scripts: dict[str, Path], line: str, words: set[str]) -> None:
    typed = ["mesh", *line.split(" ")]
    program = f"source {scripts['bash']}; COMP_WORDS=({' '.join(repr(word) for word in typed)}); COMP_CWORD={len(typed) - 1}; _mesh"
    done = subprocess.run(
        [shell("bash"), "--norc", "-c", program + '; printf "%s\\n" "${COMPREPLY[@]}"'], capture_output=True, text=True, check=True
    )
    assert done.stderr == "" and words <= set(done.stdout.split())
    assert not typed[-1] or all(word.startswith(typed[-1]) for word in done.stdout.split())


@pytest.mark.parametrize("name", ["zsh", "fish"])
def test_the_scripts_of_other_shells_read(scripts: dict[str, Path], name: str) -> None:
    subprocess.run([shell(name), "-n", str(scripts[name])], check=True)
