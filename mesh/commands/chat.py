"""`mesh chat`: a conversation with a mesh, in a terminal."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from mesh.client import MeshClient, SyncStream
from mesh.commands.connection import bus_options
from mesh.commands.generate import add_mesh_arguments
from mesh.commands.run import add_sampling_arguments, sampling_of
from mesh.commands.waiting import WaitingLine
from mesh.errors import BadRequest, RequestError, Unavailable
from mesh.protocol.sampling import SamplingParams

__all__ = ["add_parser", "run_command"]

_DESCRIPTION = "Talk with the model. Ctrl-C stops an answer, Ctrl-D or /quit ends, /help lists what else there is."

_HELP = """\
/help             this
/new              another conversation
/temperature X    how random the answers are: 0 always takes the likeliest token
/max-tokens N     the most tokens of an answer
/system TEXT      another conversation, with this system message
/model            the model, and how it is asked
/quit             the end, as Ctrl-D. Ctrl-C stops an answer."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("chat", help="talk with a mesh", description=_DESCRIPTION)
    add_mesh_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message at the beginning")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="most tokens of an answer (default 512)")
    add_sampling_arguments(parser, "temperature", "top_p", "seed")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    terminal = sys.stdin.isatty()
    with MeshClient(options=bus_options(args), model=args.model) as client:
        talk = _Talk(client, args.model or _only(client), {"max_tokens": args.max_tokens, **sampling_of(args)}, args.system)
        if terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # lines can be edited, and asked again
            print(f"{talk.described()}. /help lists the commands, /quit ends, Ctrl-C stops an answer.", file=sys.stderr)
        while True:
            try:
                said = input("> " if terminal else "").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return 0
            if said == "/quit":
                return 0
            if said.startswith("/"):
                print(talk.command(said), file=sys.stderr)
            elif said:
                talk.ask(said)


def _only(client: MeshClient) -> str:
    """The model that is asked if none is named."""
    models = client.models()
    if len(models) > 1:
        raise BadRequest(f"the mesh serves {', '.join(models)}: say which with --model", field="model")
    if not models:
        raise Unavailable("no coordinator serves a model here: `mesh up MODEL` starts a mesh, `mesh status` shows what there is")
    return models[0]


class _Talk:
    """A conversation, and how the model is asked."""

    def __init__(self, client: MeshClient, model: str, options: dict[str, Any], system: str | None) -> None:
        self.options = options
        self.model = model
        self._client = client
        self._system = system
        self._history: list[dict[str, str]] = []
        self._begin()

    def described(self) -> str:
        """The model and what can be set."""
        return f"{self.model}, temperature {self.options['temperature']:g}, at most {self.options['max_tokens']} tokens"

    def command(self, line: str) -> str:
        """Do what a line with a slash says; what is to be shown."""
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "/help":
            return _HELP
        if name == "/new":
            self._begin()
            return "another conversation"
        if name == "/system" and value:
            self._system = value
            self._begin()
            return "another conversation, with that system message"
        if name in ("/temperature", "/max-tokens") and value:
            return self._set(name[1:].replace("-", "_"), value)
        if name in ("/temperature", "/max-tokens", "/model"):
            return self.described()
        return f"there is no command {name}: /help lists them"

    def _set(self, name: str, value: str) -> str:
        try:
            number = float(value) if name == "temperature" else int(value)
            SamplingParams(temperature=number if name == "temperature" else 0.0)
            if name == "max_tokens" and number < 1:
                raise ValueError
        except (ValueError, BadRequest):
            return f"{value} is not possible: give {'0 to 100' if name == 'temperature' else 'a whole number from 1 on'}"
        self.options[name] = number
        return self.described()

    def ask(self, said: str) -> None:
        """Ask, and print the answer as it comes."""
        self._history.append({"role": "user", "content": said})
        answer = ""
        try:
            with WaitingLine() as waiting, self._stream(waiting) as stream:
                for chunk in stream:
                    waiting.clear()
                    answer += chunk.text
                    print(chunk.text, end="", flush=True)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        except RequestError as error:  # such as a prompt that is too long: the conversation continues without it
            print(f"mesh: {error}", file=sys.stderr)
            self._history.pop()
            return
        print()
        self._history.append({"role": "assistant", "content": answer})

    def _stream(self, waiting: WaitingLine) -> SyncStream:
        return self._client.stream(messages=self._history, model=self.model, on_waiting=waiting.show, **self.options)

    def _begin(self) -> None:
        self._history = [{"role": "system", "content": self._system}] if self._system else []
