"""Errors as HTTP: the status of each, and the three shapes a body can have.

the mesh's own API    {"error": {"code", "message", "field", "retryable", "retry_after_s"}, "request_id"}
OpenAI's              {"error": {"message", "type", "param", "code"}}
Anthropic's           {"type": "error", "error": {"type", "message"}, "request_id"}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import orjson
from starlette.exceptions import HTTPException
from starlette.responses import Response

from mesh.errors import Busy, MeshError, PromptTooLong, Unavailable

__all__ = [
    "BodyRefused",
    "HttpError",
    "anthropic_document",
    "error_body",
    "error_document",
    "error_response",
    "from_http",
    "internal_error",
    "openai_document",
    "shape_of",
    "status_of",
]

_STATUS = {
    "bad_request": 400,
    "message_rejected": 400,
    "prompt_too_long": 400,
    "not_authenticated": 401,
    "denied": 403,
    "model_not_found": 404,
    "payload_too_large": 413,
    "busy": 429,
    "cancelled": 503,
    "unavailable": 503,
    "deadline_exceeded": 504,
}
_OPENAI_TYPE = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPE = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_OPENAI_CODE = {
    "prompt_too_long": "context_length_exceeded",
    "not_authenticated": "invalid_api_key",
    "busy": "rate_limit_exceeded",
    "bad_request": None,
}


class HttpError(MeshError):
    """An error that only HTTP has: a wrong path, method or content type."""

    code = "http"

    def __init__(self, message: str, *, status: int, code: str, field: str | None = None, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.http_code = code
        self.field = field
        self.headers = dict(headers or {})


class BodyRefused(HTTPException):
    """Carries an error of a body through code that lets only starlette's exceptions pass."""

    def __init__(self, error: MeshError) -> None:
        super().__init__(status_of(error), str(error))
        self.error = error


def from_http(error: HTTPException) -> MeshError:
    """Our error for one that starlette raised: no such path, no such method."""
    if isinstance(error, BodyRefused):
        return error.error
    known: dict[int, tuple[str, str]] = {
        404: ("not_found", "there is no such path: see /openapi.json"),
        405: ("method_not_allowed", "this path does not take that method: see /openapi.json"),
        400: ("bad_request", "the request cannot be read: send a JSON object"),
    }
    code, message = known.get(error.status_code, ("http", str(error.detail)))
    return HttpError(message, status=error.status_code, code=code, headers=error.headers)


def internal_error() -> MeshError:
    return MeshError("an internal error; the log of the gateway says more, under this request's id")


def status_of(error: MeshError) -> int:
    return error.status if isinstance(error, HttpError) else _STATUS.get(error.code, 500)


def _headers(error: MeshError) -> dict[str, str]:
    """The headers of an error: Retry-After if a retry can help, WWW-Authenticate if a token is missing. OpenAI's clients read
    x-should-retry: without it they would begin a wait again that the coordinators have ended."""
    headers = dict(error.headers) if isinstance(error, HttpError) else {}
    if isinstance(error, Busy):
        headers["retry-after"] = str(max(math.ceil(error.retry_after_s), 1))
    elif status_of(error) == 503:
        headers["retry-after"] = "2"
    elif status_of(error) in (408, 413):  # what is left of the body is not read
        headers["connection"] = "close"
    if isinstance(error, Unavailable) and error.waited_s is not None:
        headers["x-should-retry"] = "false"
    if error.code == "not_authenticated":
        headers["www-authenticate"] = "Bearer"
    return headers


def error_document(error: MeshError, request_id: str) -> dict[str, Any]:
    return {"error": error_body(error), "request_id": request_id}


def error_body(error: MeshError) -> dict[str, Any]:
    return {
        "code": error.http_code if isinstance(error, HttpError) else error.code,
        "message": str(error),
        "field": getattr(error, "field", None) or None,
        "retryable": error.retryable,
        "retry_after_s": error.retry_after_s if isinstance(error, Busy) else None,
    }


def openai_document(error: MeshError) -> dict[str, Any]:
    status = status_of(error)
    kind = _OPENAI_TYPE.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = error.http_code if isinstance(error, HttpError) else _OPENAI_CODE.get(error.code, error.code)
    field = "messages" if isinstance(error, PromptTooLong) else getattr(error, "field", None)
    return {"error": {"message": str(error), "type": kind, "param": field or None, "code": code}}


def anthropic_document(error: MeshError, request_id: str) -> dict[str, Any]:
    status = status_of(error)
    kind = _ANTHROPIC_TYPE.get(status, "invalid_request_error" if status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": str(error)}, "request_id": request_id}


def shape_of(path: str) -> Literal["anthropic", "openai", "own"]:
    """The shape of the errors at a path. vLLM's routes have OpenAI's."""
    if path == "/v1/messages" or path.startswith("/v1/messages/"):
        return "anthropic"
    return "openai" if path.startswith("/v1/") or path in ("/tokenize", "/detokenize") else "own"


def _document(error: MeshError, path: str, request_id: str) -> dict[str, Any]:
    match shape_of(path):
        case "anthropic":
            return anthropic_document(error, request_id)
        case "openai":
            return openai_document(error)
        case _:
            return error_document(error, request_id)


def error_response(error: MeshError, path: str, request_id: str) -> Response:
    """The response with `error` to a request for `path`, in the shape of the API that the path belongs to."""
    return Response(orjson.dumps(_document(error, path, request_id)), status_of(error), _headers(error), media_type="application/json")
