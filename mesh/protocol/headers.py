"""The names of the NATS headers that the mesh adds to its messages."""

from __future__ import annotations

from typing import Final

__all__ = ["EPOCH_HEADER", "REQUEST_HEADER", "SESSION_HEADER"]

EPOCH_HEADER: Final = "Mesh-Epoch"
"""On each message of a token stream: the epoch of the coordinator that sent it. A client drops messages of an older epoch."""

SESSION_HEADER: Final = "Mesh-Session"
"""On a generation request: its session, so that an error can name the request even if the body cannot be read."""

REQUEST_HEADER: Final = "Mesh-Request"
"""On an error: the public id of the request that it answers. A client drops errors that answer another request."""
