"""Tokenizers in every form that a Hugging Face directory has them: the ids are those of transformers' AutoTokenizer."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from mesh.errors import UnsupportedModel
from mesh.importer.sources import tokenizer as source
from mesh.importer.sources.tokenizer import write_huggingface_tokenizer
from mesh.importer.trace.tokenizer import SAMPLE


def test_truncation_and_padding_of_a_training_run_are_not_kept(tmp_path: Path) -> None:
    made = Tokenizer(models.WordLevel({"a": 0, "b": 1}, "a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.enable_truncation(3)
    made.enable_padding(length=5)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "out").mkdir()
    write_huggingface_tokenizer(tmp_path, tmp_path / "out")
    written = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert written.encode("a b a b").ids == [0, 1, 0, 1] and written.encode("b").ids == [1]


def test_a_form_that_needs_transformers_says_so_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "available", lambda: False)
    monkeypatch.setattr("mesh.importer.trace.tokenizer.available", lambda: False)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(UnsupportedModel, match=r"has a tokenizer, but no tokenizer.json.*stagemesh\[trace\]"):
        write_huggingface_tokenizer(tmp_path, tmp_path)


def byte_vocabulary() -> dict[str, int]:
    return {letter: id for id, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def write_merges(directory: Path, kind: str) -> None:
    """Vocabulary and merges of a byte-level BPE, with a control token beyond them."""
    vocabulary = byte_vocabulary()
    merges = ["h e", "l l", "1 2", "12 3", "Ġ Ġ", "Ċ Ċ", "t h"]
    for merge in merges:
        vocabulary[merge.replace(" ", "")] = len(vocabulary)
    (directory / "vocab.json").write_text(json.dumps(vocabulary))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {"content": "<|im_start|>", "special": True, "lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    settings = {"tokenizer_class": kind, "added_tokens_decoder": {str(len(vocabulary)): added}, "eos_token": "<|im_start|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"unk_token": None, "pad_token": "<|im_start|>"}))
    (directory / "added_tokens.json").write_text(json.dumps({"<|im_start|>": len(vocabulary)}))


def write_tiktoken(directory: Path) -> None:
    pytest.importorskip("tiktoken")
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"  ", b"12"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (directory / "tokenizer.model").write_text("\n".join(lines) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def write_sentencepiece(directory: Path) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    text = directory / "text"
    text.write_text("\n".join(f"the quick brown fox jumps {n} over the lazy dog, hello world {n * n}" for n in range(300)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(directory / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True, minloglevel=2
    )
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    )


WRITERS: dict[str, Any] = {
    "gpt2": lambda directory: write_merges(directory, "GPT2Tokenizer"),
    "qwen2": lambda directory: write_merges(directory, "Qwen2Tokenizer"),
    "sentencepiece": write_sentencepiece,
    "tiktoken": write_tiktoken,
}


@pytest.mark.parametrize("form", WRITERS)
def test_the_ids_are_those_of_transformers(form: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the other tokenizer is that of transformers (the extra trace)")
    pytest.importorskip("torch", reason="the extra trace")
    WRITERS[form](tmp_path)
    kind = {"gpt2": "gpt2", "qwen2": "qwen2"}.get(form, "llama")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    (tmp_path / "out").mkdir()
    info, _ = write_huggingface_tokenizer(tmp_path, tmp_path / "out")
    ours = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (SAMPLE, "hello <|im_start|> 123 the", "  two  spaces", ""):
        assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False)["input_ids"]
    assert info is not None
    if form in ("gpt2", "qwen2"):
        assert ours.encode("<|im_start|>").ids == list(info.eos_ids)
