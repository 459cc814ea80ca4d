"""The one tree of errors.

Every error a user can meet is one of these; errors of other libraries are mapped to them once, at the edge where they
arise. The message is one line that names what is wrong and what would be right; `code` is stable and machine-readable;
`retryable` says whether the same request can succeed later without being changed.

    MeshError
    ├── ModelError                      a source or a model directory
    │   ├── ModelNotFound               nothing usable at that path
    │   ├── CorruptModel                truncated, wrong checksum, inconsistent
    │   ├── UnsupportedModel            not a decoder, unknown op, unrecognised attention
    │   └── VerificationFailed          blocks disagree with their source
    ├── PlanError                       a placement that cannot be
    │   ├── BadLayerRange               outside the model, empty, or overlapping wrongly
    │   └── DoesNotFit                  more memory than there is
    ├── ConfigError                     a configuration file or flag
    └── RequestError                    a generation request
        ├── BadRequest                  a field is missing or out of range
        └── PromptTooLong               longer than the context
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "BadLayerRange",
    "BadRequest",
    "ConfigError",
    "CorruptModel",
    "DoesNotFit",
    "MeshError",
    "ModelError",
    "ModelNotFound",
    "PlanError",
    "PromptTooLong",
    "RequestError",
    "UnsupportedModel",
    "VerificationFailed",
]


class MeshError(Exception):
    """Base of the tree. `exit_code` is what the command line ends with."""

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 2


class ModelError(MeshError):
    code = "model"


class ModelNotFound(ModelError):
    code = "model_not_found"


class CorruptModel(ModelError):
    code = "model_corrupt"


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
