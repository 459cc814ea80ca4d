"""The commands of `mesh`. Only the module of the command that is asked for is imported."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

__all__ = ["COMMANDS", "add_command", "descriptions"]

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
        "completion": ("completion:add_parser", "completion of commands in a shell"),
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
        "models": ("models:add_parser", "list and remove models"),
        "push": ("push:add_push_parser", "copy a model directory into the mesh"),
        "sign": ("signing:add_parser", "sign a model"),
        "pull": ("push:add_pull_parser", "copy a model from the mesh"),
        "tune": ("tune:add_parser", "measure the fastest products on this machine"),
    },
}


def descriptions() -> dict[str, str]:
    """Each command and its help."""
    return {name: text for group in COMMANDS.values() for name, (_, text) in group.items()}


def add_command(subparsers: Any, name: str) -> argparse.ArgumentParser:
    """Add the parser of a command; returns it. KeyError: there is no such command."""
    place = next((group[name][0] for group in COMMANDS.values() if name in group), None)
    if place is None:
        raise KeyError(name)
    module, function = place.split(":")
    getattr(import_module(f"mesh.commands.{module}"), function)(subparsers)
    parser: argparse.ArgumentParser = subparsers.choices[name]
    parser.add_argument("--log-level", choices=LOG_LEVELS, metavar="LEVEL", help=f"what is logged: {', '.join(LOG_LEVELS)}")
    return parser


LOG_LEVELS = ("debug", "info", "warning", "error")
