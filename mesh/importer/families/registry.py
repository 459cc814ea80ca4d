"""Which family a Hugging Face config.json belongs to: the table of architectures, and how one is opened.

To add an architecture, give its model_type a line in FAMILIES. A relative of Llama then needs its defaults in llama.py
(DEFAULTS); any other needs a function from Config to DecoderSpec and a class of weights, as gpt.py has them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from mesh.errors import CorruptModel, UnsupportedModel, short
from mesh.importer.families import gpt, llama
from mesh.importer.families.config import Config
from mesh.importer.families.spec import DecoderSpec, DecoderWeights
from mesh.importer.families.tensors import Checkpoint, Tensors

__all__ = ["FAMILIES", "SUPPORTED", "Family", "open_decoder", "unknown"]


class _MakeWeights(Protocol):
    def __call__(self, spec: DecoderSpec, tensors: Tensors, *, head: Tensors, tied: bool) -> DecoderWeights: ...


@dataclass(frozen=True, slots=True)
class Family:
    """How a family is read.

    prefixes: what may stand before the names of the decoder's tensors. `table` is the embedding, whose name shows which one does.
    head: the name of the output projection, which has no such prefix.
    tied: whether the output projection is the embedding where config.json does not say.
    """

    spec: Callable[[Config], DecoderSpec]
    weights: _MakeWeights
    prefixes: tuple[str, ...]
    table: str
    head: str = "lm_head.weight"
    tied: bool = False


_LLAMA = Family(llama.spec_of, llama.LlamaWeights, ("model.", ""), "embed_tokens.weight")
_GEMMA = Family(
    llama.spec_of,
    llama.LlamaWeights,
    ("model.", "", "model.language_model.", "language_model.model.", "language_model."),
    "embed_tokens.weight",
    tied=True,
)
FAMILIES: Mapping[str, Family] = {
    "bloom": Family(gpt.bloom_spec, gpt.BloomWeights, ("transformer.", ""), "word_embeddings.weight", tied=True),
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "gpt2": Family(gpt.gpt2_spec, gpt.Gpt2Weights, ("transformer.", ""), "wte.weight", tied=True),
    "gpt_neox": Family(gpt.gpt_neox_spec, gpt.GptNeoxWeights, ("gpt_neox.", ""), "embed_in.weight", head="embed_out.weight"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "opt": Family(gpt.opt_spec, gpt.OptWeights, ("model.decoder.", "decoder.", ""), "embed_tokens.weight", tied=True),
    "phi3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}
SUPPORTED: tuple[str, ...] = tuple(sorted(FAMILIES))

# Buffers that old checkpoints carry: masks and rotary frequencies, which blocks compute.
_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|\.attn\.bias|\.attn\.masked_bias|\.attention\.bias|\.attention\.masked_bias)$")


def unknown(kind: str, path: str) -> UnsupportedModel:
    """The error for a model_type that no family here builds."""
    return UnsupportedModel(
        f"{path}: no family of ours builds model_type {short(kind)!r} (they build {', '.join(SUPPORTED)}). "
        "With torch and transformers `mesh import` traces their own implementation: pip install 'stagemesh[trace]'"
    )


def open_decoder(config: Mapping[str, Any], path: str, checkpoint: Checkpoint, names: Iterable[str]) -> tuple[DecoderSpec, DecoderWeights]:
    """The decoder of `config` (read from `path`) with the tensors `names` of `checkpoint`.

    UnsupportedModel: not a supported decoder, or a tensor that its architecture does not account for. CorruptModel: a value
    or a tensor is missing or has another shape than the configuration says.
    """
    kind = str(config.get("model_type"))
    family = FAMILIES.get(kind)
    if family is None:
        raise unknown(kind, path)
    if kind == "gemma3":
        outer = {key: config[key] for key in ("tie_word_embeddings",) if key in config}
        config = {**(config.get("text_config") or {}), **outer}
        kind = "gemma3_text"
    known = tuple(names)
    prefix = next((prefix for prefix in family.prefixes if prefix + family.table in checkpoint), None)
    if prefix is None:
        raise CorruptModel(f"{path}: the weights have no tensor {family.prefixes[0]}{family.table}, which {kind} needs")
    head = next((name[: -len(family.head)] for name in known if name.endswith(family.head)), "")
    spec = family.spec(Config(kind, config, path))
    tensors, head_tensors = Tensors(checkpoint, prefix), Tensors(checkpoint, head)
    weights = family.weights(spec, tensors, head=head_tensors, tied=bool(config.get("tie_word_embeddings", family.tied)))
    rows = tensors.shape(family.table)[0]
    if rows != spec.vocab_size:
        raise CorruptModel(f"{path}: vocab_size is {spec.vocab_size} where {prefix}{family.table} has {rows} rows")
    # every weight is looked up now, so that a missing or unknown tensor is an error before anything is written
    weights.embed()
    for index in range(spec.layers):
        weights.layer(index)
    weights.head()
    used = tensors.used | head_tensors.used | {head + family.head}
    for name in known:
        if name.startswith(prefix) and name not in used and not _BUFFERS.search(name):
            raise UnsupportedModel(f"{path}: {kind} has no use for the tensor {short(name)}: this is a variant that is not supported")
    return spec, weights
