"""`mesh batch` on a real mesh: both forms of lines, errors that name the line, the list, and taking one back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mesh import cli
from mesh.local.mesh import LocalMesh

CHAT = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Rain?"}]}],
    "max_completion_tokens": 4,
    "temperature": 0,
    "model": "any",
}
LINES: list[Any] = [
    "Rain?",
    {"prompt": "Sun?", "max_tokens": 3},
    {"custom_id": "first", "method": "POST", "url": "/v1/chat/completions", "body": CHAT},
    {"custom_id": "second", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 2, "temperature": 0}},
]


@pytest.fixture
def nats(mesh: LocalMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_NATS_URLS", mesh.url)


def written(folder: Path, lines: list[Any]) -> str:
    file = folder / "requests.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) and line.startswith("!") else json.dumps(line) for line in lines))
    return str(file)


@pytest.mark.usefixtures("nats")
def test_both_forms_of_lines_are_answered_and_the_batch_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path, LINES)
    assert cli.main(["batch", "submit", file, "--id", "both", "--max-tokens", "4", "--wait"]) == 0
    capsys.readouterr()
    assert cli.main(["batch", "result", "both", "--requests", file]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer.get("index") for answer in answers] == [0, 1, None, None] and answers[1]["usage"]["completion_tokens"] <= 3
    assert [answer["custom_id"] for answer in answers[2:]] == ["first", "second"]
    chat, text = (answer["response"]["body"] for answer in answers[2:])
    assert (
        chat["object"] == "chat.completion"
        and chat["choices"][0]["message"]["role"] == "assistant"
        and chat["usage"]["completion_tokens"] <= 4
    )
    assert text["object"] == "text_completion" and isinstance(text["choices"][0]["text"], str) and text["usage"]["prompt_tokens"] == 4
    assert cli.main(["batch", "list"]) == 0
    assert " both " in capsys.readouterr().out
    assert cli.main(["batch", "list", "--json"]) == 0
    assert "both" in {json.loads(line)["id"] for line in capsys.readouterr().out.splitlines()}


@pytest.mark.usefixtures("nats")
def test_a_batch_that_is_taken_back_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = [{"tokens": [5, 17, index % 90], "max_tokens": 50, "ignore_eos": True} for index in range(200)]
    assert cli.main(["batch", "submit", written(tmp_path, many), "--id", "taken-back"]) == 0
    assert cli.main(["batch", "cancel", "taken-back"]) == 0
    assert "cancelled" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.usefixtures("nats")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("!{", "line 3: Expecting property name"),
        (7, "line 3: neither a JSON string nor an object"),
        ({"prompt": "x", "max_tokens": 0}, "line 3: max_tokens: should be 1 or more"),
        ({"prompt": "x", "max_token": 5}, "line 3: max_token is no argument of a request: did you mean max_tokens?"),
        ({"custom_id": "a", "url": "/v1/embeddings", "body": {}}, "line 3: POST /v1/embeddings: give POST /v1/chat/completions"),
        ({"custom_id": "a", "body": {**CHAT, "tools": [{}]}}, "line 3: body.tools: a line of a batch cannot have it"),
    ],
)
def test_an_error_names_the_line_of_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: Any, words: str) -> None:
    file = written(tmp_path, ["One.", "!", line])
    Path(file).write_text(Path(file).read_text().replace("!\n", "\n").replace("!{", "{"))
    assert cli.main(["batch", "submit", file]) == 2
    said = capsys.readouterr().err
    assert f"{file}, {words}" in said and len(said.splitlines()) == 1
