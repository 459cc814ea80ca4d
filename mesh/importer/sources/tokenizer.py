"""The tokenizer files of a model directory: tokenizer.json, chat_template.jinja, and the ids that generation needs to know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mesh.errors import CorruptModel, UnsupportedModel
from mesh.model.manifest import FileInfo, TokenizerInfo, file_info

__all__ = ["CHAT_TEMPLATE", "TOKENIZER", "write_huggingface_tokenizer", "write_tokenizer_files"]

TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"

Written = tuple[TokenizerInfo | None, tuple[FileInfo, ...]]


def write_huggingface_tokenizer(source: Path, out: Path) -> Written:
    """Write the tokenizer of Hugging Face directory `source` into `out`; (None, ()) if it has none.

    A directory with vocab.json and merges.txt only (GPT-2's older form) gets its tokenizer.json built from these.
    CorruptModel if a file does not read; UnsupportedModel for a SentencePiece model without tokenizer.json.
    """
    target = out / TOKENIZER
    if (source / TOKENIZER).is_file():
        shutil.copyfile(source / TOKENIZER, target)
        tokenizer = _load(source / TOKENIZER)
    elif (source / "vocab.json").is_file() and (source / "merges.txt").is_file():
        tokenizer = _byte_level(source)
        tokenizer.save(str(target))
    elif (source / "tokenizer.model").is_file():
        raise UnsupportedModel(
            f"{source} has tokenizer.model but no tokenizer.json: save the tokenizer with "
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...) first"
        )
    else:
        return None, ()
    settings = _optional_json(source / "tokenizer_config.json")
    names = {**_optional_json(source / "special_tokens_map.json"), **{k: v for k, v in settings.items() if v is not None}}
    config, generation = _optional_json(source / "config.json"), _optional_json(source / "generation_config.json")
    config = {**(config.get("text_config") or {}), **config}
    bos = _id(tokenizer, names.get("bos_token"), config.get("bos_token_id"))
    eos = [_id(tokenizer, names.get("eos_token"), None), *_ids(generation.get("eos_token_id")), *_ids(config.get("eos_token_id"))]
    plain, special = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    info = TokenizerInfo(
        bos_id=bos,
        eos_ids=_unique(eos, tokenizer.get_vocab_size()),
        add_bos=bool(settings.get("add_bos_token")) or (bos is not None and special[:1] == [bos] and plain[:1] != [bos]),
    )
    return write_tokenizer_files(out, info, _chat_template(source, settings))


def write_tokenizer_files(out: Path, info: TokenizerInfo, chat_template: str | None) -> Written:
    """Describe the tokenizer.json that is in `out` already, and write the template beside it."""
    files = [file_info(out / TOKENIZER)]
    if chat_template:
        (out / CHAT_TEMPLATE).write_text(chat_template, encoding="utf-8")
        files.append(file_info(out / CHAT_TEMPLATE))
    return info.model_copy(update={"chat_template": bool(chat_template)}), tuple(files)


def _load(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CorruptModel(f"{path} is not a tokenizer ({error}): fetch it again") from None


def _byte_level(source: Path) -> Tokenizer:
    try:
        model = models.BPE.from_file(str(source / "vocab.json"), str(source / "merges.txt"))
    except Exception as error:
        raise CorruptModel(f"{source}: vocab.json and merges.txt make no tokenizer ({error}): fetch them again") from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = _optional_json(source / "special_tokens_map.json") | _optional_json(source / "tokenizer_config.json")
    special = {text for key, value in named.items() if key.endswith("_token") and (text := _text(value))}
    tokenizer.add_special_tokens(sorted(special & tokenizer.get_vocab().keys()))
    return tokenizer


def _chat_template(source: Path, settings: dict[str, Any]) -> str | None:
    path = source / CHAT_TEMPLATE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template") or _optional_json(source / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _optional_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CorruptModel(f"{path} is not JSON ({error}): fetch it again") from None
    return value if isinstance(value, dict) else {}


def _text(token: Any) -> str | None:
    """A special token as its file has it: a string or {"content": string}."""
    value = token.get("content") if isinstance(token, dict) else token
    return value if isinstance(value, str) else None


def _id(tokenizer: Tokenizer, token: Any, default: int | None) -> int | None:
    text = _text(token)
    found = tokenizer.token_to_id(text) if text is not None else None
    return default if found is None else int(found)


def _ids(value: Any) -> list[int]:
    return [value] if isinstance(value, int) else list(value) if isinstance(value, list) else []


def _unique(ids: Iterable[int | None], vocab_size: int) -> tuple[int, ...]:
    """The ids in order, each once. Ids outside the vocabulary are left out: configurations keep defaults of larger models."""
    return tuple(dict.fromkeys(i for i in ids if i is not None and 0 <= i < vocab_size))
