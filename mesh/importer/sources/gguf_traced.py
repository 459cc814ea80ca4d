"""GGUF files of architectures that gguf.py does not build: transformers' own implementation is traced, with the file's weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mesh.errors import UnsupportedModel, short
from mesh.importer.sources.gguf_file import GgufCheckpoint
from mesh.importer.sources.gguf_tokenizer import write_gguf_tokenizer
from mesh.importer.sources.traced import TracedSource, joined_notes
from mesh.importer.trace.export import export
from mesh.importer.trace.gguf_config import architecture_of, configuration
from mesh.importer.trace.gguf_weights import GgufParameters, divide_frequencies
from mesh.importer.trace.library import INSTALL, available, versions
from mesh.importer.trace.model import model_of
from mesh.model.manifest import FileInfo, TokenizerInfo
from mesh.types import Progress, no_progress

__all__ = ["GgufTracedSource", "open_source"]


def open_source(path: Path, checkpoint: GgufCheckpoint, progress: Progress = no_progress) -> GgufTracedSource:
    """Trace the model of the file `path`. Errors: CorruptModel, UnsupportedModel."""
    architecture = architecture_of(checkpoint)
    name = str(checkpoint.metadata["general.architecture"])
    if not available():
        raise UnsupportedModel(f"{path}: the GGUF architecture {short(name)!r} is traced from transformers, which needs {INSTALL}")
    library = versions()
    progress(f"build it with transformers {library['transformers']}", 0, 3)
    model = model_of(path, configuration(checkpoint, architecture), lambda module: divide_frequencies(checkpoint, module))
    parameters = GgufParameters(model, checkpoint, name, architecture)
    parameters.check_complete()
    progress(f"trace it with torch {library['torch']}", 1, 3)
    graph = export(model, parameters)
    progress("read the graph", 2, 3)
    source = GgufTracedSource(path, model, graph, parameters, checkpoint)
    progress("read the graph", 3, 3)
    return source


class GgufTracedSource(TracedSource):
    """A traced decoder whose weights are those of a GGUF file."""

    kind = "gguf"

    def __init__(self, path: Path, model: Any, graph: Any, parameters: GgufParameters, checkpoint: GgufCheckpoint) -> None:
        self._checkpoint = checkpoint
        super().__init__(path, model, graph, parameters)
        self.note = joined_notes(self.note, parameters.note)

    @property
    def name(self) -> str:
        return self.file.stem

    @property
    def weight_bytes(self) -> int:
        """As numbers of 16 bits, which is what a checkpoint of safetensors files has."""
        return sum(2 * int(np.prod(self._checkpoint.shape(name))) for name in self._checkpoint)

    def write_tokenizer(self, directory: Path) -> tuple[TokenizerInfo | None, tuple[FileInfo, ...]]:
        return write_gguf_tokenizer(self._checkpoint.metadata, str(self.file), directory)
