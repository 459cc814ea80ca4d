"""`mesh import`: turn a source into a verified model directory. If anything fails, nothing is left on disk.

detect the kind -> open -> blocks and tokenizer into a staging folder beside OUT -> verify -> manifest -> rename to OUT
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mesh.errors import ConfigError, ModelNotFound, UnsupportedModel
from mesh.importer.options import ImportOptions
from mesh.importer.sources.hub import fetch, is_hub_name
from mesh.importer.sources.place import refuse_pointer
from mesh.importer.sources.safetensors_file import read_json
from mesh.importer.sources.source import Source
from mesh.importer.trace.library import available
from mesh.importer.trace.refused import refuse_config_file
from mesh.model.manifest import BlockInfo, HiddenInfo, Manifest
from mesh.types import Progress, no_progress

__all__ = ["detect", "import_model", "refuse_by_name"]


def import_model(
    source: Path,
    out: Path,
    options: ImportOptions | None = None,
    *,
    name: str | None = None,
    report: bool = False,
    force: bool = False,
    progress: Progress = no_progress,
) -> Manifest:
    """Import `source` as the model directory `out`.

    `report` also measures the error against 32-bit weights (perplexity of a fixed text). `force` replaces a model directory
    that is already there. Errors: ModelNotFound, CorruptModel, UnsupportedModel, VerificationFailed, ConfigError; on any of them, and on
    an interrupt, `out` is as it was.
    """
    options = options or ImportOptions()
    out = Path(out)
    if out.exists() and not (force and (out / "manifest.json").exists()) and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"{out} exists: choose another directory, or give --force to replace a model directory")
    opened = open_source(fetch(source) if is_hub_name(source) else Path(source), options, progress)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{out.parent} cannot be made ({error.strerror}): give a model directory in a folder that can be written"
        ) from None
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    from mesh.importer.verify.outside import outside_engine
    from mesh.importer.verify.size import bits_per_weight
    from mesh.importer.verify.verify import verify

    try:
        manifest = _write(opened, staging, options, name, progress)
        outside, notes = outside_engine(opened)
        measured = verify(staging, manifest, outside=outside, progress=progress) | notes
        measured["bits_per_weight"] = bits_per_weight(staging, manifest)
        manifest = manifest.model_copy(update={"report": measured})
        manifest.save(staging)
        if report:
            from mesh.importer.verify.report import measure_against_float32

            measured |= measure_against_float32(opened, staging, manifest, options, progress)
            manifest = manifest.model_copy(update={"report": measured})
            manifest.save(staging)
        if options.kv_cache not in (None, options.dtype):
            from mesh.importer.verify.report import measure_cache

            narrow = manifest.model_copy(update={"cache_dtype": options.kv_cache})
            manifest = narrow.model_copy(update={"report": measured | measure_cache(staging, manifest, narrow)})
            manifest.save(staging)
        staging.chmod(0o755)
        _replace(staging, out)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return manifest


def detect(path: Path) -> str:
    """The kind of a source: onnx, safetensors or gguf. ModelNotFound says what to give instead."""
    if path.is_file():
        refuse_pointer(path)
        if path.suffix == ".gguf" or _starts_with(path, b"GGUF"):
            return "gguf"
        if path.suffix == ".onnx":
            return "onnx"
        if path.suffix == ".safetensors":
            raise ModelNotFound(f"{path} holds weights alone: give the directory it lies in, with its config.json")
        raise ModelNotFound(f"{path} is neither .onnx nor .gguf: give one of these, or a Hugging Face directory")
    if not path.is_dir():
        raise ModelNotFound(f"{path} does not exist: give an .onnx or .gguf file, or a Hugging Face directory")
    if (path / "manifest.json").is_file():
        raise ModelNotFound(f"{path} is a model directory already: use it as it is")
    if _is_hugging_face(path):
        return "safetensors"
    if any(path.glob("*.onnx")) or any((path / "onnx").glob("*.onnx")):
        return "onnx"
    if (path / "config.json").is_file() and any(path.glob("*.bin")):
        raise UnsupportedModel(
            f"{path} has its weights as .bin files, which can hold programs: convert them to safetensors where you trust them, with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...) of transformers"
        )
    found = sorted(path.glob("*.gguf"))
    if len(found) == 1:
        return "gguf"
    if found:
        raise ModelNotFound(f"{path} has {len(found)} .gguf files: give the one to import")
    raise ModelNotFound(f"{path} has no .onnx, no .gguf and no config.json with .safetensors: give the directory of a model")


def refuse_by_name(source: Path) -> None:
    """UnsupportedModel where `source` is a Hugging Face directory whose config.json says that no import serves it. Loads neither torch nor
    JAX."""
    path = Path(source)
    if _is_hugging_face(path):
        refuse_config_file(path / "config.json", read_json(path / "config.json"))


def _is_hugging_face(path: Path) -> bool:
    return (path / "config.json").is_file() and any(path.glob("*.safetensors*"))


def open_source(path: Path, options: ImportOptions | None = None, progress: Progress = no_progress) -> Source:
    """Open a source of any kind; reads its description only. A decoder that no family builds is traced."""
    kind = detect(path)
    if kind == "onnx":
        from mesh.importer.sources import onnx

        return onnx.open_source(path)
    if kind == "gguf":
        from mesh.importer.sources import gguf

        return gguf.open_source(path if path.is_file() else next(path.glob("*.gguf")), progress)
    from mesh.importer.sources import safetensors

    refuse_by_name(path)
    if safetensors.has_family(path):
        return safetensors.open_source(path)
    if not available():
        raise safetensors.unknown_family(path)
    from mesh.importer.sources import traced

    return traced.open_source(path, (options or ImportOptions()).trust_remote_code, progress)


def _write(source: Source, staging: Path, options: ImportOptions, name: str | None, progress: Progress) -> Manifest:
    from mesh.importer.survey import choices
    from mesh.importer.write.blocks import BlockWriter

    with tempfile.TemporaryDirectory(prefix=f"{staging.name}.survey-", dir=staging.parent) as scratch:
        if options.bits == 4:
            options = replace(options, choices=choices(source, options, Path(scratch), progress))
        blocks = source.write_blocks(BlockWriter(staging), options, progress)
    tokenizer, extra = source.write_tokenizer(staging)
    weights = source.kept_weights or options.weights if options.keep else options.weights
    manifest = Manifest(
        name=_name(name or source.name),
        architecture=source.architecture,
        source=source.kind,
        layers=source.layers,
        vocab_size=source.vocab_size,
        context_length=source.context_length,
        hidden=HiddenInfo(size=source.hidden_size, dtype=options.dtype),
        cache=source.cache,
        cache_dtype=options.dtype,
        weights=weights.model_copy(update={"inputs": options.products if options.products and _rounds(staging, blocks) else None}),
        blocks=blocks,
        tokenizer=tokenizer,
        extra_files=extra,
    )
    manifest.save(staging)
    return manifest


def _rounds(directory: Path, blocks: Sequence[BlockInfo]) -> bool:
    """Whether some block rounds the inputs of its products to bfloat16: none does where all weights have fewer bits."""
    from onnx import TensorProto

    from mesh.runtime.loading import read_model

    graphs = (read_model(directory / f"{block.name}.onnx").graph for block in blocks)
    casts = (node for graph in graphs for node in graph.node if node.op_type == "Cast")
    return any(attribute.i == TensorProto.BFLOAT16 for node in casts for attribute in node.attribute if attribute.name == "to")


def _name(text: str) -> str:
    """A model's name is a token of NATS subjects and a file name: letters, digits, '-' and '_'."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "-" for c in text).strip("-") or "model"


def _replace(staging: Path, out: Path) -> None:
    if not out.exists():
        staging.rename(out)
        return
    old = out.with_name(f".{out.name}.old-{os.getpid()}")
    out.rename(old)
    staging.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
