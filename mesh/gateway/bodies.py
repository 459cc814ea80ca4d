"""What the documents of both HTTP APIs have in common: how strict a request is, what a response is, and the count of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, GetJsonSchemaHandler, WithJsonSchema
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from mesh.protocol.documents import BRANCH
from mesh.protocol.sampling import SamplingFields

__all__ = [
    "ByKind",
    "Harmless",
    "PromptTokensDetails",
    "RequestBody",
    "ResponseBody",
    "Unmet",
    "Usage",
    "allow_null",
    "describe_sampling",
    "require_keys",
]


def allow_null(schema: dict[str, Any]) -> None:
    """In the JSON schema of a request, say that null stands for a key that is left out, also for a key that is not known."""
    required = schema.get("required", ())
    for name, value in schema.get("properties", {}).items():
        if name not in required and not _takes_null(value):
            outer = {key: value.pop(key) for key in ("title", "description", "default") if key in value}
            schema["properties"][name] = {"anyOf": [value, {"type": "null"}], **outer}
    schema["additionalProperties"] = {"type": "null"}


def _takes_null(schema: dict[str, Any]) -> bool:
    kinds = {"type", "$ref", "anyOf", "oneOf", "const", "enum"}
    return kinds.isdisjoint(schema) or schema.get("type") == "null" or any(_takes_null(each) for each in schema.get("anyOf", ()))


def describe_sampling(schema: dict[str, Any]) -> None:
    """The same for a request with sampling parameters, each of which gets its description."""
    allow_null(schema)
    for name, field in SamplingFields.model_fields.items():
        schema["properties"][name].setdefault("description", field.description)


def require_keys(body: BaseModel, type: str, keys: Sequence[str]) -> None:
    """PydanticCustomError where a body of this type lacks one of the keys that the type needs."""
    missing = next((key for key in keys if getattr(body, key) is None), None)
    if missing is not None:
        raise PydanticCustomError("unmet", "needs {key} with type {type}", {"key": missing, "type": type})


class RequestBody(BaseModel):
    """Strict: a text is not taken for a number, and an unknown key is an error. Null is the same as a key that is left out
    (mesh/protocol/documents.py)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=allow_null)


class ResponseBody(BaseModel):
    model_config = ConfigDict(frozen=True)


class PromptTokensDetails(ResponseBody):
    """cached_tokens: those of the prompt that were not computed, because the mesh still held them."""

    cached_tokens: int


class Usage(ResponseBody):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


Harmless = Annotated[Any, WithJsonSchema({})]
"""The value of a key that cannot change an answer: anything is taken, and nothing is done with it."""


@dataclass(frozen=True, slots=True)
class Unmet:
    """Marks a key that asks for what a mesh does not do. `why`: the error says so. `allowed`: values that ask for nothing.
    `schema`: that of these values in JSON."""

    why: str
    allowed: tuple[Any, ...] = ()
    schema: dict[str, Any] | None = None

    def check(self, value: Any) -> Any:
        if not any(type(value) is type(each) and value == each for each in self.allowed):
            raise PydanticCustomError("unmet", "{why}", {"why": self.why})
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return dict(self.schema or {"enum": [*self.allowed, None]})


@dataclass(frozen=True, slots=True)
class ByKind:
    """Marks a union of a text and lists. Its types are told apart by what JSON has there, so that an error is about the caller's own value
    and not about the type that is tried first. `what`: a value of another kind should be that."""

    what: str

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        union: Any = handler(source)
        choices = {BRANCH.format(_kind_of_type(each)): each for each in union["choices"]}
        lists = next(tag for tag in choices if tag != BRANCH.format("text"))

        def tag(value: Any) -> str | None:
            return lists if value == [] else BRANCH.format(_kind(value))

        return core_schema.tagged_union_schema(
            choices, tag, custom_error_type="kind", custom_error_message=f"should be {self.what}", strict=True
        )


def _kind_of_type(schema: Any) -> str:
    if schema["type"] == "str":
        return "text"
    return {"str": "texts", "int": "numbers", "list": "lists"}.get(schema["items_schema"]["type"], "objects")


def _kind(value: Any) -> str:
    if not isinstance(value, list):
        return "text" if isinstance(value, str) else "other"
    first = value[0]
    return (
        "texts" if isinstance(first, str) else "lists" if isinstance(first, list) else "objects" if isinstance(first, dict) else "numbers"
    )
