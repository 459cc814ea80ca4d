"""A pydantic model in, an instance out."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mesh.client.results import Completion
from mesh.errors import BadRequest

__all__ = ["Form", "form_of", "instance_of"]

Form = TypeVar("Form", bound=BaseModel)


def form_of(model: type[BaseModel]) -> dict[str, Any]:
    """The structured_outputs of a request whose answer is an instance of `model`."""
    return {"json": _closed(model.model_json_schema())}


def _closed(schema: Any) -> Any:
    """`schema`, whose objects have no properties but those that they name: a schema that is silent about others allows any."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: each if key in ("const", "enum", "default", "examples") else _closed(each) for key, each in schema.items()}
    return {"additionalProperties": False, **made} if isinstance(made.get("properties"), dict) else made


def instance_of(model: type[Form], answer: Completion) -> Form:
    """The instance that an answer spells. BadRequest: it is not complete, or a check of the model's own refuses it."""
    if answer.finish_reason == "length":
        raise BadRequest(
            f"max_tokens ended the answer after {answer.usage.completion_tokens} tokens, before it was complete: ask for more",
            field="max_tokens",
        )
    try:
        return model.model_validate_json(answer.text or "")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or model.__name__
        raise BadRequest(f"the answer has the form of {model.__name__}, which refuses it: {where}: {first['msg']}", field=where) from None
