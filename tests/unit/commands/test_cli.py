"""The command line itself: help is quick, and a wrong line is answered with what would be right."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import pytest

from mesh import cli
from mesh.commands.push import rate_of
from mesh.errors import BadRequest

NAMES = [name for group in cli.COMMANDS.values() for name in group]


@pytest.mark.parametrize("name", NAMES)
def test_the_list_describes_each_command_as_its_own_help_does(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    place, text = next(group[name] for group in cli.COMMANDS.values() if name in group)
    module, function = place.split(":")
    subparsers = cli._Parser(prog="mesh").add_subparsers()
    getattr(import_module(f"mesh.commands.{module}"), function)(subparsers)
    assert [(action.dest, action.help) for action in subparsers._choices_actions] == [(name, text)]
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"usage: mesh {name}")


def test_the_list_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {name} " in said for name in NAMES)
    assert cli.main([]) == 2 and "usage: mesh" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out.startswith("mesh ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("upp", "there is no command upp (did you mean `mesh up`?): see `mesh --help`"),
        ("frobnicate", "there is no command frobnicate: see `mesh --help`"),
        ("up", "MODEL is missing: see `mesh up --help`"),
        ("up m --shards three", "--shards: 'three' is no whole number: see `mesh up --help`"),
        ("up m --strategy fast", "--strategy: 'fast' is none of least_loaded, round_robin, queue_group: see `mesh up --help`"),
        ("up m --repliccas=3", "there is no option --repliccas (did you mean --replicas?): see `mesh up --help`"),
        ("top --zzz 3", "there is no option --zzz: see `mesh top --help`"),
        ("chat hello", "hello: more than this command takes: see `mesh chat --help`"),
        ("top --interval", "--interval: expected one argument: see `mesh top --help`"),
    ],
)
def test_a_wrong_line_is_answered_in_one_line(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments.split())
    assert ended.value.code == 2 and capsys.readouterr().err == f"mesh: {words}\n"


def test_a_level_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SystemExit):
        cli.main(["status", "--log-level", "loud"])


def test_help_imports_no_heavy_package() -> None:
    heavy = ("asyncio", "nats", "numpy", "pydantic", "rich")
    code = f"import sys, mesh.cli; mesh.cli.main(['--help']); print([m for m in {heavy} if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"


def _parsers() -> list[tuple[str, argparse.ArgumentParser]]:
    """Every parser that reads positionals, those of actions such as `mesh pki issue` included."""
    found = []
    waiting: list[tuple[str, argparse.ArgumentParser]] = [(name, cli._parser_of(name)) for name in NAMES]
    while waiting:
        name, parser = waiting.pop()
        actions = next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), {})
        waiting += [(f"{name} {action}", inner) for action, inner in actions.items()]
        if any(not action.option_strings and action.choices is None for action in parser._actions):
            found.append((name, parser))
    return sorted(found, key=lambda each: each[0])


PARSERS = _parsers()


@pytest.mark.parametrize("place", range(len(PARSERS)), ids=[name for name, _ in PARSERS])
def test_options_and_positionals_come_in_any_order(place: int) -> None:
    _, parser = PARSERS[place]
    positionals = [f"word{index}" for index, action in enumerate(a for a in parser._actions if not a.option_strings)]
    required = [action for action in parser._actions if action.required and action.option_strings]
    action = next(a for a in [*required, *parser._actions] if a.option_strings and a.nargs is None and a.type in (None, int, float, Path))
    option = [action.option_strings[-1], "3" if action.choices is None else str(next(iter(action.choices)))]
    others = [word for a in required if a is not action for word in (a.option_strings[-1], "x")]
    lines = [[*others, *positionals[:at], *option, *positionals[at:]] for at in range(len(positionals) + 1)]
    first, *rest = (vars(parser.parse_args(line)) for line in lines)
    assert all(values == first for values in rest)
    assert {word for word in positionals if word in map(str, _flat(first.values()))} == set(positionals)


def _flat(values: Iterable[object]) -> list[object]:
    return [each for value in values for each in (value if isinstance(value, list) else [value])]


def test_a_connection_before_the_word_list_or_remove_is_not_forgotten() -> None:
    args = cli._parser_of("models").parse_args(["--nats", "nats://far:4222", "--json", "remove", "tiny"])
    assert (args.nats, args.json, args.name, args.local, args.force) == ("nats://far:4222", True, "tiny", False, False)
    args = cli._parser_of("models").parse_args(["--nats", "nats://far:4222", "list", "--nats", "nats://near:4222", "--json"])
    assert (args.nats, args.json) == ("nats://near:4222", True)


@pytest.mark.parametrize("line", ["pull tiny nowhere --pull-rate 0MB/s", "join --pull-rate 0bit/s"])
def test_a_rate_at_which_nothing_comes_is_refused(line: str) -> None:
    name, *words = line.split()
    with pytest.raises(BadRequest, match="give more than 0, or leave it out"):
        rate_of(cli._parser_of(name).parse_args(words))


def test_a_prompt_may_follow_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "nowhere", "--max-tokens", "4", "hi"]) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
