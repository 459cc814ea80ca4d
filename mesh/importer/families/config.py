"""config.json, with errors that tell a user what to change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mesh.errors import CorruptModel, UnsupportedModel, short
from mesh.importer.families.spec import ACTIVATIONS

__all__ = ["Config"]


@dataclass(frozen=True, slots=True)
class Config:
    """The values of one config.json; `path` is for messages. A null is a value of its own: only a key that is absent has a default."""

    model_type: str
    values: Mapping[str, Any]
    path: str

    def with_defaults(self, defaults: Mapping[str, Any]) -> Config:
        return Config(self.model_type, {**defaults, **self.values}, self.path)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, which may be None; `default` only where the key is absent."""
        return self.values.get(key, default)

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer. CorruptModel if it is missing (and there is no default), null, or anything else."""
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CorruptModel(f"{self.path}: {key} is {short(repr(value))} where {self.model_type} needs a positive integer")
        return value

    def optional_integer(self, key: str) -> int | None:
        """A positive integer, or None where the key is null or absent."""
        return None if self.get(key) is None else self.integer(key)

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise CorruptModel(f"{self.path}: {key} is {short(repr(value))} where {self.model_type} needs a number")
        return float(value)

    def activation(self, *keys: str, default: str) -> str:
        """Our name for the activation that is given by the first of `keys` in the configuration."""
        name = next((str(self.values[key]) for key in keys if self.values.get(key) is not None), default)
        if name not in ACTIVATIONS:
            raise UnsupportedModel(f"{self.path}: activation {short(name)!r} is not supported: only {', '.join(ACTIVATIONS)} are")
        return ACTIVATIONS[name]
