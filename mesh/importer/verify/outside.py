"""The engine that runs a source itself, for comparison: onnxruntime for an export, transformers for a Hugging Face directory."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir

from mesh.errors import CorruptModel, UnsupportedModel
from mesh.importer.families.decoder_source import DecoderSource
from mesh.importer.sources.onnx import OnnxSource
from mesh.importer.sources.quantized import open_checkpoint
from mesh.importer.sources.safetensors_file import checkpoint_bytes
from mesh.importer.sources.source import Source
from mesh.importer.sources.traced import TracedSource
from mesh.importer.trace.library import available
from mesh.importer.trace.model import TracedModel, cache_shapes, open_model
from mesh.importer.trace.reference import TransformersReference
from mesh.importer.trace.weights import ModelParameters, Parameters
from mesh.importer.verify.oracle import OrtParts, open_oracle
from mesh.importer.verify.verify import NOTHING, Outside

__all__ = ["WHOLE_CHECKPOINT_BYTES", "WHOLE_SOURCE_BYTES", "outside_engine"]

WHOLE_SOURCE_BYTES = 2 << 30
"""An export of up to this size is run whole, token by token. A larger one is run part by part, on random tokens."""

WHOLE_CHECKPOINT_BYTES = 512 << 20
"""The same for a checkpoint that transformers runs: its weights are not mapped, and narrow ones become 32 bits wide."""


def outside_engine(source: Source) -> tuple[Outside, dict[str, Any]]:
    """What runs `source`, and what the manifest's report says about how it was made."""
    if isinstance(source, TracedSource):
        notes = {"made_by": source.made} | ({} if source.note is None else {"note": source.note})
        return _transformers(source, source.weight_bytes, source.model, source.parameters), notes
    if isinstance(source, OnnxSource):
        return _onnxruntime(source), {}
    note = source.note if isinstance(source, DecoderSource) else None
    notes = {} if note is None else {"note": note}
    if isinstance(source, DecoderSource) and source.directory is not None and available():
        try:
            model = open_model(source.directory)
            checkpoint = open_checkpoint(source.directory)
            return _transformers(source, checkpoint_bytes(source.directory), model, Parameters(model, checkpoint)), notes
        except UnsupportedModel as error:
            return NOTHING, {**notes, "not_compared": str(error)}
    return NOTHING, notes


def _transformers(source: Source, weight_bytes: int, model: TracedModel, parameters: ModelParameters) -> Outside:
    whole = weight_bytes <= WHOLE_CHECKPOINT_BYTES
    kept = [layer.attention for layer in cache_shapes(model) if not layer.states]  # where there are states, they would be made up too
    owners = source.owners if isinstance(source, OnnxSource) else ()
    held = len(set(owners)) or len(source.cache)
    own = [(c.kv_heads, c.key_dim, c.value_dim) for c in source.cache[:held]]
    same_cache = kept == own and all(owner < held for owner in owners) and _unscaled(source)
    reference = TransformersReference(model, parameters, whole=whole)
    return Outside(
        reference.name,
        greedy=reference.logits if whole else None,
        rows=None if whole else reference.logits,
        late=reference.late if same_cache else None,
        owners=owners,
    )


def _unscaled(source: Source) -> bool:
    """Whether a block's cache holds the very keys that the source's holds."""
    return not isinstance(source, OnnxSource) or all(each.k.scale == each.v.scale == 1.0 for each in source.patterns)


def _width(value: ir.Value) -> int | None:
    last = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return last if isinstance(last, int) else None


def _onnxruntime(source: OnnxSource) -> Outside:
    """The whole of an export where it is small enough, and its parts one at a time."""
    size = sum(file.stat().st_size for file in source.file.parent.glob("*") if file.is_file())
    roles = {str(value.name): (role.value, _width(value)) for value, role in source.graph.roles.items()}
    parts = OrtParts([partial(source.part, index) for index in range(source.layers + 2)], roles, source.file.parent)
    if size > WHOLE_SOURCE_BYTES:
        return Outside("onnxruntime", parts=parts, dtype=source.arithmetic)
    oracle = open_oracle(source.file, roles, source.graph.source_logits)

    def logits(tokens: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        try:
            return oracle.logits(tokens)
        except Exception as error:  # onnxruntime's own exceptions
            raise CorruptModel(f"{source.file} does not run in onnxruntime: {str(error).splitlines()[0]}") from None

    return Outside("onnxruntime", greedy=logits, parts=parts, dtype=source.arithmetic)
