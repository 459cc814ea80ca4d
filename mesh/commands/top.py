"""`mesh top`: what a mesh does, live."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from mesh.client import MeshClient
from mesh.client.read_model import MeshReadModel
from mesh.commands.connection import bus_options
from mesh.commands.drawing import headline, session_table, shard_table
from mesh.commands.generate import add_mesh_arguments
from mesh.errors import BadRequest, MeshError
from mesh.settings.units import format_seconds

__all__ = ["add_parser", "render", "run_command"]

_DESCRIPTION = """\
Show tokens a second, latency, sessions and shards of a mesh, until Ctrl-C. The dashboard, at the address that `mesh up` prints, shows
more; `mesh status --json` is for programs."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser("top", help="what a mesh does, live", description=_DESCRIPTION)
    add_mesh_arguments(parser)
    parser.add_argument("--interval", type=float, default=1.0, metavar="SECONDS", help="time between two updates (default 1)")
    parser.set_defaults(run=run_command)


def run_command(args: argparse.Namespace) -> int:
    if args.interval <= 0:
        raise BadRequest(f"--interval {args.interval:g}: give more than 0 seconds", field="interval")
    if not sys.stdout.isatty():
        raise BadRequest("mesh top draws on a terminal: elsewhere use `mesh status --json`", field="stdout")
    read_model = MeshReadModel()
    with MeshClient(options=bus_options(args)) as client, Live(screen=True, auto_refresh=False) as live:
        while True:
            try:
                status, stats = client.status(), client.shard_stats()
                read_model.look(status, stats, now=time.monotonic(), unix_s=time.time())
            except MeshError as error:  # a server that restarts: it is shown as soon as it is back
                read_model.failed(str(error), now=time.monotonic(), unix_s=time.time())
            live.update(render(read_model.snapshot(), args.model, width=live.console.width), refresh=True)
            time.sleep(args.interval)


def render(snapshot: Mapping[str, Any], name: str | None = None, *, width: int = 200) -> RenderableType:
    """Draw a read model's snapshot; `name`: of one model only; `width`: of the terminal."""
    parts: list[RenderableType] = []
    if snapshot["error"]:
        seen = "" if snapshot["seen_s"] is None else f" What is shown was seen {format_seconds(snapshot['seen_s'])} ago."
        parts.append(Text(f"{snapshot['error']}{seen}", style="red"))
    models = [model for model in snapshot["models"] if name in (None, model["name"])]
    if not models and not snapshot["error"]:
        parts.append(Text(f"nothing serves {name or 'a model'} here: `mesh up MODEL_DIR` starts a mesh on this machine"))
    for model in models:
        parts += [headline(model), _figures(model), shard_table(model["shards"], width=width)]
        if model["sessions"]:
            parts.append(session_table(model["sessions"]))
        parts.append(Text())
    return Group(*parts)


def _figures(model: Mapping[str, Any]) -> Text:
    tokens_per_s = model["point"][1] if model["point"] else 0.0
    parts = [
        f"{tokens_per_s:.1f} tokens/s",
        f"{model['live'] - model['queued']} of {model['capacity']} sessions",
        f"{model['queued']} waiting",
    ]
    if model["latency"] is not None:
        parts.append(f"first token {format_seconds(model['latency']['first_token_s'])}")
    if model["reused"]:
        parts.append(f"{model['reused']:.0%} of prompts reused")
    step = model["step"]
    if step is not None and step["step_s"]:
        share = step["compute_s"] / step["step_s"]
        parts.append(f"a step {format_seconds(step['step_s'])}, {share:.0%} computing, {step['hops_s'] / step['step_s']:.0%} on the way")
    return Text("   ".join(parts) + "\n")
