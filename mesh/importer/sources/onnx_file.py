"""A .onnx file as a DecoderGraph: read, checked for missing weights, and brought to one form by all passes."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from mesh.errors import CorruptModel, ModelNotFound
from mesh.importer.graph.decoder import DecoderGraph, Draft
from mesh.importer.passes.pipeline import PIPELINE, run_passes
from mesh.importer.sources.place import inside_source

__all__ = ["in_one_form", "load"]


def load(path: Path) -> DecoderGraph:
    """Read an exported decoder and run every pass on it.

    Errors: ModelNotFound, CorruptModel (not ONNX, or its external data is missing or short), UnsupportedModel.
    """
    if not path.is_file():
        raise ModelNotFound(f"{path} does not exist: give the path of an .onnx file")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise many types; all mean the file is not a whole ONNX model
        raise CorruptModel(f"{path} is not a whole ONNX model ({_first_line(error)}): export or download it again") from None
    if not len(model.graph.outputs):
        raise CorruptModel(f"{path} holds no graph: export or download it again")
    _check_external_data(path, model)
    return in_one_form(path, model)


def in_one_form(path: Path, model: ir.Model) -> DecoderGraph:
    """A decoder's model after every pass; `path` is for messages. UnsupportedModel where a pass meets what it cannot rewrite."""
    draft = Draft(path, model)
    run_passes(draft, PIPELINE)
    return draft.analysed()


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _check_external_data(path: Path, model: ir.Model) -> None:
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = inside_source(path.parent, str(tensor.location))
        if not file.is_file():
            raise CorruptModel(f"{path}: weights file {file.name} is missing: put it beside the .onnx file")
        end = (tensor.offset or 0) + (tensor.length or tensor.nbytes)
        if file.stat().st_size < end:
            raise CorruptModel(
                f"{path}: weights file {file.name} has {file.stat().st_size:,} bytes where {value.name} ends at {end:,}: download it again"
            )
