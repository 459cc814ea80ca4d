"""The command `mesh`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from mesh.commands import bench, chat, coordinator, gateway, generate, import_model, run, status, token, top, tune, up
from mesh.commands.drain import add_drain_parser
from mesh.commands.events import add_events_parser
from mesh.commands.forget import add_forget_parser
from mesh.commands.planning import add_plan_parser, add_shard_model_parser
from mesh.commands.push import add_pull_parser, add_push_parser
from mesh.commands.shard import add_join_parser, add_shard_parser
from mesh.errors import MeshError

__all__ = ["main"]

_DESCRIPTION = "Run a language model that fits no single machine: layer shards in JAX over NATS."
_EPILOG = """\
a first run, in one process:
  mesh import SmolLM2-135M-Instruct.Q4_1.gguf models/smollm2
  mesh run models/smollm2 "What is artificial intelligence?"

how a model would be placed on your machines:
  mesh plan models/smollm2 --nodes 8GB,8GB,16GB:speed=2

`mesh COMMAND --help` says more of each. Every error is one line that says what to do; the exit code is then 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="mesh", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    import_model.add_parser(subparsers)
    run.add_parser(subparsers)
    for command in (up, generate, chat, status, top, bench, coordinator, gateway, token):
        command.add_parser(subparsers)
    add_plan_parser(subparsers)
    tune.add_parser(subparsers)
    add_shard_model_parser(subparsers)
    for add in (
        add_shard_parser,
        add_join_parser,
        add_push_parser,
        add_pull_parser,
        add_drain_parser,
        add_forget_parser,
        add_events_parser,
    ):
        add(subparsers)
    args = parser.parse_args(argv)
    try:
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


if __name__ == "__main__":
    sys.exit(main())
