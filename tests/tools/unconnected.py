"""An environment in which no command is told which mesh to use."""

from __future__ import annotations

import os

__all__ = ["unconnected"]


def unconnected() -> dict[str, str]:
    """This process's environment, without the connection that it may name. $MESH_NATS_SERVER is the path of a program, and stays."""
    told = ("MESH_NATS", "NATS_")
    return {name: value for name, value in os.environ.items() if name == "MESH_NATS_SERVER" or not name.startswith(told)}
