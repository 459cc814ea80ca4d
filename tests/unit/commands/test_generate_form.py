"""What --schema, --regex, --choice and --grammar of `mesh generate` ask for."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from mesh.commands.generate import add_parser, form_of
from mesh.errors import BadRequest


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["generate", "a prompt", *words])


def test_each_option_is_a_form(tmp_path: Path) -> None:
    schema, grammar = tmp_path / "schema.json", tmp_path / "grammar.lark"
    schema.write_text('{"type": "object"}')
    grammar.write_text('start: "a"')
    assert form_of(parse()) is None
    assert form_of(parse("--schema", str(schema))) == {"json": {"type": "object"}}
    assert form_of(parse("--grammar", str(grammar))) == {"grammar": 'start: "a"'}
    assert form_of(parse("--regex", "[a-z]+")) == {"regex": "[a-z]+"}
    assert form_of(parse("--choice", "yes", "--choice", "no")) == {"choice": ["yes", "no"]}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(BadRequest, match="is no JSON"):
        form_of(parse("--schema", str(broken)))
    with pytest.raises(BadRequest, match="cannot be read"):
        form_of(parse("--grammar", str(tmp_path / "none")))
    with pytest.raises(SystemExit):
        parse("--regex", "a", "--choice", "b")
