"""A model that a command is given: a model directory, or a source that is imported first, once."""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

from mesh.commands.import_model import import_quietly
from mesh.host.paths import cache_directory

__all__ = ["MODEL_HELP", "import_target", "is_imported", "model_directory"]

MODEL_HELP = "a model directory; or a .gguf or .onnx file, a Hugging Face directory or hf:ORG/NAME, which is imported first"


def model_directory(given: Path) -> Path:
    """The model directory that `given` is, or the one it has been imported into. ModelNotFound: it is neither that nor a source."""
    from mesh.importer.run import detect
    from mesh.importer.sources.hub import fetch, is_hub_name

    if is_imported(given):
        return given
    source, target = given, None
    if is_hub_name(given):
        source = fetch(given)
        target = _in_cache(source, str(given).partition("/")[2])
    detect(source)
    target = target or import_target(source)
    if not is_imported(target):
        print(f"importing {given} into {target}", file=sys.stderr, flush=True)
        import_quietly(source, target, None)
    elif _newest(source) > (target / "manifest.json").stat().st_mtime:
        print(f"mesh: {given} is newer than {target}: `mesh import {given} {target} --force` imports it again", file=sys.stderr)
    return target


def is_imported(path: Path) -> bool:
    """Whether a path is a model directory."""
    return (path / "manifest.json").is_file()


def import_target(source: Path) -> Path:
    """The model directory that a source is imported into: NAME.mesh beside it, or in the cache where that folder cannot be written."""
    name = (source.name if source.is_dir() else source.stem) or source.resolve().name
    beside = source.with_name(f"{name}.mesh")
    return beside if is_imported(beside) or os.access(beside.parent, os.W_OK) else _in_cache(source, name)


def _in_cache(source: Path, name: str) -> Path:
    return cache_directory() / "imported" / f"{name}-{hashlib.sha256(str(source.resolve()).encode()).hexdigest()[:8]}"


def _newest(source: Path) -> float:
    """When a source was changed last."""
    return max((file.stat().st_mtime for file in (source.iterdir() if source.is_dir() else [source]) if file.is_file()), default=0.0)
