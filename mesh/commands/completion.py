"""`mesh completion`: what a shell needs to complete the words of `mesh`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

__all__ = ["add_parser", "script"]

_DESCRIPTION = """\
Print a script that completes commands and options.

  bash: mesh completion bash > ~/.local/share/bash-completion/completions/mesh
  zsh:  mesh completion zsh > "${fpath[1]}/_mesh"
  fish: mesh completion fish > ~/.config/fish/completions/mesh.fish"""


@dataclass
class _Words:
    """What may follow a command. `path`: its words, such as ("batch", "submit")."""

    path: tuple[str, ...]
    help: str
    words: dict[str, str] = field(default_factory=dict)  # an option or a command -> its help
    values: dict[str, tuple[str, ...]] = field(default_factory=dict)  # an option -> what it may be


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "completion",
        help="completion of commands in a shell",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    from mesh.commands.table import add_command, descriptions

    commands = descriptions()
    found = [_Words((), "", dict(commands))]
    for name, text in commands.items():
        parser = add_command(argparse.ArgumentParser(prog="mesh").add_subparsers(), name)
        found += _words((name,), text, parser)
    print(script(args.shell, found), end="")
    return 0


def _words(path: tuple[str, ...], text: str, parser: argparse.ArgumentParser) -> Iterator[_Words]:
    mine = _Words(path, text)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            mine.words |= {name: helps.get(name, "") for name in action.choices}
            for name, inner in action.choices.items():
                yield from _words((*path, name), helps.get(name, ""), inner)
            continue
        for option in action.option_strings:
            mine.words[option] = " ".join((action.help or "").split())
            if action.choices is not None:
                mine.values[option] = tuple(map(str, action.choices))
        if not action.option_strings and action.choices is not None:
            mine.words |= dict.fromkeys(map(str, action.choices), "")
    yield mine


def script(shell: str, found: list[_Words]) -> str:
    """The script for a shell."""
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](found)


def _bash(found: list[_Words]) -> str:
    cases = "".join(f'    "{" ".join(one.path)}") words="{" ".join(one.words)}" ;;\n' for one in found)
    values = "".join(
        f'    "{" ".join(one.path)} {option}") words="{" ".join(choices)}" ;;\n' for one in found for option, choices in one.values.items()
    )
    commands = "|".join(f'"{" ".join(one.path)}"' for one in found if one.path)
    return f"""\
# bash completion of mesh
_mesh() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" path="" words="" word
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "${{path:+$path }}$word" in {commands}) path="${{path:+$path }}$word" ;; esac
  done
  case "$path" in
{cases}  esac
  case "$path $before" in
{values}  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _mesh mesh
"""


def _zsh(found: list[_Words]) -> str:
    return "#compdef mesh\nautoload -U +X bashcompinit && bashcompinit\n" + _bash(found)


def _fish(found: list[_Words]) -> str:
    lines = ["# fish completion of mesh"]
    for one in found:
        condition = f"__fish_seen_subcommand_from {one.path[0]}" if one.path else "__fish_use_subcommand"
        condition += "".join(f"; and __fish_seen_subcommand_from {word}" for word in one.path[1:])
        for word, text in one.words.items():
            if word.startswith("-") and not word.startswith("--"):
                continue
            kind = f"-l {word[2:]}" if word.startswith("--") else f"-f -a {word}"
            choices = f" -x -a {_quoted(' '.join(one.values[word]))}" if word in one.values else ""
            lines.append(f"complete -c mesh -n {_quoted(condition)} {kind}{choices} -d {_quoted(text)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
