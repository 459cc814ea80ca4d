"""The names of the NATS headers that the mesh adds to its messages."""

from __future__ import annotations

from typing import Final

__all__ = ["EPOCH_HEADER"]

EPOCH_HEADER: Final = "Mesh-Epoch"
"""On each message of a token stream: the epoch of the coordinator that sent it. A client drops messages of an older epoch."""
