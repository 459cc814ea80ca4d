"""A Source (mesh/importer/sources/source.py) for decoders that are built from weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mesh.importer.families.decoder import write_decoder
from mesh.importer.families.spec import DecoderSpec, DecoderWeights, LayerWeights
from mesh.importer.options import ImportOptions
from mesh.importer.write.kept import KeptForm, SourceMatrix
from mesh.importer.write.writer import BlockWriter
from mesh.model.manifest import BlockInfo, CacheInfo, FileInfo, TokenizerInfo, WeightsInfo
from mesh.types import Progress

__all__ = ["DecoderSource", "weights_info"]


@dataclass(frozen=True, eq=False, slots=True)
class DecoderSource:
    """`tokenizer` writes the tokenizer's files into a directory: see Source.write_tokenizer. `directory`: of a Hugging Face checkpoint.
    `weights_note`: what the report says about its weights."""

    kind: Literal["safetensors", "gguf"]
    name: str
    spec: DecoderSpec
    weights: DecoderWeights
    tokenizer: Callable[[Path], tuple[TokenizerInfo | None, tuple[FileInfo, ...]]]
    directory: Path | None = None
    weights_note: Callable[[], str | None] = lambda: None

    @property
    def note(self) -> str | None:
        """What the report says about the import."""
        return "; ".join(filter(None, (self.spec.context_note, self.weights_note()))) or None

    @property
    def architecture(self) -> str:
        return self.spec.architecture

    @property
    def layers(self) -> int:
        return self.spec.layers

    @property
    def hidden_size(self) -> int:
        return self.spec.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.spec.vocab_size

    @property
    def context_length(self) -> int:
        return self.spec.context_length

    @property
    def kept_weights(self) -> WeightsInfo | None:
        return next(filter(None, (kept_weights(self.weights.layer(index)) for index in range(self.layers))), None)

    @property
    def cache(self) -> tuple[CacheInfo, ...]:
        return self.spec.cache

    def write_blocks(self, writer: BlockWriter, options: ImportOptions, progress: Progress) -> tuple[BlockInfo, ...]:
        return write_decoder(writer, self.spec, self.weights, options, progress)

    def write_tokenizer(self, directory: Path) -> tuple[TokenizerInfo | None, tuple[FileInfo, ...]]:
        return self.tokenizer(directory)


def kept_weights(layer: LayerWeights) -> WeightsInfo | None:
    """How the matrices of a layer that are kept are said to be stored. None where none is."""
    linears = (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)
    return weights_info([each.weight.form if isinstance(each.weight, SourceMatrix) else None for each in linears if each is not None])


def weights_info(all_forms: Sequence[KeptForm | None]) -> WeightsInfo | None:
    """The same for weights of these forms (None: not kept): the nearest width and the group of the quantized ones, or the width that most
    have where none is quantized, and the names of all."""
    forms = [form for form in all_forms if form is not None]
    if not forms:
        return None
    quantized = [form for form in forms if form.scaled]
    if not quantized:
        return WeightsInfo(bits=16 if 2 * len(forms) >= len(all_forms) else 32, kept=", ".join(dict.fromkeys(form.name for form in forms)))
    bits = sum(form.bits for form in quantized) / len(quantized)
    names = ", ".join(dict.fromkeys(form.name for form in (*quantized, *forms)))
    return WeightsInfo(bits=4 if bits < 6 else 8, group_size=quantized[0].group or None, kept=names)
