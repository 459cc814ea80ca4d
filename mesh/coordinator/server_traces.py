"""What nats-server reports of a message that is traced: when it came in and went out (NATS architecture decision record 41)."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final, NamedTuple

import orjson

from mesh.coordinator.trace import ServerHop
from mesh.protocol.headers import FRAME_HEADER

__all__ = ["Report", "read_report"]

_MOST_BYTES: Final = 64 * 1024
_MOST_EVENTS: Final = 256


class Report(NamedTuple):
    """frame, way: of the frame, as its header said."""

    frame: int
    way: int
    hop: ServerHop


def read_report(data: bytes) -> Report | None:
    """The report of one server on one frame; None for any other message, and where the server did not deliver the frame."""
    if len(data) > _MOST_BYTES:
        return None
    try:
        document = orjson.loads(data)
        headers = {key.lower(): value for key, value in document["request"]["header"].items()}
        frame, way = (int(part) for part in headers[FRAME_HEADER.lower()][0].split("."))
        events = document["events"][:_MOST_EVENTS]
        came = next(_ns(event["ts"]) for event in events if event["type"] == "in")
        went = [_ns(event["ts"]) for event in events if event["type"] == "eg"]
        server = document["server"]
        name = str(server.get("name") or server.get("id") or "nats-server")[:256]
    except (orjson.JSONDecodeError, LookupError, TypeError, ValueError, AttributeError, StopIteration):
        return None
    return Report(frame, way, ServerHop(name, came, max(went))) if went else None


def _ns(text: Any) -> int:
    """Nanoseconds since 1970 of an RFC 3339 time, of which Python reads microseconds."""
    whole, _, rest = text.partition(".")
    digits = rest.rstrip("Z").partition("+")[0].partition("-")[0]
    zone = rest[len(digits) :].replace("Z", "+00:00") if rest else ""
    moment = datetime.fromisoformat((whole + zone) if rest else text.replace("Z", "+00:00"))
    return int(moment.timestamp()) * 1_000_000_000 + int(digits[:9].ljust(9, "0") or 0)
