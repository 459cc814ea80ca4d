"""The command `mesh`.

Only the module of the command that is asked for is imported: a list of commands, or a wrong one, is answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, cast

from mesh import __version__
from mesh.commands.table import COMMANDS, LOG_LEVELS, add_command, descriptions
from mesh.errors import MeshError

__all__ = ["COMMANDS", "main"]

_DESCRIPTION = "Run a language model that fits no single machine: layer shards in JAX over NATS."
_EPILOG = """\
a mesh on this machine, from nothing:
  mesh import SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
  mesh up models/smollm2 --shards 3
  mesh chat

how a model would be placed on your machines:
  mesh plan models/smollm2 --nodes 8GB,8GB,16GB:speed=2

`mesh COMMAND --help` says more of each. Every error is one line that says what to do; the exit code is then 2."""


class _Parser(argparse.ArgumentParser):
    """Errors are one line, with what was perhaps meant, and where to read on. Options and positionals come in any order."""

    _between_options = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse alone would give `mesh run DIR --shards 2 PROMPT` the prompt None before it reads the options."""
        if self._between_options or self._subparsers is not None:
            return super().parse_known_args(args, namespace)
        self._between_options = True  # argparse reads the options first, then the rest, with this method
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._between_options = False

    def error(self, message: str) -> NoReturn:
        print(f"mesh: {_plain(message)}: see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(2)

    def refuse(self, extra: Sequence[str]) -> NoReturn:
        """What was given and is not known."""
        option = next((word.split("=")[0] for word in extra if word.startswith("-")), None)
        if option is None:
            self.error(f"{' '.join(extra)}: more than this command takes")
        known = [name for action in self._actions for name in action.option_strings if name.startswith("--")]
        near = difflib.get_close_matches(option, known, 1, cutoff=0.7)
        self.error(f"there is no option {option}" + (f" (did you mean {near[0]}?)" if near else ""))


def main(argv: Sequence[str] | None = None, *, loaded: Callable[[], None] = lambda: None) -> int:
    """Run the command line; returns the exit code. `loaded` is called when the command is imported and is about to begin."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    level = _log_level(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version", "version"):
        print(f"mesh {__version__}")
        return 0
    try:
        _log(level)
        parser = _parser_of(arguments[0])
        loaded()
        args, extra = parser.parse_known_args(arguments[1:])
        if extra:
            parser.refuse(extra)
        return int(args.run(args))
    except MeshError as error:
        print(f"mesh: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        print(f"mesh: {_missing(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("mesh: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _log_level(arguments: list[str]) -> str | None:
    """Take --log-level out of the arguments, wherever it stands before a `--`; its value. It goes to every process that this one starts."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    at = next((i for i, word in enumerate(arguments[:end]) if word == "--log-level" or word.startswith("--log-level=")), None)
    if at is None or (arguments[at] == "--log-level" and at + 1 >= end):
        return None  # the command's own parser says what is missing
    word = arguments.pop(at)
    level = word.partition("=")[2] if "=" in word else arguments.pop(at)
    if level not in LOG_LEVELS:
        print(f"mesh: --log-level: '{level}' is none of {', '.join(LOG_LEVELS)}", file=sys.stderr)
        raise SystemExit(2)
    os.environ["MESH_LOGGING_LEVEL"] = level
    return level


def _log(level: str | None) -> None:
    """An error is one line at the end. What is logged meanwhile is for commands that set up a log, or for --log-level."""
    import logging  # not for a list of commands, which is answered at once

    logging.getLogger("mesh").addHandler(logging.NullHandler())
    if level is not None:
        from mesh.settings.schema import LoggingSection
        from mesh.telemetry.logs import setup_logging

        setup_logging(LoggingSection.model_validate({"level": level, "format": "text"}), role="command")


def _missing(error: ModuleNotFoundError) -> str:
    """What to install for a command that needs more than a client."""
    package = (error.name or "").partition(".")[0]
    if package in ("", "mesh"):
        raise error
    extra = "import" if package in ("onnxruntime", "gguf", "safetensors") else "server"
    return f"this needs the package {package}, which is not installed: pip install 'stagemesh[{extra}]'"


def _parser_of(name: str) -> _Parser:
    """The parser of a command; SystemExit(2) for a word that is none."""
    names = descriptions()
    if name not in names:
        near = difflib.get_close_matches(name, names, 1)
        meant = f" (did you mean `mesh {near[0]}`?)" if near else ""
        print(f"mesh: there is no command {name}{meant}: see `mesh --help`", file=sys.stderr)
        raise SystemExit(2)
    subparsers: Any = _Parser(prog="mesh").add_subparsers(metavar="COMMAND")
    return cast("_Parser", add_command(subparsers, name))


def _help() -> str:
    lines = ["usage: mesh COMMAND ...", "", _DESCRIPTION]
    for title, commands in COMMANDS.items():
        lines += ["", f"{title}:", *(f"  {name:<13}{text}" for name, (_, text) in commands.items())]
    return "\n".join([*lines, "", _EPILOG])


def _plain(message: str) -> str:
    """argparse's messages as ours are: what is wrong, then what would be right."""
    message = re.sub(r"^argument (\S+): ", r"\1: ", message)
    message = re.sub(r"invalid (int|float) value: '(.*)'", lambda m: f"'{m[2]}' is no {_NUMBERS[m[1]]}", message)
    message = re.sub(r"invalid choice: '(.*)' \(choose from (.*)\)", lambda m: f"'{m[1]}' is none of {m[2].replace(chr(39), '')}", message)
    return re.sub(r"^the following arguments are required: (.*)", r"\1 is missing", message)


_NUMBERS = {"int": "whole number", "float": "number"}


if __name__ == "__main__":
    sys.exit(main())
