"""The one tree of errors.

Every error a user can meet is one of these; errors of other libraries are mapped to them once, at the edge where they
arise. The message is one line that names what is wrong and what would be right; `code` is stable and machine-readable;
`retryable` says whether the same request can succeed later without being changed.

    MeshError
    ├── ModelError                      a source or a model directory
    │   ├── ModelNotFound               nothing usable at that path
    │   ├── CorruptModel                truncated, wrong checksum, inconsistent
    │   ├── UntrustedModel              not signed by a key that is trusted
    │   ├── UnsupportedModel            not a decoder, unknown op, unrecognised attention
    │   └── VerificationFailed          blocks disagree with their source
    ├── PlanError                       a placement that cannot be
    │   ├── BadLayerRange               outside the model, empty, or overlapping wrongly
    │   └── DoesNotFit                  more memory than there is
    ├── ConfigError                     a configuration file or flag
    ├── RequestError                    a generation request
    │   ├── BadRequest                  a field is missing or out of range
    │   └── PromptTooLong               longer than the context
    └── ServiceError                    a request that is right and was not served; the same one can succeed later
        ├── Busy                        every row and the queue are taken; says when to come back
        ├── Unavailable                 not served now: no server, no replica of a layer range, a shard that left
        │   └── NobodyListens           the server says so: the subject has no subscriber
        ├── DeadlineExceeded            no answer in time
        ├── Replaced                    a later process of this name serves in this one's place
        ├── Cancelled                   the caller took it back
        ├── Denied                      the server's accounts, or a token, do not allow it
        └── ProtocolError               what came over the wire is not what the subject carries
            ├── FrameRejected           a frame: damaged, of another version or model, or out of turn
            ├── MessageRejected         a control message
            └── PayloadTooLarge         more than the server takes in one message
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ClassVar

__all__ = [
    "BadLayerRange",
    "BadRequest",
    "Busy",
    "Cancelled",
    "ConfigError",
    "CorruptModel",
    "DeadlineExceeded",
    "Denied",
    "DoesNotFit",
    "FrameRejected",
    "MeshError",
    "MessageRejected",
    "ModelError",
    "ModelNotFound",
    "NobodyListens",
    "PayloadTooLarge",
    "PlanError",
    "PromptTooLong",
    "ProtocolError",
    "Replaced",
    "RequestError",
    "ServiceError",
    "Unavailable",
    "UnsupportedModel",
    "UntrustedModel",
    "VerificationFailed",
    "decoding",
    "internal_error",
    "short",
]


class MeshError(Exception):
    """Base of the tree. `exit_code` is what the command line ends with."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 2


def internal_error(cause: Exception) -> MeshError:
    """What the caller hears of a defect. The log says more; `__cause__` is for it."""
    error = MeshError("an internal error; the log of the coordinator says more")
    error.__cause__ = cause
    return error


def short(text: str, most: int = 64) -> str:
    """`text` of a caller or a file as an error repeats it: its beginning, where it is longer than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


@contextmanager
def decoding(kind: Callable[[str], MeshError], what: str) -> Iterator[None]:
    """What goes wrong while `what`, a file or text from elsewhere, is decoded is a `kind`, whatever the decoder raises. Errors of the tree
    pass as they are."""
    try:
        yield
    except MeshError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())[:200] or type(error).__name__
        raise kind(f"{what} does not read ({type(error).__name__}: {why})") from error


class ModelError(MeshError):
    code = "model"


class ModelNotFound(ModelError):
    code = "model_not_found"


class CorruptModel(ModelError):
    code = "model_corrupt"


class UntrustedModel(ModelError):
    code = "model_untrusted"


class UnsupportedModel(ModelError):
    code = "model_unsupported"


class VerificationFailed(ModelError):
    """Blocks and source disagree; `layer` is the first that differs (None: embed or head), `error` by how much (relative)."""

    code = "verification_failed"

    def __init__(self, message: str, *, layer: int | None = None, error: float | None = None) -> None:
        super().__init__(message)
        self.layer = layer
        self.error = error


class PlanError(MeshError):
    code = "plan"


class BadLayerRange(PlanError):
    code = "bad_layer_range"


class DoesNotFit(PlanError):
    """More memory is needed than allowed; both in bytes."""

    code = "does_not_fit"

    def __init__(self, message: str, *, needed_bytes: int, allowed_bytes: int) -> None:
        super().__init__(message)
        self.needed_bytes = needed_bytes
        self.allowed_bytes = allowed_bytes


class ConfigError(MeshError):
    code = "config"


class RequestError(MeshError):
    code = "request"


class BadRequest(RequestError):
    """`field` is the name of the offending field, as the caller wrote it."""

    code = "bad_request"

    def __init__(self, message: str, *, field: str) -> None:
        super().__init__(message)
        self.field = field


class PromptTooLong(RequestError):
    """`tokens` were asked for where `limit` is the most."""

    code = "prompt_too_long"

    def __init__(self, message: str, *, tokens: int, limit: int) -> None:
        super().__init__(message)
        self.tokens = tokens
        self.limit = limit


class ServiceError(MeshError):
    code = "service"
    retryable = True


class Busy(ServiceError):
    """`retry_after_s` is when a place is expected to be free."""

    code = "busy"

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Unavailable(ServiceError):
    """`waited_s`: so long a coordinator has waited for what is missing. None: nothing was waited for. To ask again at once after a wait
    begins the same wait again."""

    code = "unavailable"

    def __init__(self, message: str, *, waited_s: float | None = None) -> None:
        super().__init__(message)
        self.waited_s = waited_s


class NobodyListens(Unavailable):
    pass


class DeadlineExceeded(ServiceError):
    code = "deadline_exceeded"


class Replaced(ServiceError):
    """For the process that ends because of it. A supervisor sees by the exit code that starting it again would not help."""

    code = "replaced"
    exit_code = 3


class Cancelled(ServiceError):
    code = "cancelled"
    retryable = False


class Denied(ServiceError):
    code = "denied"
    retryable = False


class ProtocolError(ServiceError):
    code = "protocol"
    retryable = False


class FrameRejected(ProtocolError):
    """`reason` is one of the few words that rejected frames are counted under."""

    code = "frame_rejected"

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class MessageRejected(ProtocolError):
    """`field` is the path of the offending key, empty where it is the whole message."""

    code = "message_rejected"

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class PayloadTooLarge(ProtocolError):
    """Both in bytes; nothing was sent."""

    code = "payload_too_large"

    def __init__(self, message: str, *, size_bytes: int, limit_bytes: int) -> None:
        super().__init__(message)
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes
