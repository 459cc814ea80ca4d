"""`mesh generate`: one generation with a mesh."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson

from mesh.bus import BusOptions
from mesh.client import MeshClient
from mesh.commands.connection import add_connection_arguments, bus_options
from mesh.commands.run import add_generation_arguments, sampling_of
from mesh.commands.waiting import WaitingLine
from mesh.errors import BadRequest
from mesh.settings.units import format_seconds

__all__ = ["add_mesh_arguments", "add_parser", "ask", "hop_line", "request_of", "run_command"]

_DESCRIPTION = """\
Generate with a mesh. The options and the --json object are those of `mesh run`. If the model has a chat template, the prompt is sent as
a user's message; with --raw it is sent as it is."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("generate", help="generate with a mesh", description=_DESCRIPTION)
    add_generation_arguments(parser)
    add_mesh_arguments(parser)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be repeated")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--schema", type=Path, metavar="FILE", help="the answer is JSON that follows this JSON schema")
    form.add_argument("--regex", metavar="PATTERN", help="the answer matches this regular expression")
    form.add_argument("--choice", action="append", metavar="TEXT", help="the answer is one of these texts; repeat it for each")
    form.add_argument("--grammar", type=Path, metavar="FILE", help="the answer follows this grammar, Lark or GBNF")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="give up after this time")
    parser.add_argument("--hops", action="store_true", help="show where the time of a decode step went")
    parser.set_defaults(run=run_command)


def add_mesh_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every command that sends requests to a mesh."""
    add_connection_arguments(parser)
    parser.add_argument("--model", metavar="NAME", help="default: the only one")


def run_command(args: argparse.Namespace) -> int:
    request = request_of(args)
    if args.stop:
        request["stop"] = args.stop
    form = form_of(args)
    if form is not None:
        request["structured_outputs"] = form
    return ask(bus_options(args), args.model, request, timeout_s=args.timeout, as_json=args.json, hops=args.hops)


def form_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """What --schema, --regex, --choice or --grammar asks for; None where none is given."""
    if args.schema is not None:
        try:
            return {"json": orjson.loads(_read(args.schema))}
        except orjson.JSONDecodeError as error:
            raise BadRequest(f"--schema {args.schema} is no JSON ({error}): give a file with a JSON schema", field="schema") from None
    if args.grammar is not None:
        return {"grammar": _read(args.grammar)}
    if args.regex is not None:
        return {"regex": args.regex}
    return None if args.choice is None else {"choice": args.choice}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadRequest(f"{path} cannot be read ({error}): give a text file", field="schema") from None


def request_of(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request from the arguments of `add_generation_arguments`."""
    if (args.tokens is None) == (args.prompt is None):
        raise BadRequest('give either a prompt, such as "What is rain?", or --tokens 5,17,33', field="prompt")
    request: dict[str, Any] = {}
    if args.tokens is not None:
        try:
            request["tokens"] = [int(part) for part in args.tokens.split(",") if part.strip()]
        except ValueError:
            raise BadRequest(f"--tokens {args.tokens} is no list of token ids: give numbers such as 5,17,33", field="tokens") from None
    else:
        request["prompt"] = sys.stdin.read() if args.prompt == "-" else args.prompt
        request["raw"] = args.raw
    return request | {"max_tokens": args.max_tokens, "ignore_eos": args.ignore_eos} | sampling_of(args)


def ask(
    options: BusOptions,
    model: str | None,
    request: Mapping[str, Any],
    *,
    timeout_s: float | None = None,
    as_json: bool = False,
    hops: bool = False,
) -> int:
    """Generate and print: the text as it comes and a line of figures on standard error, or one JSON object."""
    with (
        MeshClient(options=options, model=model, timeout_s=timeout_s) as client,
        WaitingLine() as waiting,
        client.stream(on_waiting=waiting.show, **request) as stream,
    ):
        for chunk in stream:
            waiting.clear()
            if not as_json:
                text = chunk.text if chunk.token is None or chunk.text else ""
                print(text, end="", flush=True)
        done = stream.completion
    assert done is not None
    if as_json:
        answer = {name: value for name, value in done.document().items() if name != "request"}
        sys.stdout.buffer.write(orjson.dumps(answer) + b"\n")
        return 0
    if done.text is None:
        print(" ".join(map(str, done.tokens)), end="")
    print()
    timing = done.timing
    rate = f", {timing.tokens_per_s:.1f} tokens/s (median step {format_seconds(timing.decode_step_s)})" if timing.tokens_per_s else ""
    reused = f" ({done.usage.cached_tokens} of them reused)" if done.usage.cached_tokens else ""
    print(
        f"{done.usage.prompt_tokens} prompt tokens{reused}, the first token after {format_seconds(timing.first_token_s or 0)}, "
        f"{done.usage.completion_tokens} generated{rate}",
        file=sys.stderr,
    )
    if hops and timing.hops.get("steps"):
        print(hop_line(timing.hops), file=sys.stderr)
    return 0


def hop_line(hops: Mapping[str, float]) -> str:
    """Where a decode step went, in words."""
    return (
        f"a step of {format_seconds(hops['step_s'])}: {format_seconds(hops['compute_s'])} computing, "
        f"{format_seconds(hops['queue_s'])} waiting for other work, {format_seconds(hops['hop_s'])} for each hop"
    )
