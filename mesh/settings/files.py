"""Read a configuration file into a strict model: YAML or JSON, with the environment over it, and one clear error.

A value comes from, highest first:

    MESH_SECTION__KEY      any key
    MESH_SECTION_KEY       the same, easier to write
    MESH_KEY               keys of two words or more that only one section has: MESH_SHARD_ID, MESH_LAYERS_START
    the file               `${NAME}` inside a text is replaced by that environment variable

Every error is a ConfigError of one line: the file, the key's path, what is wrong, and what would be right.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from mesh.errors import ConfigError, decoding, short

__all__ = ["ENV_PREFIX", "ConfigFile", "Section", "load_config", "load_environment"]

ENV_PREFIX = "MESH_"
_REFERENCE = re.compile(r"\$\{(\w+)\}")


class Section(BaseModel):
    """A section of a file. `elsewhere`: for keys that people know from other systems, what to write here instead."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    elsewhere: ClassVar[Mapping[str, str]] = {}


class ConfigFile(BaseSettings):
    """A whole file. MESH_ variables override its values, also if it is constructed directly."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", strict=True, env_prefix=ENV_PREFIX)
    elsewhere: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return _Environment(settings_cls), init_settings


_MOST_CHARACTERS = 4 * 1024 * 1024
_MOST_VALUES = 100_000
File = TypeVar("File", bound=ConfigFile)


def load_config(path: str | Path, model: type[File]) -> File:
    """Read the file at `path` (.json or YAML) as `model`, with MESH_ variables over it. ConfigError: it is not valid."""
    path = Path(path)
    data = read_mapping(path)
    for key in data:
        if key not in model.model_fields:
            raise ConfigError(f"{path}: {_unknown(model, model, key)}")
    return _made(model, data, str(path))


def load_environment(model: type[File]) -> File:
    """`model` from MESH_ variables alone, for a model whose keys all have defaults. ConfigError: one of them is not valid."""
    return _made(model, {}, "environment")


def _made(model: type[File], data: dict[str, Any], where: str) -> File:
    try:
        return model(**data)
    except ValidationError as error:
        raise ConfigError(_describe(error, where, model)) from None


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML or JSON file, with `${NAME}` filled in. ConfigError: it is no mapping, or has a key twice."""
    with decoding(ConfigError, str(path)):
        return _read_mapping(path)


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(_MOST_CHARACTERS + 1)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}: give the path of a configuration file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file: give a YAML or JSON configuration file") from None
    if len(text) > _MOST_CHARACTERS:
        raise ConfigError(f"{path} has more than {_MOST_CHARACTERS:,} characters, which no configuration needs")
    try:
        data = json.loads(text, object_pairs_hook=_pairs) if path.suffix == ".json" else yaml.load(text, _UniqueKeyLoader)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}: write valid JSON") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ConfigError(f"{path}: {where}{getattr(error, 'problem', None) or 'unreadable'}: write valid YAML") from None
    except _DuplicateKeyError as error:
        raise ConfigError(f"{path}: {error} is there twice: keep one") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply: write sections with keys") from None
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise ConfigError(f"{path}: should be sections with keys, as in the examples of the documentation")
    values = count(1)
    return {key: _resolve(value, f"{path}: {key}", values) for key, value in data.items()}


class _Environment(PydanticBaseSettingsSource):
    """The MESH_ variables that name a key of the model."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        raise NotImplementedError  # __call__ answers for all fields at once

    def __call__(self) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for path, field, names in _variables(self.settings_cls):
            name = next((name for name in names if name in os.environ), None)
            if name is not None:
                target = result
                for section in path[:-1]:
                    target = target.setdefault(section, {})
                target[path[-1]] = _read_variable(name, field)
        self._refuse_unknown()
        return result

    def _refuse_unknown(self) -> None:
        """ConfigError for a variable that names a section of this file (MESH_SHARD__...) and a key that the section lacks: it is
        misspelt."""
        known = {name for _, _, names in _variables(self.settings_cls) for name in names}
        sections = {name.upper() for name, field in self.settings_cls.model_fields.items() if _section(field)}
        for name in sorted(os.environ):
            section, found, _ = name.removeprefix(ENV_PREFIX).partition("__")
            if name.startswith(ENV_PREFIX) and found and section in sections and name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise ConfigError(f"environment variable {name} names no key" + (f": did you mean {near[0]}?" if near else ""))


def _variables(model: type[BaseSettings]) -> Iterator[tuple[tuple[str, ...], FieldInfo, list[str]]]:
    """(key path, field, environment variables that set it, strongest first) of every key."""
    leaves = [
        ((name, key), inner) if section else ((name,), field)
        for name, field in model.model_fields.items()
        for section in [_section(field)]
        for key, inner in (section.model_fields.items() if section else [("", field)])
    ]
    keys = [path[-1] for path, _ in leaves]
    for path, field in leaves:
        names = [ENV_PREFIX + separator.join(path).upper() for separator in ("__", "_")]
        if "_" in path[-1] and keys.count(path[-1]) == 1:
            names.append(ENV_PREFIX + path[-1].upper())
        yield path, field, list(dict.fromkeys(names))


def _section(field: FieldInfo) -> type[Section] | None:
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def _read_variable(name: str, field: FieldInfo) -> Any:
    """The value of a variable: as it is for a text key, otherwise read as YAML would (8 is a number, true a boolean)."""
    raw = os.environ[name]
    if {str, SecretStr} & {field.annotation, *get_args(field.annotation)}:
        return raw
    try:
        return yaml.safe_load(raw)
    except yaml.YAMLError:
        raise ConfigError(f"environment variable {name} = {raw!r} is unreadable: write it as in the YAML file") from None


class _DuplicateKeyError(Exception):
    pass


class _UniqueKeyLoader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen and key.value != "<<":
                    raise _DuplicateKeyError(key.value)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        raise _DuplicateKeyError(next(key for key in keys if keys.count(key) > 1))
    return result


def _resolve(value: Any, where: str, values: Iterator[int]) -> Any:
    """`value` with its `${NAME}` filled in. `values` counts: a few YAML aliases can stand for any number of values."""
    if next(values) > _MOST_VALUES:
        raise ConfigError(f"{where}: more than {_MOST_VALUES:,} values, which no configuration needs")
    if isinstance(value, dict):
        return {key: _resolve(inner, f"{where}.{key}", values) for key, inner in value.items()}
    if isinstance(value, list):
        return [_resolve(inner, where, values) for inner in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ConfigError(f"{where}: the environment variable {match[1]} is not set: set it, or write the value here")
        return os.environ[match[1]]

    return _REFERENCE.sub(variable, value)


def _describe(error: ValidationError, path: str, model: type[ConfigFile]) -> str:
    """The first error; unknown keys come first, because a key that is misspelt is often also missing."""
    problems = sorted(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    first = problems[0]
    keys = [short(str(part)) for part in first["loc"]]
    where = ".".join(keys)
    if first["type"] == "extra_forbidden":
        said = _unknown(model, _model_at(model, keys[:-1]), keys[-1], keys[:-1])
    elif first["type"] == "missing":
        said = f"{where} is missing: add it"
    else:
        message = first["msg"].removeprefix("Value error, ").replace("Input should", "should")
        if first["type"] in ("model_type", "model_attributes_type", "dict_type"):
            message = "should be a section with keys under it"
        source = _variable_of(model, keys)
        shows = isinstance(first["input"], (str, int, float, bool, type(None))) and not _secret(model, keys)
        shown = f"{where} = {short(repr(first['input']), 200)}" if shows else where
        said = message if first["type"] == "value_error" and not keys else f"{shown}: {message}"
        said += f" (from the environment variable {source})" if source else ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{path}: {said}{more}"


def _secret(model: type[ConfigFile], keys: list[str]) -> bool:
    """Whether the value of that key must never be shown."""
    field = _model_at(model, keys[:-1]).model_fields.get(keys[-1]) if keys else None
    return field is not None and SecretStr in (field.annotation, *get_args(field.annotation))


def _variable_of(model: type[ConfigFile], keys: list[str]) -> str | None:
    names = next((names for path, _, names in _variables(model) if list(path) == keys), [])
    return next((name for name in names if name in os.environ), None)


def _model_at(model: type[BaseModel], keys: list[str]) -> type[BaseModel]:
    for key in keys:
        field = model.model_fields.get(key)
        section = _section(field) if field else None
        if section is None:
            break
        model = section
    return model


def _unknown(file: type[ConfigFile], section: type[BaseModel], key: str, path: list[str] | None = None) -> str:
    where = ".".join([*(path or []), key])
    elsewhere = getattr(section, "elsewhere", {})
    if key in elsewhere:
        return f"{where}: {elsewhere[key]}"
    valid = list(section.model_fields)
    near = difflib.get_close_matches(key, valid, 1)
    if near:
        return f"{where} is not a key here: did you mean {near[0]}?"
    for name, field in file.model_fields.items():
        other = _section(field)
        if other is not None and key in other.model_fields:
            return f"{where} is not a key here: it belongs under {name}"
    return f"{where} is not a key here: there are {', '.join(valid)}"
