"""Makes tokenizer.json from the vocabulary of a GGUF file: byte-level BPE ("gpt2") and SentencePiece BPE ("llama")."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mesh.errors import CorruptModel, UnsupportedModel, short
from mesh.importer.sources.tokenizer import TOKENIZER, Written, write_tokenizer_files
from mesh.model.manifest import TokenizerInfo

__all__ = ["PRE_TOKENIZERS", "write_gguf_tokenizer"]

# tokenizer.ggml.token_type
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tokenizer.ggml.pre -> (expressions that split one after the other, whether whole words bypass the merges)
PRE_TOKENIZERS: Mapping[str, tuple[tuple[str, ...], bool]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo"), ((GPT2,), False)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), ((r"\p{N}", GPT2), False)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3", "dbrx", "smaug-bpe"), ((LLAMA3,), True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), ((QWEN2,), False)),
    "tekken": ((TEKKEN,), True),
    "default": ((r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"), False),
}

# Control tokens that end a turn though the file names another as its end of sequence.
END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>", "<EOT>", "_<EOT>")


def write_gguf_tokenizer(metadata: Mapping[str, Any], path: str, out: Path) -> Written:
    """Write the tokenizer of GGUF metadata (read from `path`) into `out`; (None, ()) if the file has none.

    UnsupportedModel names a kind or a pre-tokenizer that is not known.
    """
    kind, tokens = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind in (None, "none", "no_vocab") or not tokens:
        return None, ()
    bpe = kind == "gpt2"
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if kind == "gpt2":
        tokenizer = _byte_level(metadata, tokens, path)
    elif kind == "llama":
        tokenizer = _sentencepiece(metadata, tokens, types, path)
    else:
        raise UnsupportedModel(
            f"{path}: tokenizer kind {short(repr(kind))} is not supported: only gpt2 (byte-level BPE) and llama (SentencePiece) are"
        )
    _add_special(tokenizer, tokens, types)
    bos, eos = metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.eos_token_id")
    if not bpe:
        bos, eos = 1 if bos is None else bos, 2 if eos is None else eos
    control = {token: id for id, (token, type_) in enumerate(zip(tokens, types, strict=True)) if type_ == CONTROL}
    ends = [eos, metadata.get("tokenizer.ggml.eot_token_id"), metadata.get("tokenizer.ggml.eom_token_id")]
    ends += [control[text] for text in END_OF_TURN if text in control]
    default = not bpe or metadata.get("tokenizer.ggml.pre") in ("llama-bpe", "llama3", "llama-v3", "tekken")
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", default)) and bos is not None
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], pair=[tokens[bos], "$A", "$B"], special_tokens=[(tokens[bos], bos)]
        )
    tokenizer.save(str(out / TOKENIZER))
    info = TokenizerInfo(bos_id=bos, eos_ids=tuple(dict.fromkeys(int(i) for i in ends if i is not None)), add_bos=add_bos)
    return write_tokenizer_files(out, info, metadata.get("tokenizer.chat_template"))


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str], path: str) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise UnsupportedModel(
            f"{path}: pre-tokenizer {short(repr(name))} is not supported ({', '.join(sorted(PRE_TOKENIZERS))} are): "
            "import the Hugging Face directory"
        )
    expressions, whole_words = PRE_TOKENIZERS[name]
    pairs = (merge.partition(" ") for merge in metadata.get("tokenizer.ggml.merges") or ())
    merges = [(left, right) for left, _, right in pairs]
    tokenizer = Tokenizer(_bpe(tokens, merges, path, ignore_merges=whole_words))
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], path: str) -> Tokenizer:
    scores = metadata.get("tokenizer.ggml.scores")
    if not scores or len(scores) != len(tokens):
        raise CorruptModel(f"{path}: tokenizer.ggml.scores has {len(scores or ())} entries where {len(tokens)} are needed")
    unknown = next((token for token, type_ in zip(tokens, types, strict=True) if type_ == UNKNOWN), None)
    model = _bpe(tokens, _merges(tokens, types, scores), path, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    steps = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    return tokenizer


def _merges(tokens: Sequence[str], types: Sequence[int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """Merges that make BPE do what SentencePiece does, which joins the neighbours whose union scores highest.

    Every split of a token into two tokens is a merge; the highest score comes first.
    """
    ids = {token: id for id, token in enumerate(tokens) if types[id] not in (CONTROL, UNKNOWN, UNUSED)}
    found = []
    for token, id in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-scores[id], id, ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _bpe(tokens: Sequence[str], merges: Iterable[tuple[str, str]], path: str, **settings: Any) -> models.BPE:
    try:
        return models.BPE(vocab={token: id for id, token in enumerate(tokens)}, merges=list(merges), **settings)
    except Exception as error:  # the library raises plain Exception
        raise CorruptModel(f"{path}: its vocabulary and merges make no tokenizer ({error}): fetch or convert it again") from None


def _add_special(tokenizer: Tokenizer, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control tokens are recognised in text and left out of decoded text; user-defined ones are ordinary text, never split."""
    typed = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token, kind in typed if kind in (CONTROL, UNKNOWN)])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token, kind in typed if kind == USER_DEFINED])
