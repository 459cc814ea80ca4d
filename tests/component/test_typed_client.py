"""A script of a user passes a strict type check: the package is marked as typed, and the client's arguments have types."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import asyncio

from mesh.client import AsyncMeshClient, Completion, MeshClient
from mesh.errors import Busy, MeshError, PromptTooLong

def ask(client: MeshClient, question: str) -> str:
    answer: Completion = client.generate(question, max_tokens=50, temperature=0.7, stop=["\\n"], seed=7, timeout_s=5.0)
    with client.stream(messages=[{"role": "user", "content": question}], logprobs=2) as stream:
        texts = [chunk.text for chunk in stream]
    results = client.batch(["One.", {"prompt": "Two.", "max_tokens": 3}], max_tokens=20)
    good = [result.text or "" for result in results if not isinstance(result, MeshError)]
    status = client.submit_batch(["One."], id="mine", max_tokens=3)
    return f"{answer.text} {texts} {good} {status.id} {answer.usage.completion_tokens}"

async def later() -> float | None:
    async with AsyncMeshClient("nats://127.0.0.1:4222", model="tiny") as client:
        try:
            async with client.stream("Rain?", top_p=0.9, raw=True) as stream:
                async for chunk in stream:
                    print(chunk.text, end="")
        except (Busy, PromptTooLong) as error:
            print(error.code)
        answer = await client.chat([{"role": "user", "content": "Rain?"}], max_tokens=5)
        return answer.timing.tokens_per_s

with MeshClient() as mesh:
    print(ask(mesh, "What is rain?"), asyncio.run(later()))
"""
WRONG = """
from mesh.client import MeshClient

with MeshClient() as mesh:
    mesh.generate("Rain?", max_token=5)
    mesh.generate("Rain?", temperature="hot")
    mesh.generate(7)
"""


def mypy(path: Path) -> subprocess.CompletedProcess[str]:
    """As a user runs it: with none of this project's settings. An editable installation is found by a hook, which mypy does not run:
    the path says where the package is, and its own files are not what is checked."""
    options = ["--strict", "--config-file", "", "--cache-dir", str(path.parent / "cache"), "--python-version", "3.11"]
    options += ["--follow-imports", "silent"]
    environment = {**os.environ, "MYPYPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "mypy", *options, str(path)]
    return subprocess.run(command, capture_output=True, text=True, cwd=path.parent, env=environment)


def test_a_script_of_a_user_passes_a_strict_type_check_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "right.py").write_text(SCRIPT)
    (tmp_path / "wrong.py").write_text(WRONG)
    right, wrong = mypy(tmp_path / "right.py"), mypy(tmp_path / "wrong.py")
    assert right.returncode == 0, right.stdout
    found = [line for line in wrong.stdout.splitlines() if "error:" in line]
    assert [int(line.split(":")[1]) for line in found] == [5, 6, 7], wrong.stdout
