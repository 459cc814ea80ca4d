"""The command `mesh`.

Only the module of the command that is asked for is imported: a list of commands, or a wrong one, is answered at once.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from mesh import __version__
from mesh.errors import MeshError

__all__ = ["COMMANDS", "main"]

# group -> command -> (module of mesh.commands and the function that adds its parser, help)
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "run a mesh": {
        "up": ("up:add_parser", "a whole mesh on this machine"),
        "shard": ("shard:add_shard_parser", "serve one layer range, as a file says"),
        "join": ("shard:add_join_parser", "serve what the mesh lacks most"),
        "coordinator": ("coordinator:add_parser", "take requests and drive the shards"),
        "gateway": ("gateway:add_parser", "HTTP for a mesh"),
        "drain": ("drain:add_drain_parser", "stop a shard without losing a session"),
        "load": ("drain:add_load_parser", "let a shard serve another range of the layers it holds"),
        "forget": ("forget:add_forget_parser", "remove what is left of a shard that is gone"),
        "token": ("token:add_parser", "issue and inspect tokens for HTTP"),
        "pki": ("pki:add_parser", "certificates: a private authority, issue, rotate, show"),
        "nats": ("nats:add_parser", "users and configuration of NATS servers, by role"),
    },
    "ask it": {
        "generate": ("generate:add_parser", "generate with a mesh"),
        "chat": ("chat:add_parser", "talk with a mesh"),
        "batch": ("batch:add_batch_parser", "requests that survive every process"),
        "bench": ("bench:add_parser", "load a mesh and measure it"),
    },
    "look at it": {
        "status": ("status:add_parser", "shards and coordinators of a mesh"),
        "top": ("top:add_parser", "what a mesh does, live"),
        "doctor": ("doctor:add_parser", "what is well, what is not, and what to do"),
        "events": ("events:add_events_parser", "what happened in the mesh"),
        "trace": ("trace:add_parser", "where the time of a request went"),
        "usage": ("usage:add_parser", "what each subject has used over HTTP"),
    },
    "models": {
        "import": ("import_model:add_parser", "make a model directory from ONNX, safetensors or GGUF"),
        "run": ("run:add_parser", "generate in one process, without a mesh"),
        "plan": ("planning:add_plan_parser", "place a model's layers on nodes, and say whether they fit"),
        "shard-model": ("planning:add_shard_model_parser", "write the placement of a model from distributed_config.json"),
        "push": ("push:add_push_parser", "copy a model directory into the mesh"),
        "sign": ("signing:add_parser", "sign a model"),
        "pull": ("push:add_pull_parser", "copy a model from the mesh"),
        "tune": ("tune:add_parser", "measure the fastest products on this machine"),
    },
}
_BY_NAME = {name: entry for group in COMMANDS.values() for name, entry in group.items()}

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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version", "version"):
        print(f"mesh {__version__}")
        return 0
    import logging  # not for a list of commands, which is answered at once

    # An error is one line at the end: what the connection logs meanwhile is for commands that set up a log.
    logging.getLogger("mesh").addHandler(logging.NullHandler())
    try:
        parser = _parser_of(arguments[0])
        args, extra = parser.parse_known_args(arguments[1:])
        if extra:
            parser.refuse(extra)
        return int(args.run(args))
    except MeshError as error:
        print(f"mesh: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("mesh: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser_of(name: str) -> _Parser:
    """The parser of a command; SystemExit(2) for a word that is none."""
    if name not in _BY_NAME:
        near = difflib.get_close_matches(name, _BY_NAME, 1)
        meant = f" (did you mean `mesh {near[0]}`?)" if near else ""
        print(f"mesh: there is no command {name}{meant}: see `mesh --help`", file=sys.stderr)
        raise SystemExit(2)
    module, function = _BY_NAME[name][0].split(":")
    subparsers: Any = _Parser(prog="mesh").add_subparsers(metavar="COMMAND")
    getattr(import_module(f"mesh.commands.{module}"), function)(subparsers)
    parser: _Parser = subparsers.choices[name]
    return parser


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
