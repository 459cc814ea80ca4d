"""tokenizer.json, which comes with a model and is not trusted: read, and refused where it could make any amount of text or work."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import orjson
import tokenizers

from mesh.errors import CorruptModel, decoding, short

__all__ = ["MOST_GROWTH", "read_backend", "unreadable"]

MOST_GROWTH: Final = 64
"""So many times longer may a normalizer, pre-tokenizer or decoder make a text. Known ones take 4 at most ("\u2581" for a space)."""
_MOST_STEPS: Final = 256
_SHOWN: Final = 500  # characters of an error of the library


def read_backend(data: bytes, path: Path) -> tokenizers.Tokenizer:
    """The tokenizer in `data`, the content of `path`. CorruptModel: it does not read, or its steps make a text too long."""
    try:
        document = orjson.loads(data)
    except ValueError as error:
        raise unreadable(path, error) from None
    if not isinstance(document, dict):
        raise CorruptModel(f"{path} is no JSON object: import the model again")
    with decoding(CorruptModel, str(path)):
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            growth = _growth(list(_steps(document.get(part))))
            if growth > MOST_GROWTH:
                raise CorruptModel(f"{path}: its {part} can make a text {growth:,} times as long, where {MOST_GROWTH} are the most")
    try:
        return tokenizers.Tokenizer.from_buffer(data)
    except Exception as error:  # tokenizers raises plain Exception
        raise unreadable(path, error) from None


def unreadable(path: Path, error: Exception) -> CorruptModel:
    return CorruptModel(f"{path} does not read ({short(str(error), _SHOWN)}): import the model again")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """The steps of a part in order, those of sequences in sequences included."""
    if not isinstance(part, dict):
        return
    inner = [value for key in ("normalizers", "pretokenizers", "decoders") for value in part.get(key) or ()]
    if inner:
        for each in inner:
            yield from _steps(each)
    else:
        yield part


def _growth(steps: list[dict[str, Any]]) -> int:
    """How many times longer the steps can make a text at most; one character can become the whole of each replacement."""
    growth = 1
    if len(steps) > _MOST_STEPS:
        raise ValueError(f"{len(steps)} steps, where {_MOST_STEPS} are the most")
    for step in steps:
        text = step.get("content") if step.get("type") == "Replace" else step.get("prepend")
        growth *= max(len(text.encode()) if isinstance(text, str) else 1, 1)
    return growth
