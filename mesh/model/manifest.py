"""`manifest.json`: what a model directory holds. The one place its keys are defined; docs/model-format.md explains the blocks."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mesh.errors import BadLayerRange, CorruptModel, ModelNotFound
from mesh.types import DType, LayerRange

__all__ = ["FORMAT", "BlockInfo", "CacheInfo", "FileInfo", "HiddenInfo", "Manifest", "TokenizerInfo", "WeightsInfo", "block_name"]

FORMAT: Final = 1
FILE_NAME = "manifest.json"


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileInfo(_Strict):
    name: str
    bytes: int
    sha256: str


class BlockInfo(_Strict):
    """One block. `weight_bytes` is what its weights take in memory as stored (quantized ones at their stored width)."""

    name: str  # embed, layer_000, ..., head
    files: tuple[FileInfo, ...]  # the .onnx file, then its .onnx.data if it has one
    weight_bytes: int
    parameters: int  # number of weight elements


class CacheInfo(_Strict):
    """The KV cache of one layer. Bytes for a token in a row: kv_heads * (key_dim + value_dim) * itemsize."""

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None  # sliding window in tokens; None: the whole context


class HiddenInfo(_Strict):
    """The tensor that crosses every cut: [batch, chunk, size]."""

    size: int
    dtype: DType


class WeightsInfo(_Strict):
    """How weights are stored: bits 32, 16, 8 or 4; group_size None: per output channel (or not quantized)."""

    bits: Literal[32, 16, 8, 4]
    group_size: int | None = None


class TokenizerInfo(_Strict):
    """What generation needs to know beside tokenizer.json: token ids, and whether a plain prompt gets a leading bos (`add_bos`)."""

    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool = False
    chat_template: bool = False


class Manifest(_Strict):
    format: Literal[1] = FORMAT
    name: str
    architecture: str  # family name as the source gives it; for display only
    source: Literal["onnx", "safetensors", "gguf"]
    layers: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    context_length: int = Field(ge=1)  # the most positions a row may have
    hidden: HiddenInfo
    cache: tuple[CacheInfo, ...]  # one a layer
    cache_dtype: DType
    weights: WeightsInfo
    blocks: tuple[BlockInfo, ...]  # embed, the layers in order, head
    tokenizer: TokenizerInfo | None = None
    extra_files: tuple[FileInfo, ...] = ()  # tokenizer.json, chat_template.jinja
    report: dict[str, Any] = Field(default_factory=dict)  # what verification measured

    @property
    def model_hash(self) -> str:
        """16 hex digits, equal if and only if every block is equal. A stage refuses frames that carry another hash."""
        digest = hashlib.sha256()
        for block in self.blocks:
            for file in block.files:
                digest.update(file.sha256.encode())
        return digest.hexdigest()[:16]

    def block(self, name: str) -> BlockInfo:
        for block in self.blocks:
            if block.name == name:
                return block
        raise KeyError(name)

    def check_range(self, layers: LayerRange) -> LayerRange:
        """`layers` itself, or BadLayerRange."""
        if not (0 <= layers.start < layers.stop <= self.layers):
            raise BadLayerRange(
                f"layer range {layers} is not inside {self.name}, which has layers 0-{self.layers}: "
                f"give 0 <= start < stop <= {self.layers} (the stop is not included)"
            )
        return layers

    def save(self, directory: Path) -> None:
        """Write the file whole or not at all: other processes may read it meanwhile."""
        fresh = directory / f".{FILE_NAME}.{os.getpid()}"
        fresh.write_bytes(orjson.dumps(self.model_dump(mode="json"), option=orjson.OPT_INDENT_2))
        fresh.replace(directory / FILE_NAME)

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        path = Path(directory) / FILE_NAME
        try:
            raw = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ModelNotFound(
                f"{directory} is not a model directory (no {FILE_NAME}): make one with `mesh import SRC {directory}`"
            ) from None
        try:
            manifest = cls.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "the document"
            raise CorruptModel(f"{path}: {where}: {first['msg']}; import the model again") from None
        expected = [block_name("embed"), *(block_name(i) for i in range(manifest.layers)), block_name("head")]
        if [block.name for block in manifest.blocks] != expected or len(manifest.cache) != manifest.layers:
            raise CorruptModel(f"{path}: blocks or caches do not match layers = {manifest.layers}; import the model again")
        return manifest

    def verify_files(self, directory: Path, layers: LayerRange, *, checksums: bool, embed: bool = False, head: bool = False) -> None:
        """Check that the files of a range are there and whole; CorruptModel names the first that is not.

        Sizes are always compared; sha256 only with `checksums`, which reads every byte.
        """
        names = [block_name(i) for i in layers]
        if embed:
            names.insert(0, block_name("embed"))
        if head:
            names.append(block_name("head"))
        for name in names:
            for file in self.block(name).files:
                check_file(Path(directory) / file.name, file, checksum=checksums)


def block_name(block: int | Literal["embed", "head"]) -> str:
    """File stem of a block: embed, head, or layer_NNN."""
    return f"layer_{block:03d}" if isinstance(block, int) else block


def file_info(path: Path) -> FileInfo:
    return FileInfo(name=path.name, bytes=path.stat().st_size, sha256=sha256(path))


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_file(path: Path, expected: FileInfo, *, checksum: bool) -> None:
    if not path.exists():
        raise CorruptModel(f"{path} is missing: fetch or import the model again")
    size = path.stat().st_size
    if size != expected.bytes:
        raise CorruptModel(f"{path} has {size:,} bytes where the manifest says {expected.bytes:,}: fetch or import the model again")
    if checksum and sha256(path) != expected.sha256:
        raise CorruptModel(f"{path} does not match its checksum: fetch or import the model again")
