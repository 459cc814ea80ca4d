"""What a key of config.json means where it is absent or null: what transformers' own configuration classes make of it."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from mesh.errors import CorruptModel, UnsupportedModel
from mesh.importer.families.config import Config
from mesh.importer.families.registry import FAMILIES
from mesh.importer.families.spec import Rotary

transformers = pytest.importorskip("transformers", reason="the defaults are those of transformers (the extra trace)")
KINDS = sorted(set(FAMILIES) - {"gemma3"})


def described(kind: str, values: dict[str, Any]) -> dict[str, Any] | None:
    """What the family reads in a configuration; None where it refuses it."""
    try:
        spec = FAMILIES[kind].spec(Config(kind, values, "config.json"))
    except (CorruptModel, UnsupportedModel):
        return None
    read = {field.name: getattr(spec, field.name) for field in fields(spec)}
    read["rotary"] = [None if each is None else (each.factor, each.inverse_frequencies.tolist()) for each in spec.rotary]
    return read | {"tied": bool(values.get("tie_word_embeddings", FAMILIES[kind].tied))}


def whole(kind: str, **values: Any) -> dict[str, Any] | None:
    """transformers' configuration with these values, as it saves it; None where it refuses them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return dict(transformers.CONFIG_MAPPING[kind](**values).to_dict())
        except Exception:  # it raises whatever a wrong value leads to
            return None


def same(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) if key != "rotary" else a[key] == b[key] for key in a)


@pytest.mark.parametrize("kind", KINDS)
def test_an_absent_key_has_the_default_of_transformers(kind: str) -> None:
    values = whole(kind)
    assert values is not None
    wanted = described(kind, values)
    assert wanted is not None and all(each is None or isinstance(each, tuple | Rotary) for each in wanted["rotary"])
    for key in values:
        read = described(kind, {name: value for name, value in values.items() if name != key})
        assert read is None or same(read, wanted), f"{kind} without {key}: {[n for n in wanted if read and read[n] != wanted[n]]}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_null_window_is_none_and_null_ties_nothing(kind: str) -> None:
    values = whole(kind)
    assert values is not None
    read = described(kind, {**values, "sliding_window": None, "use_sliding_window": True, "tie_word_embeddings": None})
    assert read is not None and set(read["window"]) == {None} and not read["tied"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_null_means_what_it_means_to_transformers(kind: str) -> None:
    values = whole(kind)
    assert values is not None
    for key in set(values) - {"model_type"}:
        resolved = whole(kind, **{key: None})
        read = described(kind, {**values, key: None})
        wanted = None if resolved is None else described(kind, resolved)
        assert read is None or wanted is None or same(read, wanted), f"{kind} with {key} null: {[n for n in read if read[n] != wanted[n]]}"
