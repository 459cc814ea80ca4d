"""What every source of a model offers to the import.

A module of this package that reads one kind of file has `open_source(path) -> Source`. Opening a source reads its description
only. Weights are read while `write_blocks` runs, one tensor at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from mesh.importer.options import ImportOptions
from mesh.model.manifest import BlockInfo, CacheInfo, FileInfo, TokenizerInfo, WeightsInfo
from mesh.types import Progress

if TYPE_CHECKING:  # it loads onnx_ir, which a source that is refused by its name need not wait for
    from mesh.importer.write.writer import BlockWriter

__all__ = ["Source"]


class Source(Protocol):
    """An opened source. Its attributes become the fields of the same names in the manifest: see mesh/model/manifest.py."""

    @property
    def kind(self) -> Literal["onnx", "safetensors", "gguf"]: ...
    @property
    def name(self) -> str: ...
    @property
    def architecture(self) -> str: ...
    @property
    def layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...
    @property
    def kept_weights(self) -> WeightsInfo | None:
        """How its quantized weights are said to be stored if they are kept; None where it has none."""
        ...

    @property
    def cache(self) -> tuple[CacheInfo, ...]: ...

    def write_blocks(self, writer: BlockWriter, options: ImportOptions, progress: Progress) -> tuple[BlockInfo, ...]:
        """Write embed, every layer in order, and head. Errors: CorruptModel, UnsupportedModel."""
        ...

    def write_tokenizer(self, directory: Path) -> tuple[TokenizerInfo | None, tuple[FileInfo, ...]]:
        """Write tokenizer.json and chat_template.jinja where the source has them; (None, ()) where it has none."""
        ...
