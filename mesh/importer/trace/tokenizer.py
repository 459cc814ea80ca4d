"""A tokenizer that has no tokenizer.json, read and converted by transformers: sentencepiece, tekken, tiktoken, vocabulary and merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mesh.errors import UnsupportedModel
from mesh.importer.trace.library import INSTALL, available, quiet, torch_and_transformers

__all__ = ["SAMPLE", "convert"]

SAMPLE = (
    "The quick brown fox, 1234567890 + 3.14e-5; don't  we'll\tTABS\n\n\nnew   lines \r\n trailing  "
    "Grüße, señor, naïve café — “quotes” … Привет мир, Ελληνικά, שלום עולם, مرحبا بالعالم, हिन्दी, ไทย, 日本語のテキスト, 中文文本, 한국어 "
    "😀👩‍👩‍👧‍👦🏳️‍🌈 \u200b\u00a0\u3000 \x01\x7f e\u0301 ﬁ ½ <|notatoken|> [INST] </s> def f(x):\n        return x**2  # ok"
)
"""Many scripts, emoji, control characters and runs of whitespace: where the ids of two tokenizers differ, they differ here."""

_ELSEWHERE = "save it where transformers reads it, with AutoTokenizer.from_pretrained(...).save_pretrained(...)"


def convert(directory: Path) -> Any:
    """The tokenizer of the tokenizers library. UnsupportedModel: transformers is missing, cannot read it, or runs Python for it."""
    if not available():
        raise UnsupportedModel(
            f"{directory} has a tokenizer, but no tokenizer.json: transformers can convert it, {INSTALL}; or {_ELSEWHERE}"
        )
    _, transformers = torch_and_transformers()
    try:
        with quiet():
            loaded = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # it raises whatever the files lead to, ImportError for a library of theirs included
        why = " ".join(str(error).split())[:300]
        raise UnsupportedModel(
            f"{directory}: transformers cannot read the tokenizer ({type(error).__name__}: {why}): {_ELSEWHERE}"
        ) from None
    backend = getattr(loaded, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        raise UnsupportedModel(f"{directory}: {type(loaded).__name__} is Python code, which no tokenizer.json can hold: not supported")
    with quiet():
        if loaded(SAMPLE, add_special_tokens=False)["input_ids"] != backend.encode(SAMPLE, add_special_tokens=False).ids:
            raise UnsupportedModel(f"{directory}: {type(loaded).__name__} does more than its tokenizer.json can hold: not supported")
    return backend
