"""JSON from outside: what it may cost is bounded before it is checked.

A checker that looks at every part of a wrong document makes an error object for each, and holds the event loop for seconds. So a
document is looked at in steps, each much cheaper than the next, and the first problem ends it:

    1. its size in bytes
    2. how many parts it has: objects, lists, keys, texts, counted in the bytes
    3. parsing, which bounds the depth
    4. its keys and the lengths of its lists, compared with the model's fields
    5. the model's own check, in which lists end at their first wrong entry (`fail_fast`)

In a request, null stands for a key that is left out: many clients send every key that they know.

`read` does the first four. NATS messages (message.py) and the bodies of HTTP requests (mesh/gateway/guard.py) come through it.
"""

from __future__ import annotations

import re
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Final, Union, get_args, get_origin

import pydantic_core
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from mesh.errors import MessageRejected, short

__all__ = ["BRANCH", "MAX_PARTS", "problem", "problem_of", "read", "too_large"]

MAX_PARTS: Final = 250_000
"""Objects, lists, keys and texts of one document. Parsing so many takes some 50 ms."""
_TEXT: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_FEW_TEXTS: Final = 20_000
"""With more texts than this, brackets inside texts are not told apart: that would take as long as parsing."""
_MOST_UNKNOWN: Final = 256
"""Keys of one object that are not known and null; an object with more is refused for the first of them, without looking at the others."""
BRANCH: Final = "({})"
"""The tag of one of several types that a key may have. A path leaves it out: it is ours, not the caller's."""
_NOT_JSON: Final = "this is not JSON: send one JSON object"


def read(model: type[BaseModel], data: bytes, *, limit_bytes: int) -> Any:
    """The document in `data`, parsed, with only keys of `model` and no list longer than the model allows, and without keys that are null.
    Its values are still to be checked. MessageRejected names the key that is wrong and says what would be right."""
    if len(data) > limit_bytes:
        raise too_large(model, len(data), limit_bytes)
    _require_few_parts(data)
    try:
        document = pydantic_core.from_json(data, cache_strings="keys")
    except ValueError:
        raise MessageRejected(_NOT_JSON) from None
    _look(_shape_of(model), document, ())
    return document


def too_large(model: type[BaseModel], size: int, limit_bytes: int) -> MessageRejected:
    return MessageRejected(f"a {model.__name__} of {size:,} bytes: at most {limit_bytes:,} are read")


def problem(error: ValidationError) -> tuple[str, str, str]:
    """(key, kind, message) of the first problem, all of bounded length."""
    return problem_of(error.errors(include_url=False, include_input=False)[0])


def problem_of(first: Mapping[str, Any]) -> tuple[str, str, str]:
    """The same of one entry of pydantic's list."""
    kind, context = first["type"], first.get("ctx", {})
    said = _SAID[kind].format(**context) if kind in _SAID else first["msg"].removeprefix("Value error, ").replace("Input should", "should")
    return _path(first["loc"]), kind, short(said, 500)


_SAID: Final = {
    "json_invalid": _NOT_JSON,
    "missing": "is missing: give it",
    "string_type": "should be a text",
    "int_type": "should be a whole number",
    "int_from_float": "should be a whole number",
    "int_parsing": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "bool_type": "should be true or false",
    "list_type": "should be a list",
    "tuple_type": "should be a list",
    "dict_type": "should be a JSON object",
    "model_type": "should be a JSON object",
    "model_attributes_type": "should be a JSON object, sent with content-type application/json",
    "string_too_long": "should have at most {max_length} characters",
    "string_too_short": "should have at least {min_length} character(s)",
    "too_short": "has {actual_length} entries: give at least {min_length}",
    "greater_than": "should be greater than {gt}",
    "greater_than_equal": "should be {ge} or more",
    "less_than": "should be less than {lt}",
    "less_than_equal": "should be {le} or less",
    "literal_error": "should be {expected}",
    "finite_number": "should be a finite number",
}
"""What an error says, by pydantic's type of it, where pydantic's own words are those of Python."""


def _require_few_parts(data: bytes) -> None:
    if len(data) <= MAX_PARTS:  # a part takes a byte at least
        return
    texts, marks = (data.count(b'"') - data.count(b'\\"')) // 2, _marks(data)
    if texts <= _FEW_TEXTS and texts + marks > MAX_PARTS:
        marks = _marks(_TEXT.sub(b"", data))  # those inside texts are no parts
    if texts + marks > MAX_PARTS:
        raise MessageRejected(f"a document with more than {MAX_PARTS:,} objects, lists, keys and texts: send less at a time")


def _marks(data: bytes) -> int:
    return data.count(b"[") + data.count(b"{") + data.count(b":")


# -- the shape of a model's documents ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Shape:
    """What can be compared cheaply at one place of a document. `keys`: of an object, with their shapes; None: any key. `items`: of a
    list's entries. `most`: entries of a list, or keys of an object that may have any."""

    keys: Mapping[str, _Shape | None] | None = None
    closed: bool = False
    items: _Shape | None = None
    most: int | None = None


@lru_cache(maxsize=256)
def _shape_of(model: type[BaseModel]) -> _Shape:
    keys = {field.alias or name: _shape(field.annotation, field.metadata) for name, field in model.model_fields.items()}
    return _Shape(keys, closed=model.model_config.get("extra") == "forbid")


def _shape(annotation: Any, metadata: list[Any]) -> _Shape | None:
    """The shape of a field; None where there is nothing to compare."""
    origin = get_origin(annotation)
    if origin is Annotated:
        inner, *more = get_args(annotation)
        return _shape(inner, [*_flat(more), *metadata])
    if origin in (Union, types.UnionType):
        return _joined([made for part in get_args(annotation) if (made := _shape(part, metadata)) is not None])
    most = min((value for each in metadata if (value := getattr(each, "max_length", None)) is not None), default=None)
    if origin in (list, tuple):
        return _Shape(items=_shape(get_args(annotation)[0], []), most=most)
    if origin is dict:
        return _Shape(most=most)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _shape_of(annotation)
    return None


def _flat(metadata: list[Any]) -> Iterator[Any]:
    for each in metadata:
        yield from each.metadata if isinstance(each, FieldInfo) else (each,)


def _joined(shapes: list[_Shape]) -> _Shape | None:
    """What all alternatives of a union have in common."""
    if len(shapes) <= 1:
        return shapes[0] if shapes else None
    mosts = [shape.most for shape in shapes]
    return _Shape(most=None if None in mosts else max(most for most in mosts if most is not None))


def _look(shape: _Shape, value: Any, at: tuple[str | int, ...]) -> None:
    if isinstance(value, dict):
        if shape.keys is None:
            _require_length(shape, value, at, "keys")
            return
        if not shape.closed or len(value) <= len(shape.keys) + _MOST_UNKNOWN:
            for key in [key for key, inner in value.items() if inner is None]:
                del value[key]
        if shape.closed and not value.keys() <= shape.keys.keys():
            unknown = next(key for key in value if key not in shape.keys)
            field = _path((*at, unknown))
            raise MessageRejected(f"{field} is not a key here: there are {', '.join(shape.keys)}", field=field)
        for key, inner in shape.keys.items():
            if inner is not None and key in value:
                _look(inner, value[key], (*at, key))
    elif isinstance(value, list):
        _require_length(shape, value, at, "entries")
        if shape.items is not None:
            for index, item in enumerate(value):
                _look(shape.items, item, (*at, index))


def _require_length(shape: _Shape, value: Any, at: tuple[str | int, ...], what: str) -> None:
    if shape.most is not None and len(value) > shape.most:
        field = _path(at)
        raise MessageRejected(f"{field} has {len(value):,} {what}: at most {shape.most:,} are taken", field=field)


def _path(parts: tuple[str | int, ...]) -> str:
    return short(".".join(short(str(part)) for part in parts if not _is_branch(part)), 200)


def _is_branch(part: str | int) -> bool:
    return isinstance(part, str) and part.startswith("(") and part.endswith(")")
