"""Every `mesh` command on a page is one: the command is there, and so are its options. tests/system/test_docs.py runs those of blocks."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from doc_pages import PAGES, blocks_of, label, mesh_lines, mesh_spans

from mesh.commands.table import add_command, descriptions

OTHER = {"COMMAND", "ACTION", "..."}
"""Words that stand for any command."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(message)


@pytest.mark.parametrize("page", [page for page in PAGES if any(mesh_lines(block.text) for block in blocks_of(page))], ids=label)
def test_the_commands_of_blocks_are_understood(page: Path) -> None:
    for block in blocks_of(page):
        for words in mesh_lines(block.text):
            if words == ["--version"]:
                continue
            subparsers: Any = Parser(prog="mesh").add_subparsers()
            parser = add_command(subparsers, words[0])
            try:
                _, extra = parser.parse_known_args(words[1:])
            except ValueError as error:
                pytest.fail(f"{block.place}: mesh {' '.join(words)}: {error}")
            assert not [word for word in extra if word.startswith("-")], f"{block.place}: mesh {' '.join(words)}: {extra}"


@pytest.mark.parametrize("page", PAGES, ids=label)
def test_the_commands_in_prose_are_there(page: Path) -> None:
    for words in mesh_spans(page.read_text()):
        name = words[0].rstrip(",")
        if name in OTHER or name.startswith("-"):
            continue
        assert name in descriptions(), f"{label(page)}: mesh {' '.join(words)}"
        options = {word.partition("=")[0].rstrip(",") for word in words if word.startswith("--")}
        assert not options - options_of(name), f"{label(page)}: mesh {' '.join(words)}: {options - options_of(name)}"


def options_of(name: str) -> set[str]:
    """The options of a command and of the commands below it."""
    found: set[str] = set()
    waiting = [add_command(Parser(prog="mesh").add_subparsers(), name)]
    while waiting:
        for action in waiting.pop()._actions:
            found |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                waiting += action.choices.values()
    return found


def test_a_wrong_word_would_be_found() -> None:
    assert list(mesh_lines("mesh status --nats x > file\nMESH_A=1 mesh up m # no\n")) == [["status", "--nats", "x"], ["up", "m"]]
    assert list(mesh_spans("`mesh up --shards 3` and ```mesh no```")) == [["up", "--shards", "3"]]
    assert "--shards" in options_of("up") and "--shardz" not in options_of("up") and "--wait" in options_of("batch")
