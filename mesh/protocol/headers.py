"""The names of the NATS headers that the mesh adds to its messages."""

from __future__ import annotations

from typing import Final

__all__ = [
    "EPOCH_HEADER",
    "FRAME_HEADER",
    "REQUEST_HEADER",
    "SERVER_TRACE_HEADER",
    "SERVER_TRACE_ONLY_HEADER",
    "SESSION_HEADER",
    "TRACE_HEADER",
    "UNREAD_HEADER",
]

EPOCH_HEADER: Final = "Mesh-Epoch"
"""On each message of a token stream: the epoch of the coordinator that sent it. A client drops messages of an older epoch."""

SESSION_HEADER: Final = "Mesh-Session"
"""On a generation request: its session, so that an error can name the request even if the body cannot be read."""

REQUEST_HEADER: Final = "Mesh-Request"
"""On an error: the public id of the request that it answers. A client drops errors that answer another request. Also on the question
whether the sender of a request still listens."""

TRACE_HEADER: Final = "traceparent"
"""On a generation request: the W3C trace context of its sender."""

SERVER_TRACE_HEADER: Final = "Nats-Trace-Dest"
"""On a frame of a traced step: the subject to which each nats-server that the frame passes reports it."""

SERVER_TRACE_ONLY_HEADER: Final = "Nats-Trace-Only"
"""Beside it: the servers report where the message would go, and deliver it to nobody."""

FRAME_HEADER: Final = "Mesh-Frame"
"""On such a frame: STEP.HOP, by which the coordinator knows the server's report."""

UNREAD_HEADER: Final = "Mesh-Unread"
"""On a message whose payload its receiver dropped as it arrived, because it is too large: how many bytes it had."""
