"""`mesh chat`: a conversation with a mesh, in a terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from mesh.client import MeshClient
from mesh.commands.connection import bus_options
from mesh.commands.generate import add_mesh_arguments
from mesh.commands.run import add_sampling_arguments, sampling_of
from mesh.commands.waiting import WaitingLine
from mesh.errors import RequestError

__all__ = ["add_parser", "run_command"]

_DESCRIPTION = "Talk with the model. Ctrl-C stops an answer, Ctrl-D or /quit ends, /new begins another conversation."


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("chat", help="talk with a mesh", description=_DESCRIPTION)
    add_mesh_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message at the beginning")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="most tokens of an answer (default 512)")
    add_sampling_arguments(parser, "temperature", "top_p", "seed")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    beginning = [{"role": "system", "content": args.system}] if args.system else []
    history = list(beginning)
    options = {"max_tokens": args.max_tokens, **sampling_of(args)}
    terminal = sys.stdin.isatty()
    with MeshClient(options=bus_options(args), model=args.model) as client:
        if terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # lines can be edited, and asked again
            print("/new begins another conversation, /quit ends. Ctrl-C stops an answer.", file=sys.stderr)
        while True:
            try:
                said = input("> " if terminal else "").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if said == "/quit":
                return 0
            if said == "/new":
                history = list(beginning)
                continue
            if not said:
                continue
            history.append({"role": "user", "content": said})
            answer = ""
            try:
                with WaitingLine() as waiting, client.stream(messages=history, on_waiting=waiting.show, **options) as stream:
                    for chunk in stream:
                        waiting.clear()
                        answer += chunk.text
                        print(chunk.text, end="", flush=True)
            except KeyboardInterrupt:
                print(" [stopped]", end="")
            except RequestError as error:  # such as a prompt that is too long: the conversation continues without it
                print(f"mesh: {error}", file=sys.stderr)
                history.pop()
                continue
            print()
            history.append({"role": "assistant", "content": answer})
