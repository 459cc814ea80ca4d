"""A Hugging Face directory of any decoder that transformers knows: its own implementation is traced and taken through the ONNX path."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from mesh.errors import CorruptModel
from mesh.importer.families.decoder_source import weights_info
from mesh.importer.families.rotary import CHANGES, shorter_context
from mesh.importer.sources.onnx import OnnxSource
from mesh.importer.sources.onnx_file import in_one_form
from mesh.importer.sources.quantized import QuantizedCheckpoint, open_checkpoint
from mesh.importer.sources.safetensors_file import checkpoint_bytes
from mesh.importer.sources.tokenizer import write_huggingface_tokenizer
from mesh.importer.trace.export import Reader, export
from mesh.importer.trace.library import versions
from mesh.importer.trace.model import TracedModel, open_model
from mesh.importer.trace.weights import ModelParameters, Parameters
from mesh.model.manifest import FileInfo, TokenizerInfo, WeightsInfo
from mesh.types import Progress, no_progress

__all__ = ["TracedSource", "joined_notes", "open_source"]

CHOOSES = "an indexer chooses the positions that attention reads, which is not served"
HIDES = "attention hides the positions with the lowest scores, which is not served"


def open_source(directory: Path, trust_remote_code: bool = False, progress: Progress = no_progress) -> TracedSource:
    """Trace the model of `directory`; reads only the headers of its weights. Errors: CorruptModel, UnsupportedModel."""
    checkpoint = open_checkpoint(directory)
    library = versions()
    progress(f"build it with transformers {library['transformers']}", 0, 3)
    model = open_model(directory, trust_remote_code)
    parameters = Parameters(model, checkpoint)
    if not model.alone:  # of a multimodal model only what text needs has to be there, which the graph says
        parameters.check_complete()
    progress(f"trace it with torch {library['torch']}", 1, 3)
    graph = export(model, parameters)
    progress("read the graph", 2, 3)
    source = TracedSource(model.path, model, graph, parameters)
    if isinstance(checkpoint, QuantizedCheckpoint):
        source.note = joined_notes(source.note, checkpoint.note)
    progress("read the graph", 3, 3)
    return source


def joined_notes(*notes: str | None) -> str | None:
    """Those that there are, as one."""
    return "; ".join(filter(None, notes)) or None


class TracedSource(OnnxSource):
    """A traced decoder; `parameters` are its weights, `model` is what transformers built of what `path` says."""

    kind: Literal["onnx", "safetensors", "gguf"] = "safetensors"
    wide = True
    note: str | None = None

    def __init__(self, path: Path, model: TracedModel, graph: Any, parameters: ModelParameters) -> None:
        self.file, self.model, self.parameters = path, model, parameters
        config = {**model.text.to_dict(), "model_type": model.kind}
        self._open(lambda: in_one_form(self.file, graph), config)
        if model.alone:
            self.note = joined_notes("the text decoder alone: images and sounds are not served", self.note)
        if model.language:
            self.note = joined_notes(f"with the adapters of the language {model.language} alone", self.note)
        rows = getattr(model.text, "vocab_size", None)
        if isinstance(rows, int) and rows != self.vocab_size:
            raise CorruptModel(f"{self.file}: vocab_size is {rows} where the model gives {self.vocab_size} logits")

    def _context_length(self) -> int:
        """The most that the graph is right for; `note` says why where the model has more."""
        whole = super()._context_length()
        limits = ((self.model.context, CHANGES), (self.model.chosen, CHOOSES), (self.model.shown, HIDES))
        context, why = min([(whole, ""), *((most, why) for most, why in limits if most is not None)])
        self.note = shorter_context(context, whole, why)
        return context

    @property
    def kept_weights(self) -> WeightsInfo | None:
        tensors = (value.const_value for value in self.graph.model.graph.initializers.values())
        read = [tensor for tensor in tensors if isinstance(tensor, Reader) and len(tensor.shape) > 1]
        return weights_info([None if each.source is None else each.source.form for each in read])

    @property
    def name(self) -> str:
        return self.file.parent.resolve().name

    @property
    def weight_bytes(self) -> int:
        return checkpoint_bytes(self.file.parent)

    @property
    def made(self) -> dict[str, str]:
        return {"way": "trace", **versions()}

    def write_tokenizer(self, directory: Path) -> tuple[TokenizerInfo | None, tuple[FileInfo, ...]]:
        return write_huggingface_tokenizer(self.file.parent, directory)
