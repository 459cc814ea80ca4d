"""The source for Hugging Face directories: config.json and safetensors files, one or several with an index."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from mesh.errors import CorruptModel, ModelNotFound, UnsupportedModel, decoding
from mesh.importer.families.decoder_source import DecoderSource
from mesh.importer.families.registry import FAMILIES, open_decoder, unknown
from mesh.importer.sources.quantized import ADVICE, QuantizedCheckpoint, open_checkpoint
from mesh.importer.sources.safetensors_file import read_json
from mesh.importer.sources.tokenizer import write_huggingface_tokenizer

__all__ = ["has_family", "open_source", "unknown_family"]


def open_source(path: Path) -> DecoderSource:
    """Open a directory with config.json and safetensors weights; reads only their headers.

    Errors: ModelNotFound, CorruptModel, UnsupportedModel.
    """
    directory = Path(path)
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise ModelNotFound(f"{directory} has no config.json: give a Hugging Face model directory")
    config = read_json(config_path)
    checkpoint = open_checkpoint(directory)
    if isinstance(checkpoint, QuantizedCheckpoint) and config.get("model_type") == "gpt2":
        raise UnsupportedModel(f"{config_path}: quantized weights of gpt2, which are stored turned, are not supported: {ADVICE}")
    with decoding(CorruptModel, str(config_path)):
        spec, weights = open_decoder(config, str(config_path), checkpoint, checkpoint)
    tokenizer = partial(write_huggingface_tokenizer, directory)
    source = DecoderSource("safetensors", directory.resolve().name, spec, weights, tokenizer, directory)
    return replace(source, weights_note=lambda: checkpoint.note) if isinstance(checkpoint, QuantizedCheckpoint) else source


def has_family(directory: Path) -> bool:
    """Whether the model_type of `directory` is one that a family of ours builds."""
    return str(read_json(directory / "config.json").get("model_type")) in FAMILIES


def unknown_family(directory: Path) -> UnsupportedModel:
    """The error for any other, where nothing can trace it."""
    path = directory / "config.json"
    return unknown(str(read_json(path).get("model_type")), str(path))
