"""A Source (mesh/importer/sources/source.py) for decoders that are built from weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mesh.importer.families.decoder import write_decoder
from mesh.importer.families.spec import DecoderSpec, DecoderWeights
from mesh.importer.options import ImportOptions
from mesh.importer.write.writer import BlockWriter
from mesh.model.manifest import BlockInfo, CacheInfo, FileInfo, TokenizerInfo
from mesh.types import Progress

__all__ = ["DecoderSource"]


@dataclass(frozen=True, eq=False, slots=True)
class DecoderSource:
    """`tokenizer` writes the tokenizer's files into a directory: see Source.write_tokenizer."""

    kind: Literal["safetensors", "gguf"]
    name: str
    spec: DecoderSpec
    weights: DecoderWeights
    tokenizer: Callable[[Path], tuple[TokenizerInfo | None, tuple[FileInfo, ...]]]

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
    def cache(self) -> tuple[CacheInfo, ...]:
        return self.spec.cache

    def write_blocks(self, writer: BlockWriter, options: ImportOptions, progress: Progress) -> tuple[BlockInfo, ...]:
        return write_decoder(writer, self.spec, self.weights, options, progress)

    def write_tokenizer(self, directory: Path) -> tuple[TokenizerInfo | None, tuple[FileInfo, ...]]:
        return self.tokenizer(directory)
