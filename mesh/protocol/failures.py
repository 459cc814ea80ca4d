"""The body of an error reply, and the status code of each kind of error."""

from __future__ import annotations

from mesh.errors import (
    BadRequest,
    Busy,
    Cancelled,
    DeadlineExceeded,
    Denied,
    MeshError,
    MessageRejected,
    PayloadTooLarge,
    PromptTooLong,
    Unavailable,
    short,
)
from mesh.protocol.message import MAX_LINE, Label, Line, Message, Natural, Seconds

__all__ = ["ErrorReply"]

_STATUS: dict[str, int] = {  # the header Nats-Service-Error-Code: HTTP status codes
    "bad_request": 400,
    "message_rejected": 400,
    "frame_rejected": 400,
    "prompt_too_long": 400,
    "payload_too_large": 413,
    "denied": 403,
    "busy": 429,
    "cancelled": 499,
    "unavailable": 503,
    "deadline_exceeded": 504,
}


class ErrorReply(Message):
    """The body of an error reply, beside the Nats-Service-Error headers. The caller makes the same error from it."""

    code: Label
    message: Line
    retryable: bool = False
    field: Label | None = None
    retry_after_s: float | None = None
    tokens: Natural | None = None
    limit: Natural | None = None
    waited_s: Seconds | None = None

    @property
    def status(self) -> int:
        return _STATUS.get(self.code, 500)

    @classmethod
    def of(cls, error: MeshError) -> ErrorReply:
        """The reply that carries `error`."""
        values = {name: getattr(error, name, None) for name in ("field", "retry_after_s", "tokens", "limit", "waited_s")}
        if values["field"] is not None:
            values["field"] = short(values["field"], 256)
        return cls(code=error.code, message=short(str(error), MAX_LINE), retryable=error.retryable, **values)

    def error(self) -> MeshError:
        """The error that this reply was made from. An unknown code becomes a plain MeshError."""
        match self.code:
            case "bad_request":
                return BadRequest(self.message, field=self.field or "")
            case "message_rejected":
                return MessageRejected(self.message, field=self.field or "")
            case "prompt_too_long":
                return PromptTooLong(self.message, tokens=self.tokens or 0, limit=self.limit or 0)
            case "busy":
                return Busy(self.message, retry_after_s=1.0 if self.retry_after_s is None else self.retry_after_s)
            case "payload_too_large":
                return PayloadTooLarge(self.message, size_bytes=0, limit_bytes=self.limit or 0)
            case "unavailable":
                return Unavailable(self.message, waited_s=self.waited_s)
            case "deadline_exceeded":
                return DeadlineExceeded(self.message)
            case "cancelled":
                return Cancelled(self.message)
            case "denied":
                return Denied(self.message)
        return MeshError(self.message)
