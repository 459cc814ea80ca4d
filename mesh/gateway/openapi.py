"""The OpenAPI description: FastAPI's description of the routes, with the errors and the tokens that all routes share."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from mesh.gateway.errors import shape_of
from mesh.gateway.guard import SCOPE_KEY
from mesh.gateway.messages_schema import AnthropicError
from mesh.gateway.openai_schema import OpenAIError
from mesh.gateway.schema import ErrorResponse

__all__ = ["describe"]

_ERRORS = {
    "400": "A field is wrong; `field` says which",
    "401": "There is no valid token",
    "403": "The token lacks the scope",
    "404": "No coordinator serves that model, or there is no such thing",
    "408": "The body did not arrive in time",
    "413": "The body is too large",
    "415": "The body is compressed",
    "429": "The mesh is full, or the token has used up its limits; Retry-After says when to try again",
    "500": "An error of the gateway itself",
    "503": "The mesh cannot serve it now",
    "504": "There was no answer within the request's time",
}
_ERROR_OF = {"anthropic": AnthropicError, "openai": OpenAIError, "own": ErrorResponse}


def describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of `app`; made once."""
    if app.openapi_schema:
        return app.openapi_schema
    document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for model in _ERROR_OF.values():
        schemas.update(_schema_of(model))
    document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"}}
    for path, operations in document["paths"].items():
        error = f"#/components/schemas/{_ERROR_OF[shape_of(path)].__name__}"
        for operation in operations.values():
            responses = operation["responses"]
            responses.pop("422", None)
            scope = operation.get(SCOPE_KEY)
            if scope is not None:
                operation["security"] = [{"token": []}, {}]
                operation["description"] = f"{operation.get('description', '')}\n\nScope: {scope or 'any'}.".strip()
            for status, description in _ERRORS.items():
                if scope is not None or status in ("400", "500"):
                    responses.setdefault(status, {"description": description, "content": {"application/json": {"schema": {"$ref": error}}}})
    app.openapi_schema = document
    return document


def _schema_of(model: Any) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    found = dict(schema.pop("$defs", {}))
    found[model.__name__] = schema
    return found
