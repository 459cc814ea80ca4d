"""The tokenizer files of a model directory: tokenizer.json, chat_template.jinja, and the ids that generation needs to know."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from mesh.errors import CorruptModel, decoding
from mesh.importer.trace.library import available
from mesh.importer.trace.tokenizer import convert
from mesh.model.manifest import FileInfo, TokenizerInfo, file_info
from mesh.model.tokenizer import check_template

__all__ = ["CHAT_TEMPLATE", "TOKENIZER", "write_huggingface_tokenizer", "write_tokenizer_files"]

log = logging.getLogger("mesh.importer")

TOKENIZER = "tokenizer.json"
OTHER_FORMS = ("vocab.json", "vocab.txt", "*.model", "tekken.json", "*.tiktoken", "spiece.*")
CHAT_TEMPLATE = "chat_template.jinja"

Written = tuple[TokenizerInfo | None, tuple[FileInfo, ...]]


def write_huggingface_tokenizer(source: Path, out: Path) -> Written:
    """Write the tokenizer of Hugging Face directory `source` into `out`; (None, ()) if it has none.

    Where there is no tokenizer.json, transformers makes one from the other forms; those of GPT-2 itself need no transformers.
    CorruptModel if a file does not read; UnsupportedModel for a form that cannot be converted.
    """
    target = out / TOKENIZER
    settings = _optional_json(source / "tokenizer_config.json")
    if (source / TOKENIZER).is_file():
        tokenizer = _with_named_tokens(_load(source / TOKENIZER), source / TOKENIZER, target, settings)
    elif any(any(source.glob(name)) for name in OTHER_FORMS):
        tokenizer = _byte_level(source) if _is_gpt2(source, settings, unsure=not available()) else convert(source)
        _without_limits(tokenizer).save(str(target))
    else:
        return None, ()
    names = {**_optional_json(source / "special_tokens_map.json"), **{k: v for k, v in settings.items() if v is not None}}
    config, generation = _optional_json(source / "config.json"), _optional_json(source / "generation_config.json")
    config = {**(config.get("text_config") or {}), **config}
    bos = _id(tokenizer, names.get("bos_token"), config.get("bos_token_id"))
    eos = [_id(tokenizer, names.get("eos_token"), None), *_ids(generation.get("eos_token_id")), *_ids(config.get("eos_token_id"))]
    leading = _leading(tokenizer)
    info = TokenizerInfo(
        bos_id=bos,
        eos_ids=_unique(eos, tokenizer.get_vocab_size()),
        add_bos=bool(settings.get("add_bos_token")) or (bos is not None and leading[:1] == (bos,)),
        leading_ids=() if leading == (bos,) else leading,
    )
    return write_tokenizer_files(out, info, _chat_template(source, settings))


def _leading(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The tokens that the post-processor puts before a text."""
    plain, whole = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    begins = next((at for at in range(len(whole)) if whole[at : at + len(plain)] == plain), 0)
    return tuple(whole[:begins])


def _with_named_tokens(tokenizer: Tokenizer, source: Path, target: Path, settings: dict[str, Any]) -> Tokenizer:
    """The tokenizer of `source`, also written to `target`, with the tokens that tokenizer_config.json alone names (`added_tokens_decoder`).
    Without them a control token would be spelled out where it is encoded, and shown where it is decoded."""
    have = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    named = _named_tokens(settings, source)
    control = {text for text, token in named.values() if token.special and text in have and not have[text].special}
    lacking = {id: token for id, (text, token) in sorted(named.items()) if text not in have}
    if not control and not lacking:
        if tokenizer.truncation is None and tokenizer.padding is None:
            shutil.copyfile(source, target)
        else:
            _without_limits(tokenizer).save(str(target))
        return tokenizer
    if control:  # the library does not change a token that it has
        document = json.loads(tokenizer.to_str())
        for entry in document["added_tokens"]:
            entry["special"] = entry["special"] or entry["content"] in control
        tokenizer = Tokenizer.from_str(json.dumps(document))
    for id, token in lacking.items():
        if tokenizer.token_to_id(token.content) not in (None, id):
            continue  # the vocabulary has the text elsewhere: its own id counts
        if tokenizer.token_to_id(token.content) is None and id != tokenizer.get_vocab_size():
            log.warning("%s: the token %r of tokenizer_config.json has no place at id %d: it is left out", source, token.content, id)
            continue
        (tokenizer.add_special_tokens if token.special else tokenizer.add_tokens)([token])
    _without_limits(tokenizer).save(str(target))
    return tokenizer


def _without_limits(tokenizer: Tokenizer) -> Tokenizer:
    """Without truncation and padding, which are settings of a training run: a prompt is as long as it is."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _is_gpt2(source: Path, settings: dict[str, Any], *, unsure: bool) -> bool:
    """Whether vocab.json and merges.txt are read as GPT-2's own tokenizer: where nothing names another one, from which transformers could
    tell how a text is split, and, if `unsure`, where GPT-2's or OPT's is named."""
    kind = settings.get("tokenizer_class") or _optional_json(source / "config.json").get("model_type")
    merges = (source / "vocab.json").is_file() and (source / "merges.txt").is_file()
    return merges and (kind is None or (unsure and str(kind).removesuffix("Fast") in ("GPT2Tokenizer", "gpt2", "opt")))


def _named_tokens(settings: dict[str, Any], source: Path) -> dict[int, tuple[str, AddedToken]]:
    """The tokens of `added_tokens_decoder`, with their texts, by id."""
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    found = {}
    with decoding(CorruptModel, str(source.parent / "tokenizer_config.json")):
        for id, entry in (settings.get("added_tokens_decoder") or {}).items():
            text = str(entry["content"])
            found[int(id)] = text, AddedToken(text, **{flag: bool(entry[flag]) for flag in flags if flag in entry})
    return found


def write_tokenizer_files(out: Path, info: TokenizerInfo, chat_template: str | None) -> Written:
    """Describe the tokenizer.json that is in `out` already, and write the template beside it."""
    files = [file_info(out / TOKENIZER)]
    if chat_template:
        check_template(chat_template)
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
    added = sorted(_optional_json(source / "added_tokens.json").items(), key=lambda item: int(item[1]))
    tokenizer.add_tokens([text for text, id in added if id == tokenizer.get_vocab_size() or tokenizer.token_to_id(text) == id])
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
